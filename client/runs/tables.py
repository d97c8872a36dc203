"""The bucket contract in values: run.json, the two Parquet tables, and the pure function between them.

In: trajectories. Out: samples, and Arrow tables of both that `client.runs.run` stores. No I/O here.
The key of a row is (problem_id, sample_index).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from client.contrast import Contrast, contrast
from client.errors import cut
from client.protocol.requests import ContrastSettings, Decoding, ModelCard, Trajectory, fault_of

INTS, FLOATS, BOOLS = pa.list_(pa.int32()), pa.list_(pa.float32()), pa.list_(pa.bool_())
TRAJECTORY_SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("sample_index", pa.int32()),
        ("question", pa.string()),
        ("prompt_token_ids", INTS),  # [P]
        ("token_ids", INTS),  # [T], the stop token included
        ("k", pa.int32()),
        ("top_ids", INTS),  # [T * k], row-major, as the next two
        ("expert_logprobs", FLOATS),
        ("amateur_logprobs", FLOATS),  # -inf: unknown to the amateur
        ("finish_reason", pa.string()),
    ]
)
SAMPLE_SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("sample_index", pa.int32()),
        ("prompt_token_ids", INTS),  # [P]
        ("token_ids", INTS),  # [T]
        ("incomplete", pa.int32()),
        ("steps", INTS),  # [n], indices into token_ids
        ("kl_lower_bound", FLOATS),  # [n], nats
        ("covered_mass", FLOATS),  # [n]
        ("mask_complete", BOOLS),  # [n]
        ("label_ids", pa.list_(INTS)),  # [n][plausible set]
        ("label_weights", pa.list_(FLOATS)),  # [n][plausible set], each summing to 1
    ]
)


DIGEST_SHOWN = 12
"""Characters of a digest in a message: enough to find it in a run.json."""
TEXT_SHOWN = 80
"""Characters of another value, of a system prompt for one."""
ALIKE_SHOWN = 20
"""Of what two long values have in common, before the place where they part."""


class Frozen(BaseModel):
    """Base of what run.json is made of."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ProblemSetIdentity(Frozen):
    """How many problems a RUN is of, and a SHA-256 over them (`client.problems.reader.identity`)."""

    count: int
    digest: str

    def __str__(self) -> str:
        return f"{self.count:,} problem{'' if self.count == 1 else 's'}, digest {cut(self.digest, DIGEST_SHOWN)}"


class RunManifest(ContrastSettings, Frozen):
    """run.json: what made a RUN, the settings of the contrast among it.

    A second writer must agree with it in all that `identity` names.
    """

    format: int = Field(1, ge=1, le=1)
    created_at: int
    expert: ModelCard
    amateur: ModelCard
    system_prompt: str | None
    chat_template_kwargs: dict[str, Any]
    decoding: Decoding
    top_k: int
    problems: ProblemSetIdentity
    versions: dict[str, str]
    built_from: str | None = None  # the RUN whose trajectories these are
    imported_from: str | None = None  # the file whose samples these are; such a RUN has no trajectories
    imported_digest: str | None = None  # SHA-256 of that file's lines; RUNs imported by early versions lack it

    def identity(self) -> dict[str, Any]:
        """What must agree between two writers: dotted name -> value. Models count by fingerprint, not by path."""
        named = {
            "system_prompt": self.system_prompt,
            "chat_template_kwargs": self.chat_template_kwargs,
            "top_k": self.top_k,
            "expert.chat_template_digest": self.expert.chat_template_digest,
            "imported_digest": self.imported_digest,
        }
        for role, card in (("expert", self.expert), ("amateur", self.amateur)):
            for field in ("model_fingerprint", "tokenizer_fingerprint", "dtype"):
                named[f"{role}.{field}"] = getattr(card, field)
        named |= {field: getattr(self, field) for field in ContrastSettings.model_fields}
        for section in ("decoding", "problems"):
            for field, value in getattr(self, section).model_dump().items():
                named[f"{section}.{field}"] = value
        return named

    def differences(self, other: RunManifest) -> list[str]:
        """Where `other` differs, each as 'name: this against that'; a problem set is one thing, long values are cut."""
        mine, theirs = self.identity(), other.identity()
        different = [name for name in mine if mine[name] != theirs[name] and not name.startswith("problems.")]
        lines = [f"{name}: {_against(name, mine[name], theirs[name])}" for name in different]
        if self.problems != other.problems:
            lines.append(f"problems: {self.problems} against {other.problems}")
        return lines


def _against(name: str, mine: Any, theirs: Any) -> str:
    """Two values that differ; long ones from shortly before the place where they part."""
    if name.endswith(("digest", "fingerprint")):
        return " against ".join(cut(value, DIGEST_SHOWN) if value else repr(value) for value in (mine, theirs))
    texts = repr(mine), repr(theirs)
    alike = next((index for index, (a, b) in enumerate(zip_longest(*texts)) if a != b), 0)
    begin = max(alike - ALIKE_SHOWN, 0) if max(map(len, texts)) > TEXT_SHOWN else 0
    return " against ".join(("…" if begin else "") + cut(text[begin:], TEXT_SHOWN) for text in texts)


@dataclass(frozen=True)
class Sample:
    """A trajectory with its contrast samples, as a trainer wants it. Step t is predicted at position P + t - 1."""

    problem_id: str
    sample_index: int
    prompt_token_ids: npt.NDArray[np.int32]  # [P]
    token_ids: npt.NDArray[np.int32]  # [T]
    contrast: Contrast


def sample_of(trajectory: Trajectory, manifest: RunManifest) -> Sample:
    """The samples of a trajectory under a RUN's settings: pure, so they can be made again at any time.

    A random selection is drawn by (select_seed, problem_id, sample_index), whatever part or order a trajectory is in.
    """
    drawn_by = orjson.dumps([manifest.select_seed, trajectory.problem_id, trajectory.sample_index])
    return Sample(
        problem_id=trajectory.problem_id,
        sample_index=trajectory.sample_index,
        prompt_token_ids=trajectory.prompt_token_ids,
        token_ids=trajectory.token_ids,
        contrast=contrast(
            trajectory.top_ids,
            trajectory.expert_logprobs,
            trajectory.amateur_logprobs,
            alpha=manifest.alpha,
            beta=manifest.beta,
            first_step=manifest.first_step,
            vocab_size=manifest.expert.vocab_size,
            keep_incomplete=manifest.keep_incomplete,
            select=manifest.select,
            labels=manifest.labels,
            token_ids=trajectory.token_ids,
            seed=int.from_bytes(hashlib.sha256(drawn_by).digest()[:16], "little"),
        ),
    )


def trajectory_table(trajectories: Sequence[Trajectory], questions: dict[str, str | None]) -> pa.Table:
    """A row a trajectory (`TRAJECTORY_SCHEMA`); `questions` by problem_id."""

    def column(name: str) -> list[Any]:
        return [getattr(trajectory, name) for trajectory in trajectories]

    def ragged(name: str, dtype: type[np.generic]) -> pa.ListArray:
        return _to_lists([array.ravel() for array in column(name)], dtype)

    return pa.table(
        [
            pa.array(column("problem_id"), pa.string()),
            pa.array(column("sample_index"), pa.int32()),
            pa.array([questions.get(trajectory.problem_id) for trajectory in trajectories], pa.string()),
            ragged("prompt_token_ids", np.int32),
            ragged("token_ids", np.int32),
            pa.array([trajectory.top_ids.shape[1] for trajectory in trajectories], pa.int32()),
            ragged("top_ids", np.int32),
            ragged("expert_logprobs", np.float32),
            ragged("amateur_logprobs", np.float32),
            pa.array(column("finish_reason"), pa.string()),
        ],
        schema=TRAJECTORY_SCHEMA,
    )


def check_no_nulls(table: pa.Table) -> None:
    """Raises ValueError naming the column that lacks a value; only a question may."""
    for name in table.column_names:
        values = table[name].combine_chunks()
        nulls = 0 if name == "question" else values.null_count
        while pa.types.is_list(values.type):
            values = values.flatten()
            nulls += values.null_count
        if nulls:
            raise ValueError(f"column {name!r} lacks {nulls} values")


def trajectories_in(table: pa.Table) -> list[Trajectory]:
    """The rows of a trajectories table without nulls, as values over its buffers.

    Raises ValueError naming the row that can be no trajectory.
    """
    arrays = {name: _from_lists(table[name]) for name in Trajectory.ARRAYS}
    scalars = table.select(["problem_id", "sample_index", "k", "finish_reason"]).to_pylist()
    for index, row in enumerate(scalars):
        tokens, values = len(arrays["token_ids"][index]), {len(arrays[name][index]) for name in Trajectory.ARRAYS[2:]}
        if row["k"] < 1 or values != {tokens * row["k"]}:
            raise ValueError(
                f"row {index}, problem {row['problem_id']!r}: {tokens} tokens with k {row['k']}, but "
                f"{' or '.join(map(str, sorted(values)))} values"
            )
    trajectories = [
        Trajectory(
            problem_id=row["problem_id"],
            sample_index=row["sample_index"],
            prompt_token_ids=arrays["prompt_token_ids"][index],
            token_ids=arrays["token_ids"][index],
            top_ids=arrays["top_ids"][index].reshape(-1, row["k"]),
            expert_logprobs=arrays["expert_logprobs"][index].reshape(-1, row["k"]),
            amateur_logprobs=arrays["amateur_logprobs"][index].reshape(-1, row["k"]),
            finish_reason=row["finish_reason"],
        )
        for index, row in enumerate(scalars)
    ]
    for index, trajectory in enumerate(trajectories):
        if fault := fault_of(trajectory):
            raise ValueError(f"row {index}, problem {trajectory.problem_id!r}: {fault}")
    return trajectories


def sample_table(samples: Sequence[Sample]) -> pa.Table:
    """A row a trajectory (`SAMPLE_SCHEMA`)."""
    kept = [sample.contrast for sample in samples]
    steps = _to_lists([contrast.steps for contrast in kept], np.int32)

    def labels(values: list[npt.NDArray[Any]], dtype: type[np.generic]) -> pa.ListArray:
        inner = _to_lists(
            [values[i][a:b] for i, contrast in enumerate(kept) for a, b in pairwise(contrast.label_offsets)], dtype
        )
        return pa.ListArray.from_arrays(steps.offsets, inner)

    return pa.table(
        [
            pa.array([sample.problem_id for sample in samples], pa.string()),
            pa.array([sample.sample_index for sample in samples], pa.int32()),
            _to_lists([sample.prompt_token_ids for sample in samples], np.int32),
            _to_lists([sample.token_ids for sample in samples], np.int32),
            pa.array([contrast.incomplete for contrast in kept], pa.int32()),
            steps,
            _to_lists([contrast.kl_lower_bound for contrast in kept], np.float32),
            _to_lists([contrast.covered_mass for contrast in kept], np.float32),
            _to_lists([contrast.mask_complete for contrast in kept], np.bool_),
            labels([contrast.label_ids for contrast in kept], np.int32),
            labels([contrast.label_weights for contrast in kept], np.float32),
        ],
        schema=SAMPLE_SCHEMA,
    )


def samples_in(table: pa.Table) -> list[Sample]:
    """The rows of a samples table without nulls, as values over its buffers.

    Raises ValueError naming the row whose arrays do not fit together.
    """
    plain = {
        name: _from_lists(table[name])
        for name in ("prompt_token_ids", "token_ids", "steps", "kl_lower_bound", "covered_mass", "mask_complete")
    }
    ids, weights = table["label_ids"].combine_chunks(), table["label_weights"].combine_chunks()
    flat_ids, flat_weights = ids.values.values.to_numpy(), weights.values.values.to_numpy()
    outer, inner = ids.offsets.to_numpy(), ids.values.offsets.to_numpy()
    if not (weights.offsets.equals(ids.offsets) and weights.values.offsets.equals(ids.values.offsets)):
        raise ValueError("label_ids and label_weights do not fit together")
    scalars = table.select(["problem_id", "sample_index", "incomplete"]).to_pylist()
    samples = []
    for index, row in enumerate(scalars):
        offsets = inner[outer[index] : outer[index + 1] + 1].astype(np.int64)
        begin, end = offsets[0], offsets[-1]
        steps = plain["steps"][index]
        of_steps = {len(plain[name][index]) for name in ("kl_lower_bound", "covered_mass", "mask_complete")}
        if of_steps | {len(offsets) - 1} != {len(steps)}:
            raise ValueError(f"row {index}, problem {row['problem_id']!r}: its {len(steps)} steps do not fit the rest")
        kept = Contrast(
            steps=steps,
            kl_lower_bound=plain["kl_lower_bound"][index],
            covered_mass=plain["covered_mass"][index],
            mask_complete=plain["mask_complete"][index],
            label_ids=flat_ids[begin:end],
            label_weights=flat_weights[begin:end],
            label_offsets=offsets - begin,
            incomplete=row["incomplete"],
        )
        tokens = plain["prompt_token_ids"][index], plain["token_ids"][index]
        samples.append(Sample(row["problem_id"], row["sample_index"], *tokens, kept))
    return samples


def _to_lists(arrays: Sequence[npt.NDArray[Any]], dtype: type[np.generic]) -> pa.ListArray:
    offsets = np.concatenate(([0], np.cumsum([len(array) for array in arrays], dtype=np.int64)))
    values = np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype, copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def _from_lists(column: pa.ChunkedArray) -> list[npt.NDArray[Any]]:
    array = column.combine_chunks()
    values = array.values.to_numpy(zero_copy_only=False)
    return [values[a:b] for a, b in pairwise(array.offsets.to_numpy())]
