"""A RUN in a bucket: what is written is what is read, under the names of the contract."""

import dataclasses
import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.runs.made_run import make_manifest, make_trajectory, tokenizer_json

from client.contrast import contrast
from client.errors import RunError
from client.problems.problem_set import ProblemSetIdentity
from client.protocol.requests import ContrastSettings, Failure
from client.report.compare import compare_runs
from client.report.page import report_page
from client.runs.build import build_run
from client.runs.run import Run
from client.runs.samples import sample_of, sampled_groups
from client.runs.tables import trajectory_table


@pytest.fixture
def run(tmp_path):
    run = Run(str(tmp_path / "run"))
    run.claim(make_manifest(), tokenizer_json())
    return run


@pytest.fixture
def trajectories():
    return [make_trajectory(f"p{index}", seed=index, tokens=3 + index) for index in range(6)]


def same(one, other):
    for name in type(one).__dataclass_fields__:
        a, b = getattr(one, name), getattr(other, name)
        if dataclasses.is_dataclass(a):
            same(a, b)
        elif isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
        else:
            assert a == b


def test_trajectories_and_samples_come_back_as_they_were(run, trajectories):
    run.write(trajectories[:4], {"p0": "How many?"}, run.manifest())
    run.write(trajectories[4:], {}, run.manifest())
    for one, other in zip(trajectories, run.trajectories(), strict=True):
        same(one, other)
    for one, other in zip(trajectories, run.samples(), strict=True):
        same(sample_of(one, run.manifest()), other)
    assert sum(len(sample.contrast.steps) for sample in run.samples()) > 5


def test_the_files_have_the_names_and_columns_of_the_contract(run, trajectories, tmp_path):
    run.write(trajectories, {"p0": "How many?"}, run.manifest())
    (name,) = run.parts("trajectories")
    assert run.parts("samples") == [name]
    table = pq.read_table(tmp_path / "run" / "trajectories" / f"{name}.parquet")
    assert table.column_names == [
        "problem_id", "sample_index", "question", "prompt_token_ids", "token_ids", "k", "top_ids",
        "expert_logprobs", "amateur_logprobs", "finish_reason",
    ]  # fmt: skip
    row = table.to_pylist()[0]
    assert row["question"] == "How many?" and row["k"] == 8 and len(row["top_ids"]) == 8 * len(row["token_ids"])
    table = pq.read_table(tmp_path / "run" / "samples" / f"{name}.parquet")
    assert table.column_names == [
        "problem_id", "sample_index", "prompt_token_ids", "token_ids", "incomplete", "steps", "kl_lower_bound",
        "covered_mass", "mask_complete", "label_ids", "label_weights",
    ]  # fmt: skip
    for row in table.to_pylist():
        assert len(row["steps"]) == len(row["label_ids"]) == len(row["label_weights"]) == len(row["mask_complete"])
        assert all(sum(weights) == pytest.approx(1) for weights in row["label_weights"])


def test_samples_are_a_pure_function_of_trajectories(run, trajectories, tmp_path):
    run.write(trajectories, {}, run.manifest())
    (name,) = run.parts("samples")
    file = tmp_path / "run" / "samples" / f"{name}.parquet"
    before = file.read_bytes()
    file.unlink()
    assert list(run.samples()) == []
    assert run.mend(run.manifest()) == 1 and run.mend(run.manifest()) == 0
    assert file.read_bytes() == before


def test_a_key_that_is_there_twice_is_read_once_from_the_first_part(run, trajectories):
    run.write(trajectories[:2], {}, run.manifest())
    other = make_trajectory("p1", seed=99, tokens=9)
    run.write([other, trajectories[2]], {}, run.manifest())
    assert [(t.problem_id, len(t.token_ids)) for t in run.trajectories()] == [("p0", 3), ("p1", 4), ("p2", 5)]
    assert [(s.problem_id, len(s.token_ids)) for s in run.samples()] == [("p0", 3), ("p1", 4), ("p2", 5)]
    assert run.keys() == {("p0", 0), ("p1", 0), ("p2", 0)}
    totals = run.totals(run.manifest())
    assert (totals.trajectories, totals.tokens, totals.steps) == (3, 3 + 4 + 5, 2 + 3 + 4)


def test_totals_count_what_a_plain_pass_counts(run, trajectories):
    run.write(trajectories, {}, run.manifest())
    run.write_failures(
        [Failure("gone", 0, "context_length_exceeded", "too long"), Failure("p0", 0, "x", "had after all")]
    )
    totals = run.totals(run.manifest())
    kept = [
        contrast(t.top_ids, t.expert_logprobs, t.amateur_logprobs, alpha=0.2, beta=0.4, first_step=1, vocab_size=50)
        for t in trajectories
    ]
    assert totals.trajectories == totals.problems == 6 and totals.failed == 1
    assert totals.tokens == sum(3 + index for index in range(6)) and totals.steps == totals.tokens - 6
    assert totals.kept == sum(len(k.steps) for k in kept) and totals.incomplete == sum(k.incomplete for k in kept)
    assert totals.mean_plausible_set == pytest.approx(sum(len(k.label_ids) for k in kept) / totals.kept)
    assert list(totals.kl_quantiles) == ["0.1", "0.5", "0.9", "0.99"]


def test_a_second_writer_with_other_settings_is_refused_with_every_difference_named(run):
    other = make_manifest(alpha=0.3, top_k=9)
    with pytest.raises(RunError) as caught:
        run.claim(other, b"{}")
    assert "alpha: 0.2 against 0.3" in str(caught.value) and "top_k: 8 against 9" in str(caught.value)
    run.claim(make_manifest(created_at=5, versions={"client": "9"}), b"{}")  # times and versions may differ


def test_differences_are_told_in_a_line_each_however_long_their_values_are():
    made = make_manifest(problems=ProblemSetIdentity(count=60, digest="a" * 64))
    more = make_manifest(problems=ProblemSetIdentity(count=1250, digest="b" * 64))
    assert made.differences(more) == [
        f"problems: 60 problems, digest {'a' * 12}… against 1,250 problems, digest {'b' * 12}…"
    ]
    expert = made.expert.model_copy(update={"model_fingerprint": "c" * 64, "chat_template_digest": None})
    assert made.differences(made.model_copy(update={"expert": expert})) == [
        "expert.chat_template_digest: c against None",
        f"expert.model_fingerprint: e against {'c' * 12}…",
    ]
    (line,) = made.differences(made.model_copy(update={"system_prompt": "x" * 100_000}))
    assert line == f"system_prompt: 'Please reason step by step.' against '{'x' * 79}…"


def test_long_texts_are_told_from_where_they_part():
    one, other = (make_manifest(system_prompt=f"{'x' * 50_000} {word} {'y' * 50_000}") for word in ("this", "that"))
    (line,) = one.differences(other)
    assert len(line) < 250 and re.search(r"system_prompt: …x+ this y+… against …x+ that y+…", line)


def test_another_model_is_another_run_but_another_path_is_not(run):
    expert = make_manifest().expert
    run.claim(make_manifest(expert=expert.model_copy(update={"id": "/elsewhere"})), b"{}")
    with pytest.raises(RunError, match=r"expert\.model_fingerprint"):
        run.claim(make_manifest(expert=expert.model_copy(update={"model_fingerprint": "ff"})), b"{}")


def test_a_missing_or_foreign_run_is_named(tmp_path):
    with pytest.raises(RunError, match=r"no RUN at .*nowhere"):
        Run(str(tmp_path / "nowhere")).manifest()
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "run.json").write_text('{"format": 2}')
    with pytest.raises(RunError, match=r"not a run\.json that this version reads: format"):
        Run(str(tmp_path)).manifest()


def test_a_damaged_part_is_named(run, trajectories, tmp_path):
    run.write(trajectories, {}, run.manifest())
    (name,) = run.parts("samples")
    file = tmp_path / "run" / "samples" / f"{name}.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(RunError, match=f"samples/{name}.parquet cannot be read"):
        list(run.samples())


def test_the_first_seal_stands(run):
    totals = run.totals(run.manifest())
    assert run.completion() is None
    run.seal(totals)
    run.seal(dataclasses.replace(totals, problems=99))
    assert run.completion().totals.problems == 0


def test_a_file_url_is_the_same_place(run, tmp_path):
    assert Run(f"file://{tmp_path}/run").manifest() == run.manifest()


def test_what_lies_deeper_or_is_named_otherwise_is_no_part(tmp_path):
    outer, inner = Run(str(tmp_path / "run")), Run(str(tmp_path / "run" / "failures" / "inner"))
    for run in (outer, inner):
        run.claim(make_manifest(), b"{}")
        run.write([make_trajectory(f"p{len(str(run))}", seed=1, tokens=3)], {}, make_manifest())
        run.write_failures([Failure("f", 0, "chat_template", "no")])
    for name in (
        "trajectories/part-x.txt",
        "trajectories/a/part-y.parquet",
        "samples/part-a/b.parquet",
        "failures/part-z.tmp",
        "samples/README",
    ):
        outer.bucket.put(name, b"not ours")
    assert [len(outer.parts(kind)) for kind in ("trajectories", "samples", "failures")] == [1, 1, 1]
    assert set(outer.failures()) == {("f", 0)} and len(outer.keys()) == 1
    copy = Run(str(tmp_path / "copy"))
    copy.copy_failures(outer)
    assert list(copy.bucket.names("failures")) == [f"failures/{outer.parts('failures')[0]}.jsonl"]


WHY = b'"error": {"type": "a", "detail": "b"}}'


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b'{"problem_id": "a", "sample_index": 0, "error": {}}',
        b"\xff",
        b'{"problem_id": [1], "sample_index": 0, ' + WHY,
        b'{"problem_id": "a", "sample_index": null, ' + WHY,
    ],
)
def test_a_damaged_part_of_failures_is_named(tmp_path, line):
    run = Run(str(tmp_path / "run"))
    run.bucket.put("failures/part-1.jsonl", line)
    with pytest.raises(
        RunError, match=r"failures/part-1.jsonl is damaged .*; move it out of the RUN, and complete.json where"
    ):
        run.failures()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("failed", "1", "failed: expected a whole number"),
        ("kept_share", None, "kept_share: expected a number"),
        ("kl_quantiles", [], "kl_quantiles: expected an object"),
        ("problems", ..., "problems: it is missing"),
        ("sealed_at", "today", "sealed_at: expected a whole number"),
    ],
)
def test_a_damaged_seal_is_named(run, tmp_path, field, value, said):
    run.seal(run.totals(run.manifest()))
    file = tmp_path / "run" / "complete.json"
    sealed = json.loads(file.read_bytes())
    sealed[field] = value
    file.write_text(json.dumps({name: value for name, value in sealed.items() if value is not ...}))
    with pytest.raises(
        RunError, match=rf"run/complete\.json is damaged \({said}.*\); move it out of the RUN, and sample again"
    ):
        run.completion()


# Rows whose values do not fit together: of all that reads a RUN, none may end in a traceback, or in wrong numbers.

DAMAGE = {
    "k of 0": ("trajectories", "k", lambda row: 0),
    "no k": ("trajectories", "k", lambda row: None),
    "too large a k": ("trajectories", "k", lambda row: row["k"] * 2),
    "no id": ("trajectories", "problem_id", lambda row: None),
    "a null among the top ids": ("trajectories", "top_ids", lambda row: [None, *row["top_ids"][1:]]),
    "a null among the log-probabilities": ("trajectories", "expert_logprobs", lambda row: [None] * len(row["top_ids"])),
    "fewer tokens than rows": ("trajectories", "token_ids", lambda row: row["token_ids"][:-1]),
    "fewer rows of one model": ("trajectories", "amateur_logprobs", lambda row: row["amateur_logprobs"][:-8]),
    "no tokens": ("trajectories", "token_ids", lambda row: None),
    "a log-probability that is NaN": (
        "trajectories", "expert_logprobs", lambda row: [float("nan"), *row["expert_logprobs"][1:]],
    ),
    "an infinite log-probability": (
        "trajectories", "amateur_logprobs", lambda row: [float("inf"), *row["amateur_logprobs"][1:]],
    ),
    "a probability above 1": ("trajectories", "expert_logprobs", lambda row: [3.0, *row["expert_logprobs"][1:]]),
    "a negative token": ("trajectories", "token_ids", lambda row: [-1, *row["token_ids"][1:]]),
    "a negative prompt token": ("trajectories", "prompt_token_ids", lambda row: [-1]),
    "a negative sample index": ("trajectories", "sample_index", lambda row: -1),
    "an unknown end": ("trajectories", "finish_reason", lambda row: "bored"),
    "no steps": ("samples", "steps", lambda row: None),
    "no sample index": ("samples", "sample_index", lambda row: None),
    "fewer steps than labels": ("samples", "steps", lambda row: row["steps"][:-1]),
    "fewer labels than steps": ("samples", "label_ids", lambda row: row["label_ids"][:-1]),
    "labels of other sizes": ("samples", "label_weights", lambda row: [[1.0]] * (len(row["steps"]) - 1) + [[0.2] * 5]),
    "a null among the weights": (
        "samples",
        "label_weights",
        lambda row: [[None] * len(w) for w in row["label_weights"]],
    ),
}  # fmt: skip


OF_TRAJECTORIES = [name for name, (kind, *_) in DAMAGE.items() if kind == "trajectories"]


@pytest.fixture(params=list(DAMAGE))
def damaged(request, run, trajectories, tmp_path):
    """A RUN with one value of its last row spoilt; the part's name, and the RUN."""
    kind, column, spoil = DAMAGE[request.param]
    run.write(trajectories, {}, run.manifest())
    file = tmp_path / "run" / kind / f"{run.parts(kind)[0]}.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[-1][column] = spoil(rows[-1])
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)
    return f"{kind}/{file.name}", run


def test_a_row_that_does_not_fit_is_named_by_its_file(damaged):
    name, run = damaged
    with pytest.raises(RunError, match=rf"run/{name} cannot be read \(.*; move it out of the RUN, and complete\.json"):
        list(run.trajectories() if name.startswith("trajectories") else run.samples())


@pytest.mark.parametrize("damaged", ["no id", "a negative sample index"], indirect=True)
def test_a_key_that_is_none_is_named_by_its_file(damaged):
    name, run = damaged
    with pytest.raises(RunError, match=rf"run/{name} cannot be read"):
        run.keys()


@pytest.mark.parametrize("damaged", OF_TRAJECTORIES, indirect=True)
@pytest.mark.parametrize("command", ["build", "report", "compare"])
def test_commands_name_the_damaged_part(damaged, command, tmp_path):
    name, run = damaged
    calls = {
        "build": lambda: build_run(run, Run(str(tmp_path / "new")), ContrastSettings()),
        "report": lambda: report_page(run),
        "compare": lambda: compare_runs([run, run]),
    }
    with pytest.raises(RunError, match=f"run/{name} cannot be read"):
        calls[command]()


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_shift": 0.0}, {"max_shift": 1e-12}, {"max_shift": 0.05}, {"labels": "tilt"}, {"labels": "onehot"},
     {"select": "random"}, {"keep_incomplete": True}],
    ids=str,
)  # fmt: skip
def test_a_trajectory_has_the_same_samples_whatever_group_it_is_in(settings):
    """Bit by bit, also beside trajectories with larger plausible sets and with another top k."""
    sizes = [(index % 7 + 2, 20 if index < 25 else 8) for index in range(40)]
    trajectories = [make_trajectory(f"p{index}", index, *size) for index, size in enumerate(sizes)]
    manifest = make_manifest(beta=0.05, alpha=0.02, **settings)
    together = [sample for group in sampled_groups(trajectories, manifest) for sample in group.samples]
    for trajectory, sample in zip(trajectories, together, strict=True):
        same(sample_of(trajectory, manifest), sample)


def test_a_part_without_rows_is_read(run, trajectories):
    run.write(trajectories, {}, run.manifest())
    (part,) = run.parts("trajectories")
    file = io.BytesIO()
    pq.write_table(trajectory_table([], {}), file)
    run.bucket.put(f"trajectories/{part.replace('part-', 'part-0')}.parquet", file.getvalue())
    run.mend(run.manifest())
    assert len(run.parts("samples")) == 2 and len(list(run.samples())) == len(trajectories)
