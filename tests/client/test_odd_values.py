"""Values in a RUN that no run of ours writes: each is a clear error or is shown safely, by every reader."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.runs.reported import make_run, trajectories_of
from typer.testing import CliRunner

from client.__main__ import program
from client.errors import RunError, clean_lines
from client.report.compare import compare_runs
from client.report.page import report_page
from client.runs.run import Run

FORGED = "\x1b[31m\u202eFORGED\nerror: all is well"


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path / "run", trajectories_of(3))
    run.seal(run.totals(run.manifest()))
    return run


def with_json(run, name, value, *path):
    file = Path(f"{run}/{name}")
    whole = inner = json.loads(file.read_text())
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    file.write_text(json.dumps(whole))


def with_column(run, kind, name, change):
    (part,) = run.parts(kind)
    file = f"{run}/{kind}/{part}.parquet"
    table = pq.read_table(file)
    column = pa.array([change(value) for value in table[name].to_pylist()])
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, column), file)


def readers(run):
    """Everything that reads a RUN's trajectories."""
    again = Run(str(run))
    return {
        "report": lambda: report_page(again),
        "compare": lambda: compare_runs([again, again]),
        "trajectories": lambda: list(again.trajectories()),
        "tally": lambda: again.totals(again.manifest()),
    }


@pytest.mark.parametrize(
    ("value", "path", "said"),
    [
        (2**62, ("expert", "vocab_size"), r"expert\.vocab_size: expected at most"),
        (0, ("expert", "vocab_size"), r"expert\.vocab_size is 0"),
        (0, ("amateur", "vocab_size"), r"amateur\.vocab_size is 0"),
        (2**62, ("created_at",), "created_at: expected less than"),
        (-1, ("created_at",), "created_at: expected at least"),
        (1, (FORGED,), r"\\x1b\[31m\\u202eFORGED error: all is well: no such field"),
    ],
)
def test_a_setting_beyond_all_bounds_is_named_on_one_line(run, value, path, said):
    with_json(run, "run.json", value, *path)
    for read in readers(run).values():
        with pytest.raises(RunError, match=said) as error:
            read()
        assert clean_lines(str(error.value)) == str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("expert_logprobs", lambda values: list(map(str, values)), "'expert_logprobs' holds string, expected float"),
        ("sample_index", str, "'sample_index' holds string, expected int32"),
        ("problem_id", lambda text: int(text[1:]), "'problem_id' holds int64, expected string"),
        ("sample_index", lambda index: 2**31 - 1, "its sample_index is 2147483647"),
        ("token_ids", lambda ids: [*ids[:-1], 50], "token 50 is beyond the expert's 50 columns"),
        ("prompt_token_ids", lambda ids: [2**30], "token 1073741824 is beyond the expert's 50 columns"),
        ("top_ids", lambda ids: [*range(1000, 1000 + len(ids))], "token 10.. is beyond the expert's 50 columns"),
    ],
)
def test_a_part_with_values_of_no_model_is_named_by_every_reader(run, name, change, said):
    with_column(run, "trajectories", name, change)
    for read in readers(run).values():
        with pytest.raises(
            RunError, match=rf"(run is damaged: problem 'p0': |trajectories/part-.*parquet cannot be read \(.*){said}"
        ):
            read()


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("steps", lambda steps: [10**6] * len(steps), r"its steps are not ascending within its \d+ tokens"),
        ("steps", lambda steps: [-1] * len(steps), "its steps are not ascending"),
        ("label_ids", lambda ids: [[50] * len(label) for label in ids], "not within the expert's 50 columns"),
        ("label_weights", lambda w: [[float("nan")] * len(label) for label in w], "negative or not finite"),
        ("sample_index", lambda index: 2**31 - 1, "its sample_index is 2147483647"),
    ],
)
def test_samples_that_no_contrast_gives_are_named(run, name, change, said):
    with_column(run, "samples", name, change)
    for read in (lambda: list(Run(str(run)).samples()), lambda: Run(str(run)).samples_of(run.parts("samples")[0])):
        with pytest.raises(RunError, match=said):
            read()


def test_what_others_wrote_is_cleaned_on_the_page_and_on_the_terminal(run, tmp_path):
    for path in (("expert", "id"), ("amateur", "id"), ("system_prompt",), ("date",), ("versions", "client")):
        with_json(run, "run.json", FORGED, *path)
    with_column(run, "trajectories", "question", lambda _: FORGED)
    run.write_evaluation(
        "base", json.dumps({"benchmarks": {FORGED: {"n": 1, "accuracy": 1, "interval": [0, 1]}}}).encode()
    )
    page = report_page(run)
    assert "FORGED" in page and not {"\x1b", "\u202e"} & set(page)
    new = tmp_path / "new"
    for words in (["compare", run, run], ["build", run, new], ["build", run, new]):
        result = CliRunner().invoke(program, list(map(str, words)), env={"COLUMNS": "200"})
        assert result.exit_code == 0 and not {"\x1b", "\u202e"} & set(result.output)
        assert not any(line.startswith("error: all is well") for line in result.output.splitlines())
        if new.exists():
            with_json(new, "complete.json", 0.5, "kl_quantiles", FORGED)
