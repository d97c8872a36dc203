"""Imports the authors' published sample files into a RUN that holds samples only.

In: JSONL, one row per kept step: `prompt_id` (the question itself), `step`, `prefix` (the answer's text before the
step), `tokens`, `token_ids`, `weights` (the label), `kl_divergence` (nats, over the whole vocabulary). Out: a RUN with
one row per problem. Training needs the trajectory's tokens, but the file has text: a prefix is tokenised, and imported
only if it has exactly `step` tokens that decode to the same text. Other rows are skipped, and counted by reason.

A trajectory ends with its last kept step. The file does not have that step's own token: the label's heaviest token
takes its place. Training never reads it, because it predicts nothing after it.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from client.contrast import Contrast
from client.errors import ModelError, RunError
from client.models.chat_template import ChatTemplate
from client.models.detokenize import tokenizer_of
from client.models.fingerprints import (
    chat_template_digest,
    model_config,
    model_fingerprint,
    token_map,
    tokenizer_fingerprint,
)
from client.problems.problem_set import ProblemSet, ProblemSetIdentity
from client.protocol.requests import SYSTEM_PROMPT, ContrastSettings, Decoding, ModelCard
from client.runs.manifest import RunManifest
from client.runs.run import Run
from client.runs.samples import Sample
from client.runs.tally import RunTotals

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PART_SAMPLES = 256
WEIGHT_SUM_ERROR = 0.02
"""How far the weights of a label may be from a sum of 1: the published code wrote them in the models' precision, which
may be bfloat16."""
UNKNOWN = "unknown"

NOT_JSON = "is not a JSON object"
FIELDS = "lacks a field, or has a field of another type"
LABEL = "token_ids and weights are not a distribution over the vocabulary"
TEXTS = "tokens are not what this tokenizer makes of token_ids: another model's file?"
DIVERGENCE = "kl_divergence is below beta"
AGAIN = "repeats a step of its problem"
APART = "stands apart from the other rows of its problem"
PREFIX_TOKENS = "its prefix does not tokenise to `step` tokens"
DEPARTS = "its prefix is not the beginning of its problem's longest"


@dataclass(frozen=True)
class PublishedStep:
    """One kept step of the file."""

    line: int
    question: str
    step: int
    prefix: str
    token_ids: list[int]
    weights: list[float]
    kl: float


@dataclass
class LeftOut:
    """Rows that were skipped: how many for each reason, and the first line of each."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str, line: int) -> None:
        self.counts[reason] += 1
        self.first[reason] = min(line, self.first.get(reason, line))

    def lines(self) -> list[str]:
        """One line for each reason, the most frequent first."""
        return [f"{many:,} rows: {reason} (first: line {self.first[reason]})"
                for reason, many in self.counts.most_common()]  # fmt: skip


@dataclass(frozen=True)
class Imported:
    """The result of `import_samples`."""

    totals: RunTotals
    left_out: LeftOut
    whole_model: bool  # False: the folder had no weights to identify the expert, so the trainer refuses the RUN


def import_samples(file: Path, run: Run, folder: Path, settings: ContrastSettings) -> Imported:
    """Import `file`. `settings`: those that it was made with. `folder`: the expert's model, or its tokenizer alone.

    The same call resumes; it does not change a complete RUN. Raises RunError if no row can be imported, if `run` was
    made from another file or with other settings, or if its folder holds other files; ModelError if `folder` lacks a
    tokenizer or a chat template.
    """
    run.check_place()
    template, left_out = ChatTemplate(folder), LeftOut()
    expert = _expert(folder)
    data = _bytes(folder / "tokenizer.json")
    tokenizer = tokenizer_of(data, f"{folder}/tokenizer.json")
    day = (run.date() or date.today().isoformat()) if template.writes_date else None
    manifest = _manifest(file, expert, settings, day)
    sealed = run.completion() is not None
    samples: list[Sample] = []
    counts: Counter[str] = Counter()

    def write() -> None:
        if not counts["parts"]:
            run.claim(manifest, data)
        if not sealed:
            run.write_samples(f"part-{counts['parts']:06d}", samples)
        counts["parts"] += 1
        samples.clear()

    for question, rows in _problems(file, tokenizer, expert.vocab_size, settings, left_out):
        prompt = tokenizer.encode(template.render(SYSTEM_PROMPT, question, date=day), add_special_tokens=False).ids
        sample = _sample(question, prompt, rows, tokenizer, left_out)
        if sample is not None:
            samples.append(sample)
            counts.update(
                trajectories=1, tokens=len(sample.token_ids), kept=len(sample.contrast.steps),
                labelled=len(sample.contrast.label_ids),
            )  # fmt: skip
            if len(samples) == PART_SAMPLES:
                write()
    if not counts["kept"]:
        reasons = left_out.lines() or ["it has no rows"]
        raise RunError("\n  ".join((f"no row of {file} can be imported:", *reasons)))
    if samples:
        write()
    totals = _totals(counts, settings.first_step)
    run.seal(totals)
    return Imported(totals, left_out, whole_model=bool(expert.model_fingerprint))


def _problems(
    file: Path, tokenizer: Tokenizer, vocab_size: int, settings: ContrastSettings, left_out: LeftOut
) -> Iterator[tuple[str, list[PublishedStep]]]:
    """Yield the rows of each problem, which must be adjacent. Memory holds one problem's rows, and question digests."""
    seen: set[bytes] = set()
    whole = _valid_steps(file, tokenizer, vocab_size, settings, left_out)
    for question, group in groupby(whole, key=lambda row: row.question):
        digest = hashlib.sha256(question.encode()).digest()
        rows: dict[int, PublishedStep] = {}
        for row in group:
            if digest in seen:
                left_out.add(APART, row.line)
            elif row.step in rows:
                left_out.add(AGAIN, row.line)
            else:
                rows[row.step] = row
        seen.add(digest)
        if rows:
            yield question, [rows[step] for step in sorted(rows)]


def _valid_steps(
    file: Path, tokenizer: Tokenizer, vocab_size: int, settings: ContrastSettings, left_out: LeftOut
) -> Iterator[PublishedStep]:
    """The rows that are valid on their own."""
    for number, line in _numbered_lines(file):
        row = _published_step(number, line)
        if isinstance(row, str):
            left_out.add(row, number)
            continue
        found, texts = row
        if not _is_label(found, vocab_size):
            left_out.add(LABEL, number)
        elif texts != [tokenizer.decode([token], skip_special_tokens=False) for token in found.token_ids]:
            left_out.add(TEXTS, number)
        elif found.kl < settings.beta:
            left_out.add(DIVERGENCE, number)
        else:
            yield found


def _published_step(number: int, line: bytes) -> tuple[PublishedStep, list[str]] | str:
    """A row and its `tokens`, or the reason to skip it."""
    try:
        fields = orjson.loads(line)
    except ValueError:
        return NOT_JSON
    if not isinstance(fields, dict):
        return NOT_JSON
    try:
        row = PublishedStep(
            line=number, question=fields["prompt_id"], step=fields["step"], prefix=fields["prefix"],
            token_ids=list(fields["token_ids"]), weights=[float(weight) for weight in fields["weights"]],
            kl=float(fields["kl_divergence"]),
        )  # fmt: skip
        texts = list(fields["tokens"])
    except (KeyError, TypeError, ValueError):
        return FIELDS
    right = (
        isinstance(row.question, str) and row.question.strip() and isinstance(row.prefix, str)
        and type(row.step) is int and row.step >= 1 and all(type(token) is int for token in row.token_ids)
        and math.isfinite(row.kl)
    )  # fmt: skip
    return (row, texts) if right else FIELDS


def _is_label(row: PublishedStep, vocab_size: int) -> bool:
    ids, weights = row.token_ids, row.weights
    return (
        len(ids) == len(weights) == len(set(ids)) > 0
        and all(0 <= token < vocab_size for token in ids)
        and all(weight >= 0 for weight in weights)  # false for NaN
        and abs(sum(weights) - 1.0) <= WEIGHT_SUM_ERROR
    )


def _sample(
    question: str, prompt: list[int], rows: list[PublishedStep], tokenizer: Tokenizer, left_out: LeftOut
) -> Sample | None:
    """The samples of a problem. `rows`: in the order of steps. The longest prefix that tokenises is the trajectory."""
    trajectory: list[int] | None = None
    kept: list[PublishedStep] = []
    for row in reversed(rows):
        if trajectory is None:
            ids = tokenizer.encode(row.prefix, add_special_tokens=False).ids
            if len(ids) != row.step or tokenizer.decode(ids, skip_special_tokens=False) != row.prefix:
                left_out.add(PREFIX_TOKENS, row.line)
                continue
            trajectory = ids
        elif tokenizer.decode(trajectory[: row.step], skip_special_tokens=False) != row.prefix:
            left_out.add(DEPARTS, row.line)
            continue
        kept.append(row)
    if trajectory is None:
        return None
    kept.reverse()
    heaviest = kept[-1].token_ids[int(np.argmax(kept[-1].weights))]
    sizes = [len(row.token_ids) for row in kept]
    weights = [np.array(row.weights) / sum(row.weights) for row in kept]
    return Sample(
        problem_id=_problem_id(question),
        sample_index=0,
        prompt_token_ids=np.array(prompt, np.int32),
        token_ids=np.array([*trajectory, heaviest], np.int32),
        contrast=Contrast(
            steps=np.array([row.step for row in kept], np.int32),
            kl_lower_bound=np.array([row.kl for row in kept], np.float32),
            covered_mass=np.ones(len(kept), np.float32),  # the published code uses the whole vocabulary
            mask_complete=np.ones(len(kept), bool),
            label_ids=np.concatenate([row.token_ids for row in kept]).astype(np.int32),
            label_weights=np.concatenate(weights).astype(np.float32),
            label_offsets=np.concatenate(([0], np.cumsum(sizes))).astype(np.int64),
            incomplete=0,
        ),
    )


def _problem_id(question: str) -> str:
    """The id that `client.problems.reader` gives to a question without an id: the same problem has the same id."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def _expert(folder: Path) -> ModelCard:
    """The expert's card, from its folder. Without weights, its model fingerprint is empty."""
    whole = any(folder.glob("*.safetensors"))
    config: dict[str, Any] = model_config(folder) if whole else {}
    text = config.get("text_config") or config
    return ModelCard(
        id=str(folder),
        created=int(time.time()),
        role="expert",
        vocab_size=int(text.get("vocab_size") or max(token_map(folder)[0]) + 1),
        max_model_len=int(text.get("max_position_embeddings") or 0),
        max_logprobs=0,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or UNKNOWN),
        model_fingerprint=model_fingerprint(folder) if whole else "",
        tokenizer_fingerprint=tokenizer_fingerprint(folder),
        chat_template_digest=chat_template_digest(folder),
    )


def _manifest(file: Path, expert: ModelCard, settings: ContrastSettings, day: str | None) -> RunManifest:
    amateur = expert.model_copy(
        update={
            "id": UNKNOWN, "role": "amateur", "vocab_size": 0, "max_model_len": 0, "dtype": UNKNOWN,
            "model_fingerprint": "", "tokenizer_fingerprint": "", "chat_template_digest": None,
        }
    )  # fmt: skip
    problems, digest = _identity(file)
    return RunManifest(
        format=1,
        created_at=int(time.time()),
        expert=expert,
        amateur=amateur,
        system_prompt=SYSTEM_PROMPT,
        chat_template_kwargs={},
        decoding=Decoding(),
        top_k=0,
        **settings.model_dump(),
        problems=problems,
        versions={"client": version("lightreasoner")},
        date=day,
        imported_from=str(file),
        imported_digest=digest,
    )


def _identity(file: Path) -> tuple[ProblemSetIdentity, str]:
    """The identity of the file's questions, and a digest of its lines. A separate pass: run.json is written first."""
    questions: set[str] = set()
    digest = hashlib.sha256()  # of the decompressed lines: the same for a gzipped copy
    for _, line in _numbered_lines(file):
        digest.update(line)
        try:
            questions.add(orjson.loads(line)["prompt_id"])
        except (ValueError, KeyError, TypeError):
            continue
    problems = ProblemSet({_problem_id(text): text for text in questions if text and isinstance(text, str)})
    return problems.identity(), digest.hexdigest()


def _totals(counts: Counter[str], first_step: int) -> RunTotals:
    """Totals over the steps up to the last kept step of each trajectory; the file does not have the others."""
    steps = counts["tokens"] - first_step * counts["trajectories"]
    return RunTotals(
        problems=counts["trajectories"],
        trajectories=counts["trajectories"],
        failed=0,
        tokens=counts["tokens"],
        steps=steps,
        kept=counts["kept"],
        kept_share=counts["kept"] / steps,
        incomplete=0,
        mean_plausible_set=counts["labelled"] / counts["kept"],
        mean_covered_mass=1.0,
        kl_quantiles={},
    )


def _numbered_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers from 1."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise RunError(f"{file} cannot be read: {error}; give the JSONL that the published sampling wrote") from None


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror}); give the expert's folder") from None
