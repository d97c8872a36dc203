"""Renders a RUN as one self-contained HTML page: it needs no network and no other file.

In: a RUN. Out: the page's HTML. Texts of models and problems cannot become markup: the template escapes all of them,
and the page's policy allows only our own script, by its digest.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from datetime import UTC, datetime
from pathlib import Path

import jinja2
import orjson
from markupsafe import Markup

from client.models.detokenize import Detokenizer, tokenizer_of
from client.protocol.requests import ModelCard
from client.report.analysis import BetaBand, TokenKind, by_kind, kind_shares
from client.report.findings import Findings, TokenDivergence, gather
from client.report.labels import (
    MANY_CUT,
    label_words,
    printable,
    selection_words,
    shifts_by_kind,
    shown_labels,
    shown_overturns,
    style_share,
    style_warning,
    told_apart,
)
from client.report.results import accuracy_is_of, headline_rows
from client.report.settings_charts import (
    accuracy_chart,
    alpha_charts,
    best_held_out,
    beta_chart,
    beta_rows,
    divergence_chart,
    held_out_charts,
    loss_chart,
    percent,
    place_chart,
)
from client.report.trajectories import SHADES, key_of, nats, shown_trajectories, title_of
from client.runs.run import Run

PAGE = Path(__file__).parent / "template"
TITLE_MARK = ": contrast report</title>"
"""Identifies a report: the command `report` replaces no other file."""
UNSEEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Invisible characters. Some of them reverse the direction of the text beside them."""
RUN_MARK = re.compile(r'<meta name="run" content="([^"]*)">|<title>(.*): contrast report</title>')
"""The RUN of a report: its URL, or in reports of early versions its name."""
MOST_COMPARED = 3
"""Most results at the top of the page. Its table shows all of them."""
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def report_page(run: Run) -> str:
    """The page of a RUN. Raises RunError if it has no trajectories, or no readable tokenizer.json."""
    findings = gather(run)
    return page(findings, Detokenizer(tokenizer_of(run.tokenizer(), f"{run}/tokenizer.json")))


def page(findings: Findings, texts: Detokenizer) -> str:
    """Render findings as a page."""
    style, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"count": lambda value: f"{value:,}", "percent": percent, "nats": nats}
    tally = findings.tally
    divergences, first_bar_cut = divergence_chart(findings)
    drawn = {key_of(sample) for sample in findings.drawn}
    others = [sample for sample in findings.most_divergent if key_of(sample) not in drawn]
    made = environment.get_template("report.html").render(
        found=findings,
        totals=findings.totals,
        tally=tally,
        manifest=findings.manifest,
        name=findings.url.rstrip("/").rsplit("/", 1)[-1],
        policy="; ".join(
            ("default-src 'none'", f"style-src '{_policy_digest(style)}'", f"script-src '{_policy_digest(script)}'",
             "base-uri 'none'", "form-action 'none'")
        ),
        style=Markup(style),
        script=Markup(script),
        divergence_chart=divergences,
        first_bar_cut=first_bar_cut,
        beta_chart=beta_chart(findings),
        betas=beta_rows(findings),
        alpha_charts=alpha_charts(findings),
        loss_chart=loss_chart(findings.losses, findings.held_out),
        held_out_charts=held_out_charts(findings.held_out),
        best_held_out=best_held_out(findings.held_out),
        lowest_held_out=min(findings.held_out, key=lambda point: point.score, default=None),
        curves=[(accuracy_chart(curve), curve) for curve in findings.curves],
        compared=headline_rows(findings.benchmarks, findings.training, MOST_COMPARED),
        several_adapters=len({row.adapter for row in findings.benchmarks}) > 1,
        accuracy_is_of=accuracy_is_of(findings.benchmarks, findings.training),
        agreement=_agreement(findings),
        place_chart=place_chart(findings),
        bands=[(band_words(band), band.steps, kind_shares(band.tokens, texts.raw),
                [(printable(texts.tail(step.before)), printable(texts.alone(step.token))) for step in band.drawn])
               for band in findings.bands],
        token_kinds=list(TokenKind),
        odd_labels=shown_labels(tally.shifts, texts),
        overturns=shown_overturns(tally.shifts, texts),
        shift_kinds=shifts_by_kind(tally.shifts, texts, findings.manifest.end_token_ids),
        style_share=style_share(tally.shifts, texts, findings.manifest.end_token_ids),
        style_warning=style_warning(tally.shifts, texts, findings.manifest.end_token_ids),
        many_cut=findings.totals.trajectories and tally.cut > MANY_CUT * findings.totals.trajectories,
        entropies=[(words, found) for words, kept in (("kept steps", True), ("other steps", False))
                   if (found := findings.steps.entropies(kept))],
        kinds=by_kind(findings.counts.seen, findings.counts.kept, findings.counts.kl, texts.raw),
        all_kl=float(findings.counts.kl.sum()),
        ratio=_ratio,
        tokens=[*zip(told_apart([one.token_id for one in findings.tokens], texts, for_terminal=False), findings.tokens,
                     strict=True)],
        groups=[
            ("Drawn by lot", "drawn from the whole RUN by a digest of their ids: nobody picked them",
             shown_trajectories(findings, findings.drawn, texts), []),
            ("The most divergent", "those with the highest mean divergence: look here first for oddities",
             shown_trajectories(findings, others, texts),
             [title_of(sample, findings.manifest) for sample in findings.most_divergent if key_of(sample) in drawn]),
        ],
        shades=[*zip(("0", *map(str, SHADES)), (*map(str, SHADES), None), strict=True)],
        provenance=_provenance(findings),
    )  # fmt: skip
    return UNSEEN.sub("�", made)


def band_words(band: BetaBand) -> str:
    """A band's range in words, in nats."""
    if band.high is None:
        return f"above {band.low:g}"
    return f"{band.low:g} to {band.high:g}" if band.low else f"up to {band.high:g}"


def _agreement(findings: Findings) -> list[tuple[str, str, int, float]]:
    """What is proved about the two models' best tokens: CSS class, words, steps, share."""
    tally = findings.tally
    open_ = tally.steps - tally.agreeing - tally.differing
    named = (("same", "the same token", tally.agreeing), ("other", "another token", tally.differing),
             ("open", "not decided by the top k", open_))  # fmt: skip
    return [(style, words, steps, steps / max(tally.steps, 1)) for style, words, steps in named]


def _provenance(findings: Findings) -> list[tuple[str, str]]:
    manifest, decoding = findings.manifest, findings.manifest.decoding
    warm = f"temperature {decoding.temperature:g}, top-p {decoding.top_p:g}, seed {decoding.seed}"
    how = warm if decoding.temperature else "greedy"
    rows = [
        ("RUN", findings.url),
        ("made", datetime.fromtimestamp(manifest.created_at, UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("expert", _card(manifest.expert)),
        ("amateur", _card(manifest.amateur)),
        ("problems", f"{manifest.problems.count:,}, digest {manifest.problems.digest[:12]}"),
        ("system prompt", manifest.system_prompt or "none"),
        ("decoding", f"{how}, at most {decoding.max_tokens:,} tokens, {decoding.n:,} a problem"),
        ("top k", f"{manifest.top_k}"),
        ("selection", f"{selection_words(manifest.select, manifest.keep)}: α = {manifest.alpha:g}, "
         f"β = {manifest.beta:g} nats, from step {manifest.first_step}"
         + ", incomplete sets kept" * manifest.keep_incomplete
         + (f", seed {manifest.select_seed}" if manifest.select == "random" else "")),
        ("labels", label_words(manifest.labels, manifest.gamma, manifest.max_shift)),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()) or "unknown"),
    ]  # fmt: skip
    if manifest.end_token_ids:
        rows.append(("ends", f"token {', '.join(map(str, manifest.end_token_ids))}"))
    if manifest.amateur_prompt:
        own = manifest.amateur_prompt == "own"
        rows.append(("amateur's prompt", "by its own chat template" if own else "the expert's"))
    if manifest.date:
        rows.append(("date in prompts", manifest.date))
    if manifest.chat_template_kwargs:
        rows.append(("chat template", orjson.dumps(manifest.chat_template_kwargs).decode()))
    if manifest.built_from:
        rows.append(("built from", manifest.built_from))
    return rows


def _card(card: ModelCard) -> str:
    return f"{card.id}, {card.dtype}, {card.vocab_size:,} columns, weights {card.model_fingerprint[:12]}"


def _policy_digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _ratio(token: TokenDivergence) -> str:
    """How many times as likely the expert finds a token: two digits, and powers of ten in superscript."""
    if math.isnan(token.mean_log_ratio):
        return "–"
    digits, power = f"{math.exp(min(token.mean_log_ratio, 700.0)):.1e}".split("e")  # a higher one would overflow
    if -4 <= int(power) < 6:
        return f"×{float(f'{digits}e{power}'):,.10g}"
    return f"×{digits}·10{str(int(power)).translate(SUPERSCRIPT)}"
