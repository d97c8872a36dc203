"""The report: its figures against plain computations, its text never markup, its page alone."""

import base64
import hashlib
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from support.runs.made_run import TOP_K, make_manifest, make_trajectory, tokenizer_json, words_of
from support.runs.reported import HOSTILE, SCORE, TWO, make_run, plain_bounds, trajectories_of, with_equal_steps

from client.contrast import kl_lower_bound
from client.errors import RunError
from client.models.detokenize import Detokenizer, tokenizer_of, visible
from client.protocol.requests import Failure
from client.report.findings import Largest, gather
from client.report.page import page, report_page
from client.runs.run import Run


class Page(HTMLParser):
    """What a browser would make of a page: elements with their attributes, and the text within each kind."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self._open = [], {}, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "rect", "circle", "line", "polyline"):
            self._open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        for tag in set(self._open):
            self.text[tag][-1] += data


def test_nothing_that_models_or_problems_say_becomes_markup(tmp_path):
    hostile = "".join(HOSTILE)
    trajectories = [make_trajectory(f"{hostile}{index}", seed=index, tokens=12) for index in range(3)]
    manifest = make_manifest()
    run = make_run(
        tmp_path / "run",
        trajectories,
        tokenizer_json(HOSTILE),
        {t.problem_id: hostile for t in trajectories},
        expert=manifest.expert.model_copy(update={"id": hostile}),
        amateur=manifest.amateur.model_copy(update={"id": hostile}),
        system_prompt=hostile,
        built_from=hostile,
        versions={hostile: hostile},
        chat_template_kwargs={hostile: hostile},
    )
    run.write_failures([Failure("gone", 0, hostile, hostile)])
    run.bucket.put("evaluation/<script>.json", json.dumps({"benchmarks": {hostile: SCORE}}).encode())
    written = report_page(run)
    page = Page(written)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"img", "iframe", "object", "link", "base", "form", "b0"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert not [tag for tag, attributes in page.elements if "style" in attributes]
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert scripts == [{"type": "application/json"}] * 3 + [{}]
    shown = [json.loads(text) for text in page.text["script"][:-1]]
    assert not set("<>&") & set("".join(page.text["script"][:-1]))
    names = {row[0] for steps in shown for step in steps for row in step["rows"]}
    assert {visible(token) for token in HOSTILE} <= names <= {visible(token) for token in words_of(HOSTILE)}
    assert hostile in " ".join(page.text["p"]) and hostile in "".join(page.text["h4"])


def test_the_policy_lets_the_pages_own_style_and_script_run_and_nothing_else(tmp_path):
    page = Page(report_page(make_run(tmp_path / "run", trajectories_of(3))))
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == "'none'" and rules.pop("base-uri") == "'none'"
    assert rules.pop("form-action") == "'none'" and set(rules) == {"style-src", "script-src"}
    for kind, source in (("style", rules["style-src"]), ("script", rules["script-src"])):
        digest = base64.b64encode(hashlib.sha256(page.text[kind][-1].encode()).digest()).decode()
        assert source == f"'sha256-{digest}'"


def test_the_page_stands_alone(tmp_path):
    page = Page(report_page(make_run(tmp_path / "run", trajectories_of(3))))
    for _, attributes in page.elements:
        assert not {"src", "srcset", "data", "action"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {attributes["href"][1:] for _, attributes in page.elements if "href" in attributes} <= ids
    assert "url(" not in page.text["style"][0] and "@import" not in page.text["style"][0]


def test_the_beta_table_counts_what_a_plain_pass_counts(tmp_path):
    trajectories = trajectories_of(12)
    page = Page(report_page(make_run(tmp_path / "run", trajectories, beta=0.5)))
    cells = [cell.strip() for cell in page.text["td"]]
    bounds, complete = plain_bounds(trajectories)
    names = [name.split()[0] for name in page.text["th"]]
    for beta in (0.05, 0.1, 0.2, 0.4, 0.5, 0.8, 1.6):
        kept = int(((bounds > beta) & complete).sum())
        row = [f"{kept:,}", f"{kept / len(bounds):.1%}", f"{kept / 12:.1f}"]
        at = [index for index in range(len(cells)) if cells[index : index + 3] == row]
        assert f"{beta:g}" in names and at, beta
    assert sum("this RUN" in name for name in page.text["th"]) == 1


def test_plausible_sets_are_sized_at_every_alpha_over_the_informative_steps(tmp_path):
    trajectories = trajectories_of(6)
    trajectories[0].amateur_logprobs[:, 2] = -np.inf  # an id that the amateur does not know
    found = gather(make_run(tmp_path / "run", trajectories, alpha=0.15)).plausible_sets
    assert 0.15 in found.alphas and found.alphas[-1] == 1.0
    for alpha, size, whole in zip(found.alphas, found.mean_size, found.whole, strict=True):
        sizes, complete = [], []
        for t in trajectories:
            for step in np.flatnonzero(kl_lower_bound(t.expert_logprobs, t.amateur_logprobs) > 0.4):
                if step:
                    inside = np.exp(t.expert_logprobs[step]) >= alpha * np.exp(t.expert_logprobs[step].max())
                    sizes.append(inside.sum())
                    complete.append(not inside[-1] and np.isfinite(t.amateur_logprobs[step][inside]).all())
        assert size == pytest.approx(np.mean(sizes), abs=0.02) and whole == pytest.approx(np.mean(complete), abs=0.02)
    assert found.mean_size[-1] == 1.0


def test_tokens_are_ranked_by_the_divergence_of_the_steps_that_took_them(tmp_path):
    trajectories = trajectories_of(8)
    run = make_run(tmp_path / "run", trajectories, first_step=2)
    spent, seen, ratios = {}, {}, {}
    for t in trajectories:
        bounds = kl_lower_bound(t.expert_logprobs, t.amateur_logprobs)
        for step in range(2, len(bounds)):
            token = int(t.token_ids[step])
            spent[token] = spent.get(token, 0) + bounds[step]
            seen[token] = seen.get(token, 0) + 1
            ratios.setdefault(token, []).append(t.expert_logprobs[step, 0] - t.amateur_logprobs[step, 0])
    kept = [int(s.token_ids[step]) for s in run.samples() for step in s.contrast.steps]
    tokens = gather(run).tokens
    assert [token.token_id for token in tokens] == sorted(spent, key=lambda token: -spent[token])[: len(tokens)]
    for token in tokens:
        assert (token.seen, token.kept) == (seen[token.token_id], kept.count(token.token_id))
        assert token.mean_kl == pytest.approx(spent[token.token_id] / token.seen)
        assert token.share == pytest.approx(spent[token.token_id] / sum(spent.values()))
        assert token.mean_log_ratio == pytest.approx(np.mean(ratios[token.token_id]), rel=1e-5)


def bars_of(page, section):
    """The heights of a section's first bars, in the units of their chart, and where they begin from above."""
    body = page[page.index(f'<section id="{section}">') :]
    bars = [a for tag, a in Page(body[: body.index("</svg>") + 6]).elements if a.get("class", "").startswith("bar")]
    return np.array([float(bar["height"]) for bar in bars]), np.array([float(bar["y"]) for bar in bars])


def test_the_first_bar_holds_what_is_smaller_and_the_last_the_largest(tmp_path):
    trajectories = with_equal_steps(trajectories_of(12), 1)
    bounds, _ = plain_bounds(trajectories)
    heights, _ = bars_of(report_page(make_run(tmp_path / "run", trajectories)), "divergence")
    smallest, largest = (bounds < 1e-4).sum(), (bounds > bounds.max() * 10 ** (-1 / 8)).sum()
    assert smallest == 12 and heights[0] / heights.sum() == pytest.approx(smallest / len(bounds), abs=0.002)
    assert largest and heights[-1] / heights.sum() == pytest.approx(largest / len(bounds), abs=0.002)


def test_a_first_bar_that_would_flatten_the_others_runs_off_the_scale_and_says_its_number(tmp_path):
    trajectories = with_equal_steps(trajectories_of(12), 6)
    bounds, _ = plain_bounds(trajectories)
    written = report_page(make_run(tmp_path / "run", trajectories))
    heights, tops = bars_of(written, "divergence")
    smallest, largest = (bounds < 1e-4).sum(), (bounds > bounds.max() * 10 ** (-1 / 8)).sum()
    assert tops[0] == 26 < 30 < tops[1:].min() and heights[1:].max() > 0.8 * heights[0]
    assert heights[-1] / heights[1:].sum() == pytest.approx(largest / (len(bounds) - smallest), abs=0.005)
    assert smallest == 72 and "72 steps" in Page(written).text["text"] and "runs off the scale" in written
    assert f"Histogram of the divergence of {len(bounds)} steps; the highest bar stands for 72 of them" in written


def test_a_first_bar_that_leaves_room_for_the_others_is_drawn_to_scale(tmp_path):
    written = report_page(make_run(tmp_path / "run", trajectories_of(12)))
    _, tops = bars_of(written, "divergence")
    assert tops.min() > 26 and "runs off the scale" not in written


def test_a_shown_trajectory_says_of_every_token_what_the_run_says(tmp_path):
    (trajectory,) = trajectories_of(1)
    run = make_run(tmp_path / "run", [trajectory], questions={"p0": "How many?"})
    (sample,) = run.samples()
    page = Page(report_page(run))
    steps = json.loads(page.text["script"][0])
    assert len(steps) == len(trajectory.token_ids) and "How many?" in page.text["p"]
    bounds = kl_lower_bound(trajectory.expert_logprobs, trajectory.amateur_logprobs)
    kept = sample.contrast
    for t, step in enumerate(steps):
        assert step["kl"] == f"{bounds[t]:.3f}" and (step["why"] == "kept") == (t in kept.steps)
        assert [row[0] for row in step["rows"]] == [f"w{token}" for token in trajectory.top_ids[t]]
        for row, logprobs in ((1, trajectory.expert_logprobs[t]), (2, trajectory.amateur_logprobs[t])):
            np.testing.assert_allclose([float(cells[row]) for cells in step["rows"]], np.exp(logprobs), 0.5, 0.0005)
        assert [row[4] for row in step["rows"]] == [1] + [0] * (TOP_K - 1)
        labels = [row[3] for row in step["rows"] if row[3]]
        if t in kept.steps:
            at = list(kept.steps).index(t)
            weights = kept.label_weights[kept.label_offsets[at] : kept.label_offsets[at + 1]]
            assert labels == [f"{weight:.3f}" for weight in weights]
        else:
            assert labels == []
    spans = [a for tag, a in page.elements if tag == "span" and a.get("role") == "option"]
    assert ["kept" in a["class"] for a in spans[: len(steps)]] == [t in kept.steps for t in range(len(steps))]
    levels = [sum(bound > shade for shade in (0.05, 0.2, 0.4, 0.8, 1.6)) for bound in bounds]
    assert [a["class"].split()[0] for a in spans[: len(steps)]] == [f"k{level}" for level in levels]
    assert [a["tabindex"] for a in spans[: len(steps)]] == ["0"] + ["-1"] * (len(steps) - 1)


def test_of_a_long_trajectory_the_beginning_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr("client.report.trajectories.LONGEST_SHOWN", 6)
    run = make_run(tmp_path / "run", [make_trajectory("p", seed=0, tokens=20)])
    (sample,) = run.samples()
    page = Page(report_page(run))
    assert len(json.loads(page.text["script"][0])) == 6
    assert sum(attributes.get("role") == "option" for _, attributes in page.elements) == 6
    assert "The first 6 tokens; 14 more are not shown." in page.text["p"]
    assert f"{len(sample.contrast.steps)} of 20 tokens kept" in page.text["h4"][0]


def test_a_trajectory_drawn_by_lot_is_not_shown_twice_for_its_divergence(tmp_path):
    run = make_run(tmp_path / "run", trajectories_of(12))
    found = gather(run)
    drawn, divergent = ([sample.problem_id for sample in group] for group in (found.drawn, found.most_divergent))
    twice = [problem for problem in divergent if problem in drawn]
    assert 0 < len(twice) < 3
    page = Page(report_page(run))
    shown = [title.split()[0] for title in page.text["h4"]]
    assert shown == drawn + [problem for problem in divergent if problem not in drawn]
    (told,) = (text for text in page.text["p"] if "highest mean divergence" in text)
    assert told.startswith("3 of 12") and told.endswith(f"Shown above already: {', '.join(twice)}.")
    assert (
        "Shown above already: p0, p1."
        in Page(report_page(make_run(tmp_path / "two", trajectories_of(2)))).text["p"][-1]
    )


@pytest.mark.parametrize(
    ("ratio", "written"),
    [
        (1.0, "×1"), (2.34, "×2.3"), (0.0123, "×0.012"), (123.0, "×120"), (12_345, "×12,000"), (949_000, "×950,000"),
        (996_000, "×1.0·10⁶"), (1.2e7, "×1.2·10⁷"), (3.2e-10, "×3.2·10⁻¹⁰"), (np.nan, "–"), (0.0, "×0"),
    ],
)  # fmt: skip
def test_how_many_times_as_likely_is_written_without_an_e(tmp_path, ratio, written):
    run = make_run(tmp_path / "run", trajectories_of(2))
    found = gather(run)
    with np.errstate(divide="ignore"):
        token = replace(found.tokens[0], mean_log_ratio=float(np.log(ratio)))
    told = page(replace(found, tokens=[token]), Detokenizer(tokenizer_of(run.tokenizer(), "here")))
    assert f"<td>{written}</td>" in told
    huge = replace(found, tokens=[replace(token, mean_log_ratio=1e6)])
    assert "·10³⁰⁴</td>" in page(huge, Detokenizer(tokenizer_of(run.tokenizer(), "here")))


def test_trajectories_are_drawn_the_same_whatever_their_order_and_the_divergent_ones_are_those(tmp_path):
    trajectories = trajectories_of(40)
    one = gather(make_run(tmp_path / "one", trajectories))
    other = gather(make_run(tmp_path / "other", trajectories[::-1]))
    drawn = [sample.problem_id for sample in one.drawn]
    assert drawn == [sample.problem_id for sample in other.drawn] and len(set(drawn)) == 5
    mean = {t.problem_id: kl_lower_bound(t.expert_logprobs, t.amateur_logprobs)[1:].mean() for t in trajectories}
    assert [sample.problem_id for sample in one.most_divergent] == sorted(mean, key=lambda name: -mean[name])[:3]


def test_what_is_kept_of_a_part_does_not_hold_the_part_in_memory():
    largest = Largest(1)
    trajectory = make_trajectory("p", seed=1, tokens=30)
    largest.add(1.0, trajectory)
    (kept,) = largest.result()
    assert not np.shares_memory(kept.top_ids, trajectory.top_ids) and kept.expert_logprobs.base is None


def test_training_and_evaluation_are_shown_where_the_trainer_left_them(tmp_path):
    run = make_run(tmp_path / "run", trajectories_of(3))
    assert "Training and evaluation" not in report_page(run)
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 30)]
    lines.append({"step": 30, "loss": "inf"})
    run.bucket.put("training/metrics.jsonl", b"\n".join(json.dumps(line).encode() for line in lines) + b'\n{"step": 3')
    run.bucket.put("evaluation/first.json", json.dumps({"benchmarks": {"gsm8k": TWO}}).encode())
    run.bucket.put("evaluation/torn.json", b"{")
    run.bucket.put("evaluation/other.json", b'["something else"]')
    for name, figures in {"half": {"n": 5}, "much": SCORE | {"accuracy": 2.0}}.items():
        body = {"benchmarks": {"taken": SCORE, name: figures}}  # a file that is wrong in part is left out
        run.bucket.put(f"evaluation/{name}.json", json.dumps(body).encode())
    found = gather(run)
    assert found.losses == [(step, 1 / step) for step in range(1, 30)]
    assert [(b.name, b.n, b.accuracy, b.before, b.p) for b in found.benchmarks] == [
        ("gsm8k", 200, (0.75, 0.68, 0.81), (0.75, 0.68, 0.81), 0.0123)
    ]
    written = report_page(run)
    assert "Training loss from 1.000 to 0.034 over 29 optimizer steps" in written and "gsm8k" in written
    assert "McNemar" in written and "0.012" in written
    top = " ".join(written.partition("<main>")[0].split())
    assert "Accuracy on 200 problems of gsm8k: 75.0% before training, <b>75.0%</b> after" in top and "(p 0.012)" in top


def test_what_a_training_measured_of_held_out_trajectories_is_drawn(tmp_path):
    run = make_run(tmp_path / "run", trajectories_of(3))
    rows = [
        {"step": step, "loss": loss, "agreement": 0.5 + step / 400, "shift": step / 1000, "other_shift": step / 4000}
        for step, loss in ((0, 0.9), (72, 0.26), (144, 0.25))
    ]
    torn = b'\n{"step": 200, "loss": 0.1}\n{"step": NaN}\n{"step"'
    run.bucket.put("training/held_out.jsonl", b"\n".join(json.dumps(row).encode() for row in rows) + torn)
    losses = [{"step": step, "loss": 1 / step} for step in range(1, 100)]
    without = report_page(run)
    assert "Shift from the base at the end: 0.144 nats at kept steps, 0.036 at others" in without
    run.bucket.put("training/metrics.jsonl", b"\n".join(json.dumps(line).encode() for line in losses))
    scores = [{"score": row["loss"] + row["other_shift"], "best": 0} for row in rows]
    assert [vars(point) for point in gather(run).held_out] == [
        row | more for row, more in zip(rows, scores, strict=True)
    ]
    page = " ".join(report_page(run).split())
    assert "over 99 optimizer steps; held-out loss from 0.900 to 0.250." in page and "best: step 72<" in page
    assert "Held-out score, best at step 72: 0.278, and 0.286 at the last." in page
    assert "best at step 72, 0.278; 0.286 at the last." in page
    assert "The best is the last measurement within a standard error of the lowest." in page
    assert "Agreement with held-out labels from 50.0% to 86.0%" in page
    assert '<text class="small-words"' in page and ">the lowest<" in page and "ring" not in page.partition("<body>")[2]
    given = [row | {"score": score, "best": score == 0.5} for row, score in zip(rows, (0.9, 0.4, 0.5), strict=True)]
    run.bucket.put("training/held_out.jsonl", b"\n".join(json.dumps(row).encode() for row in given))
    page = " ".join(report_page(run).split())
    assert "best at step 144, 0.500; 0.500 at the last." in page
    assert "best: step 144<" in page and "the last within a standard<" in page
    assert ">error of the lowest, step 72<" in page and "The lowest, ringed, is 0.400 at step 72." in page
    assert page.count('<circle class="ring"') == 1
    late = [row | {"step": 1000 * row["step"]} for row in given]
    run.bucket.put("training/held_out.jsonl", b"\n".join(json.dumps(row).encode() for row in late))
    page = " ".join(report_page(run).split())
    assert "best: step 144,000<" in page and "best at step 144,000, 0.500" in page and "step 72,000<" in page
    run.bucket.remove("training/held_out.jsonl")
    assert gather(run).held_out == [] and "held out" not in report_page(run)


def test_runs_with_little_in_them_have_a_report_too(tmp_path):
    short = make_run(tmp_path / "short", [make_trajectory("p", seed=0, tokens=1)])
    assert "No step is above β" in report_page(short) and "not complete yet" in report_page(short)
    (tmp_path / "equal").mkdir()
    trajectory = make_trajectory("p", seed=0, tokens=9)
    trajectory.amateur_logprobs[:] = trajectory.expert_logprobs
    equal = make_run(tmp_path / "equal", [trajectory], beta=0.0)
    equal.seal(equal.totals(equal.manifest()))
    assert "not complete yet" not in report_page(equal)
    for select in ("all", "random"):
        assert f"selection</dt><dd>{select}" in report_page(
            make_run(tmp_path / select, trajectories_of(2), select=select)
        )


def test_what_cannot_be_reported_is_named(tmp_path):
    imported = Run(str(tmp_path / "imported"))
    imported.claim(make_manifest(imported_from="samples.jsonl"), b"{}")
    with pytest.raises(RunError, match="holds samples only"):
        report_page(imported)
    with pytest.raises(RunError, match=r"tokenizer\.json is not a tokenizer\.json that can be read"):
        report_page(make_run(tmp_path / "run", trajectories_of(1), b"{}"))


@pytest.mark.parametrize(
    "losses",
    [[0.5, 0.5], [0.0, 0.0], [-1.0, -2.0], [5e-324, 5e-324], [5e-324, 1e308], [3e-323, 0.0]],
)
def test_a_loss_curve_is_drawn_of_any_numbers(tmp_path, losses):
    run = make_run(tmp_path / "run", trajectories_of(2))
    rows = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    strange = [{"step": step, "loss": 0.5} for step in ("inf", "-inf", "nan", None, [], "later")]
    run.bucket.put("training/metrics.jsonl", b"\n".join(json.dumps(row).encode() for row in rows + strange))
    assert gather(run).losses == list(enumerate(losses))
    written = report_page(run)
    assert "Training loss from" in written and "nan" not in places_in_charts(written)


def places_in_charts(page):
    """Where everything in the charts is drawn."""
    drawn = ("rect", "line", "polyline", "circle", "text")
    return " ".join(value for tag, attributes in Page(page).elements if tag in drawn for value in attributes.values())


@pytest.mark.parametrize("change", [{"p": "inf"}, {"p": "nan"}, {"p": -0.1}, {"p": 1.5}, {"n": -1}])
def test_an_evaluation_with_impossible_figures_is_left_out(tmp_path, change):
    run = make_run(tmp_path / "run", trajectories_of(2))
    figures = TWO | change | {"paired": TWO["paired"] | change}
    run.bucket.put("evaluation/odd.json", json.dumps({"benchmarks": {"gsm8k": figures}}).encode())
    assert gather(run).benchmarks == [] and "gsm8k" not in report_page(run)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "settings", [{"beta": 1e300}, {"beta": 1.7e308}, {"beta": 5e-324}, {"alpha": 1e-300}, {"alpha": 5e-324}]
)
def test_settings_at_their_ends_have_a_report_without_a_warning(tmp_path, settings):
    written = report_page(make_run(tmp_path / "run", trajectories_of(2), **settings))
    assert "nan" not in places_in_charts(written)
    ((name, value),) = settings.items()
    assert f"{ {'alpha': 'α', 'beta': 'β'}[name] } = {value:g}" in written


@pytest.mark.parametrize(("name", "value"), [("token_ids", 50), ("top_ids", np.arange(50, 50 + TOP_K))])
def test_a_token_that_the_expert_does_not_have_is_named(tmp_path, name, value):
    sound, damaged = trajectories_of(2)
    getattr(damaged, name)[3] = value
    run = make_run(tmp_path / "run", [sound, damaged])
    with pytest.raises(RunError, match=r"run is damaged: problem 'p1': token 5\d is beyond the expert's 50 columns"):
        report_page(run)
