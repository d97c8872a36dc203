"""The two Parquet tables of a RUN: their schemas, and conversion between values and Arrow tables.

In: trajectories and samples, or Arrow tables. Out: the other. No I/O. The key of a row is (problem_id, sample_index).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from client.contrast import Contrast
from client.protocol.requests import LARGEST_ID, MAX_SAMPLES, Trajectory, fault_of
from client.runs.samples import Sample

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


def trajectory_table(trajectories: Sequence[Trajectory], questions: dict[str, str | None]) -> pa.Table:
    """One row per trajectory (`TRAJECTORY_SCHEMA`). `questions`: by problem_id."""

    def column(name: str) -> list[Any]:
        return [getattr(trajectory, name) for trajectory in trajectories]

    def ragged(name: str, dtype: type[np.generic]) -> pa.Array:
        return _to_lists([array.ravel() for array in column(name)], dtype)

    return pa.Table.from_arrays(
        [
            _to_texts(column("problem_id")),
            _to_numbers(np.array(column("sample_index"), np.int32)),
            _to_texts([questions.get(trajectory.problem_id) for trajectory in trajectories]),
            ragged("prompt_token_ids", np.int32),
            ragged("token_ids", np.int32),
            _to_numbers(np.array([trajectory.top_ids.shape[1] for trajectory in trajectories], np.int32)),
            ragged("top_ids", np.int32),
            ragged("expert_logprobs", np.float32),
            ragged("amateur_logprobs", np.float32),
            _to_texts(column("finish_reason")),
        ],
        schema=TRAJECTORY_SCHEMA,
    )


def check_kinds(table: pa.Table, schema: pa.Schema) -> None:
    """Raises ValueError, naming the column, if it holds strings in place of numbers, or numbers in place of strings.

    A cast would convert them silently.
    """
    for field in schema:
        found, wanted = table.schema.field(field.name).type, field.type
        found = found.value_type if pa.types.is_dictionary(found) else found
        while pa.types.is_list(wanted):
            if not (pa.types.is_list(found) or pa.types.is_large_list(found)):
                break
            found, wanted = found.value_type, wanted.value_type
        texts = [pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in (found, wanted)]
        if texts[0] != texts[1]:
            raise ValueError(f"column {field.name!r} holds {found}, expected {wanted}")


def check_no_nulls(table: pa.Table) -> None:
    """Raises ValueError, naming the column, if a value is missing. Only questions may be missing."""
    for name in table.column_names:
        values = table[name].combine_chunks()
        nulls = 0 if name == "question" else values.null_count
        while pa.types.is_list(values.type):
            values = values.flatten()
            nulls += values.null_count
        if nulls:
            raise ValueError(f"column {name!r} lacks {nulls} values")


def check_sample_indices(table: pa.Table) -> None:
    """Raises ValueError if an index is out of range: a set of keys takes memory in proportion to the largest."""
    indices = _numbers_of(table["sample_index"].combine_chunks())
    if indices.size and not 0 <= (odd := max(indices.min(), indices.max(), key=abs)) < MAX_SAMPLES:
        (index, *_) = np.flatnonzero(indices == odd)
        problem_id = table["problem_id"][int(index)].as_py()
        raise ValueError(f"row {index}, problem {problem_id!r:.200}: its sample_index is {odd}")


def trajectories_in(table: pa.Table) -> list[Trajectory]:
    """The trajectories of a table without nulls. Their arrays are views of its buffers.

    Raises ValueError, naming the row, for an invalid trajectory.
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
    """One row per trajectory (`SAMPLE_SCHEMA`)."""
    kept = [sample.contrast for sample in samples]
    step_counts = np.array([len(contrast.steps) for contrast in kept])
    label_counts = [np.diff(contrast.label_offsets) for contrast in kept]

    def labels(values: list[npt.NDArray[Any]], dtype: type[np.generic]) -> pa.Array:
        counts = np.concatenate([np.empty(0, np.int64), *label_counts])
        return _lists_of(step_counts, _lists_of(counts, _to_numbers(_joined(values, dtype))))

    return pa.Table.from_arrays(
        [
            _to_texts([sample.problem_id for sample in samples]),
            _to_numbers(np.array([sample.sample_index for sample in samples], np.int32)),
            _to_lists([sample.prompt_token_ids for sample in samples], np.int32),
            _to_lists([sample.token_ids for sample in samples], np.int32),
            _to_numbers(np.array([contrast.incomplete for contrast in kept], np.int32)),
            _to_lists([contrast.steps for contrast in kept], np.int32),
            _to_lists([contrast.kl_lower_bound for contrast in kept], np.float32),
            _to_lists([contrast.covered_mass for contrast in kept], np.float32),
            _to_lists([contrast.mask_complete for contrast in kept], np.bool_),
            labels([contrast.label_ids for contrast in kept], np.int32),
            labels([contrast.label_weights for contrast in kept], np.float32),
        ],
        schema=SAMPLE_SCHEMA,
    )


def samples_in(table: pa.Table, vocab_size: int | None = None) -> list[Sample]:
    """The samples of a table without nulls. Their arrays are views of its buffers. `vocab_size`: of the expert's head.

    Raises ValueError, naming the row, if its arrays have different lengths, or values that no contrast produces.
    """
    plain = {
        name: _from_lists(table[name])
        for name in ("prompt_token_ids", "token_ids", "steps", "kl_lower_bound", "covered_mass", "mask_complete")
    }
    ids, weights = table["label_ids"].combine_chunks(), table["label_weights"].combine_chunks()
    flat_ids, flat_weights = _numbers_of(ids.values.values), _numbers_of(weights.values.values)
    outer, inner = _numbers_of(ids.offsets), _numbers_of(ids.values.offsets)
    if not (weights.offsets.equals(ids.offsets) and weights.values.offsets.equals(ids.values.offsets)):
        raise ValueError("label_ids and label_weights have different lengths")
    scalars = table.select(["problem_id", "sample_index", "incomplete"]).to_pylist()
    samples = []
    for index, row in enumerate(scalars):
        offsets = inner[outer[index] : outer[index + 1] + 1].astype(np.int64)
        begin, end = offsets[0], offsets[-1]
        steps = plain["steps"][index]
        of_steps = {len(plain[name][index]) for name in ("kl_lower_bound", "covered_mass", "mask_complete")}
        if of_steps | {len(offsets) - 1} != {len(steps)}:
            raise ValueError(
                f"row {index}, problem {row['problem_id']!r}: its {len(steps)} steps do not fit its columns"
            )
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
        if fault := _fault_of_sample(kept, tokens, vocab_size or LARGEST_ID + 1):
            raise ValueError(f"row {index}, problem {row['problem_id']!r:.200}: {fault}")
        samples.append(Sample(row["problem_id"], row["sample_index"], *tokens, kept))
    return samples


def _fault_of_sample(kept: Contrast, tokens: Sequence[npt.NDArray[np.int32]], vocab_size: int) -> str | None:
    """Why a row of samples is invalid; None if it is valid."""
    steps = kept.steps
    if len(steps) and not (steps[0] >= 0 and steps[-1] < len(tokens[1]) and (np.diff(steps) > 0).all()):
        return f"its steps are not ascending within its {len(tokens[1])} tokens"
    for ids in (*tokens, kept.label_ids):
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
            return f"a token id is not within the expert's {vocab_size:,} columns"
    if not (kept.label_weights >= 0).all() or not np.isfinite(kept.label_weights).all():
        return "a label's weight is negative or not finite"
    return None


# Arrays are converted through their buffers: pa.array and to_numpy would import pandas, if it is installed, which takes
# a second and 40 MB.


def _to_lists(arrays: Sequence[npt.NDArray[Any]], dtype: type[np.generic]) -> pa.Array:
    return _lists_of(np.array([len(array) for array in arrays]), _to_numbers(_joined(arrays, dtype)))


def _lists_of(counts: npt.NDArray[np.integer], values: pa.Array) -> pa.Array:
    """Split values into lists of `counts` values each."""
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    return pa.Array.from_buffers(pa.list_(values.type), len(counts), [None, pa.py_buffer(offsets)], children=[values])


def _joined(arrays: Sequence[npt.NDArray[Any]], dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype, copy=False)


def _to_numbers(values: npt.NDArray[Any]) -> pa.Array:
    bits = np.packbits(values, bitorder="little") if values.dtype == np.bool_ else values
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(bits)])


def _to_texts(texts: Sequence[str | None]) -> pa.Array:
    data = [(text or "").encode() for text in texts]
    offsets = np.concatenate(([0], np.cumsum([len(text) for text in data]))).astype(np.int32)
    there = np.packbits(np.array([text is not None for text in texts], np.bool_), bitorder="little")
    buffers = [pa.py_buffer(there), pa.py_buffer(offsets), pa.py_buffer(b"".join(data))]
    return pa.Array.from_buffers(pa.string(), len(data), buffers)


def _from_lists(column: pa.ChunkedArray) -> list[npt.NDArray[Any]]:
    array = column.combine_chunks()
    values = _numbers_of(array.values)
    return [values[a:b] for a, b in pairwise(_numbers_of(array.offsets))]


def _numbers_of(array: pa.Array) -> npt.NDArray[Any]:
    """The values of an array of numbers or booleans without nulls. Numbers are a view, and must not be written to."""
    whole, buffer = slice(array.offset, array.offset + len(array)), array.buffers()[1]
    if buffer is None:
        return np.empty(0, array.type.to_pandas_dtype())
    if pa.types.is_boolean(array.type):
        return np.unpackbits(np.frombuffer(buffer, np.uint8), bitorder="little")[whole].astype(np.bool_)
    return np.frombuffer(buffer, array.type.to_pandas_dtype(), count=whole.stop)[whole]
