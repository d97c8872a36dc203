"""What the report says of evaluations: whose accuracy it is, and whether it is of the training that the charts show."""

import json
import re

import pytest
from support.runs.reported import SCORE, TWO, make_run, trajectories_of

from client.report.findings import gather
from client.report.page import report_page

BASE = SCORE | {"correct": 110, "accuracy": 0.55, "interval": [0.5, 0.6]}
TILT, OTHER = (TWO | {"before": None, "accuracy": accuracy} for accuracy in (0.71, 0.77))
MINE = {"run": "runs/tilt", "of_this_run": True, "training_id": "one", "objective": "contrast", "step": 40}
FOREIGN = {"run": "runs/first", "of_this_run": False, "training_id": "two", "objective": "contrast", "step": 9}
UNKNOWN = dict.fromkeys(MINE)
TRAINING = {"training_id": "one", "adapter": "out/tilt", "objective": "contrast", "optimizer_steps": 40}
ANOTHER = "is of another training than the charts"


@pytest.fixture
def run(tmp_path):
    """A RUN on which something was trained: it has a loss curve."""
    run = make_run(tmp_path / "run", trajectories_of(3))
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 30)]
    run.bucket.put("training/metrics.jsonl", b"\n".join(json.dumps(line).encode() for line in lines))
    return run


def evaluated(run, origins, name="results", **more):
    """Write an evaluation of two adapters, `tilt` first; `origins`: as `evaluate --run` writes them."""
    models = {"base": {"gsm8k": BASE}, "tilt": {"gsm8k": TILT}, "other": {"gsm8k": OTHER}}
    body = {"benchmarks": {"gsm8k": OTHER | {"before": BASE}}, "models": models, **more}
    run.write_evaluation(name, json.dumps(body if origins is None else body | {"origins": origins}).encode())


def trained(run, **changes):
    run.bucket.put("training/training.json", json.dumps(TRAINING | {"adapter_step": 40} | changes).encode())


def parts(run):
    """The top of the page and the rest, as text without markup."""
    return (" ".join(re.sub("<[^>]*>", "", part).split()) for part in report_page(run).split("<main>"))


def test_the_headline_is_of_the_adapter_that_was_trained_on_this_run_and_each_adapter_has_a_row(run):
    evaluated(run, {"tilt": MINE, "other": FOREIGN})
    top, rest = parts(run)
    assert "gsm8k: 55.0% before training, 71.0% after, with tilt (p 0.012)." in top and "77.0%" not in top
    for row in ("gsm8k with tilt step 40, evaluation/results.json", "gsm8k with other step 9, evaluation/res"):
        assert row in rest
    assert "71.0% [68.0%" in rest and "77.0% [68.0%" in rest
    found = gather(run).benchmarks
    assert [(row.adapter, row.accuracy[0], row.before[0]) for row in found] == [
        ("tilt", 0.71, 0.55),
        ("other", 0.77, 0.55),
    ]


def test_no_adapter_of_this_run_means_no_claim_about_its_training(run):
    evaluated(run, {"tilt": FOREIGN, "other": FOREIGN})
    top, _ = parts(run)
    assert "55.0% without an adapter, 77.0% with other, which was trained on another RUN (runs/first)" in top
    assert "before training" not in top
    evaluated(run, {"tilt": UNKNOWN, "other": UNKNOWN})
    top, _ = parts(run)
    assert "55.0% without an adapter, 77.0% with other (p 0.012)." in top and "before training" not in top


def test_an_evaluation_of_an_early_version_is_read_and_names_its_adapter(run):
    evaluated(run, None)
    top, rest = parts(run)
    assert "55.0% without an adapter, 77.0% with other (p 0.012)." in top and "gsm8k with tilt" in rest
    assert ANOTHER not in top + rest and "not recorded" not in top + rest


@pytest.mark.parametrize(("step", "first"), [(40, "tilt"), (9, "other")])
def test_of_the_checkpoints_of_a_training_the_headline_takes_its_adapter(run, step, first):
    evaluated(run, {"tilt": MINE, "other": MINE | {"step": 9}})
    trained(run, adapter_step=step)
    top, rest = parts(run)
    assert f"after, with {first} (p" in top and ANOTHER not in top + rest
    assert "The charts are of the training to out/tilt, 40 optimizer steps" in rest
    assert ("; the adapter is that after step 9." in rest) == (step == 9)


@pytest.mark.parametrize("objective", ["contrast", "sft"])
def test_an_accuracy_of_another_training_than_the_charts_is_marked(run, objective):
    evaluated(run, {"tilt": MINE, "other": FOREIGN})
    trained(run)
    top, rest = parts(run)
    assert ANOTHER not in top + rest and rest.count("another training than the charts") == 1  # of the other adapter
    trained(run, training_id="later", adapter="out/new", objective=objective)
    top, rest = parts(run)
    assert f"This accuracy {ANOTHER} below: evaluate the new adapter, out/new, with --run." in top
    assert f"The accuracy below {ANOTHER} here" in rest and rest.count("another training than the charts") == 3
    assert f"The charts are of {'SFT' if objective == 'sft' else 'the training'} to out/new" in rest


def test_an_accuracy_of_an_unknown_training_is_marked_too(run):
    evaluated(run, None)
    trained(run)
    top, rest = parts(run)
    assert "It is not recorded which training this accuracy is of." in top
    assert "which training the accuracy below is of" in rest and "evaluate out/tilt with --run" in rest
    evaluated(run, {"tilt": MINE, "other": FOREIGN}, "later")
    top, rest = parts(run)
    assert "not recorded" not in top + rest
    assert top.index("71.0% after, with tilt") < top.index("77.0% with other")


def test_a_curve_of_another_training_is_marked(run):
    points = [{"step": step, **SCORE} for step in (0, 40)]
    evaluated(run, {"tilt": MINE, "other": FOREIGN}, curve={"gsm8k": points})
    for training_id, times in (("one", 1), ("later", 3)):
        trained(run, training_id=training_id)
        page = report_page(run)
        heading = page[page.index("gsm8k by optimizer step") :].partition("</h3>")[0]
        assert ("another training than the charts" in heading) == (times == 3)


@pytest.mark.parametrize("origins", [[], {"tilt": []}, {"tilt": {"step": "x", "of_this_run": 1}}, {"tilt": None}])
def test_origins_that_nobody_wrote_break_no_report(run, origins):
    evaluated(run, origins)
    for content in (b"{", b"[]", b'{"training_id": "one"}'):
        run.bucket.put("training/training.json", content)
        assert gather(run).training is None and "Training loss from" in report_page(run)


def test_sft_is_called_so(run):
    evaluated(run, {"tilt": MINE | {"objective": "sft"}, "other": FOREIGN})
    assert "55.0% before training, 71.0% after SFT, with tilt" in next(parts(run))
