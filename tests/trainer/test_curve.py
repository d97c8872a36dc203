"""The checkpoints of one training, evaluated as a curve."""

import json
import shutil
import sys

import pytest

from client.errors import ModelError
from trainer.__main__ import main
from trainer.evaluation.curve import checkpoints_of, curve_of, final_last, highest_of
from trainer.evaluation.records import Record
from trainer.evaluation.scores import comparison_of


@pytest.fixture(scope="module")
def training(tmp_path_factory, run, expert):
    """OUT of a training of five steps that kept three checkpoints."""
    out = tmp_path_factory.mktemp("training") / "out"
    words = ("train", run, "--model", expert, "--output", out, "--max-steps", 5, "--save-steps", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trainer", *map(str, words), "--keep-checkpoints", "3", "--batch-size", "4"])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code
    return out


def test_as_many_checkpoints_are_kept_as_were_asked_for_and_found_by_their_steps(training):
    folder = training / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {f"checkpoint-{step}" for step in (3, 4, 5)}
    steps = checkpoints_of(f"{training}/")
    assert steps == {f"{folder}/checkpoint-3": 3, f"{folder}/checkpoint-4": 4, str(training): 5}
    about = json.loads((training / "lightreasoner.json").read_text())
    (folder / "checkpoint-5" / "whole.json").rename(folder / "checkpoint-5" / "torn.json")
    try:
        assert (
            list(checkpoints_of(str(training)).items())[-1]
            == (str(training), about["adapter_step"])
            == (str(training), 5)
        )
    finally:
        (folder / "checkpoint-5" / "torn.json").rename(folder / "checkpoint-5" / "whole.json")


def test_checkpoints_stand_in_the_order_of_their_steps_with_the_final_adapter_among_them(tmp_path):
    """By number, not by name; the best of a training may be older than its last checkpoints."""
    for step in (1000, 90, 200):
        (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"checkpoint-{step}" / "whole.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "lightreasoner.json").write_text(json.dumps({"adapter_step": 150, "optimizer_steps": 1000}))
    found = checkpoints_of(str(tmp_path))
    assert list(found.values()) == [90, 150, 200, 1000] and list(found)[1] == str(tmp_path)
    checkpoints = [f"{tmp_path}/checkpoints/checkpoint-{step}" for step in (90, 200, 1000)]
    assert final_last(found, f"{tmp_path}/") == [*checkpoints, str(tmp_path)]  # the last one's figures stand in front
    (tmp_path / "lightreasoner.json").write_text(json.dumps({"adapter_step": 200, "optimizer_steps": 1000}))
    assert list(checkpoints_of(str(tmp_path)).items())[1] == (str(tmp_path), 200)  # not its checkpoint of the same step


def test_one_checkpoint_is_named_with_what_to_give(training, tmp_path):
    one = training / "checkpoints" / "checkpoint-5"
    with pytest.raises(ModelError, match=f"{one} is one checkpoint .*--checkpoints {training}, or --adapter {one} "):
        checkpoints_of(f"{one}/")
    copied = shutil.copytree(one, tmp_path / "copied")
    with pytest.raises(ModelError, match="give --checkpoints the --output of its training, or --adapter"):
        checkpoints_of(str(copied))
    for damaged in ("{", "[]"):
        (copied / "lightreasoner.json").write_text(damaged)
        with pytest.raises(ModelError, match=r"copied/lightreasoner\.json is damaged"):
            checkpoints_of(str(copied))


def test_a_folder_without_checkpoints_is_named(tmp_path, expert, trainer_cli):
    words = ("evaluate", expert, "--checkpoints", tmp_path / "none", "--benchmark", "digits=none.jsonl")
    code, _, err = trainer_cli(*words)
    assert code == 1 and "none holds no checkpoint and no adapter" in " ".join(err.split())


def test_a_curve_has_a_point_a_step_with_what_each_fixed_and_broke():
    def records(model, right):
        return [[Record(model, "b", number, "p", 0, "q", "o", "e", "g", one)] for number, one in enumerate(right)]

    models = {"base": [True, False, False, True], "a": [True, True, False, True], "b": [False, True, True, False],
              "other": [True] * 4}  # fmt: skip
    comparison = comparison_of("b", [(name, records(name, right)) for name, right in models.items()])
    points = curve_of([comparison], {"a": 10, "b": 20})["b"]
    assert [(point["step"], point["accuracy"]) for point in points] == [(0, 0.5), (10, 0.75), (20, 0.5)]
    assert [(point["paired"]["fixed"], point["paired"]["broken"]) for point in points[1:]] == [(1, 0), (2, 2)]
    assert [point["step"] for point in curve_of([comparison], {"a": 20, "b": 10})["b"]] == [0, 10, 20]
    steps = {"out/checkpoints/checkpoint-10": 10, "out": 20}
    assert highest_of({"b": points}, steps) == [
        "b: accuracy is highest at step 10, 75.0%; at the last, 20, it is 50.0%. Take out/checkpoints/checkpoint-10"
    ]
    assert highest_of({"b": points[:2]}, steps) == ["b: accuracy is highest at step 10, 75.0%"]
    (line,) = highest_of({"b": [points[0], points[2]]}, steps)
    assert line.startswith("b: no checkpoint is more accurate than the model as it is, 50.0%; at the last, 20, it is")
    assert "lower --learning-rate or fewer steps" in line


@pytest.mark.engine
def test_every_checkpoint_is_asked_in_one_engine_and_the_run_gets_the_curve(
    tmp_path, training, run, expert, trainer_cli
):
    file, out = tmp_path / "digits.jsonl", tmp_path / "curve.json"
    file.write_text("".join(json.dumps({"question": f"{a} + 1 ?", "answer": str(a + 1)}) + "\n" for a in range(4)))
    words = ("evaluate", expert, "--checkpoints", training, "--benchmark", f"digits={file}", "--max-tokens", 4)
    code, said, err = trainer_cli(*words, "--system-prompt", "The answer is", "-o", out, "--run", run)
    assert code == 0 and any(line in said for line in ("digits: accuracy is highest at", "digits: no checkpoint is")), (
        err
    )
    curve = json.loads(out.read_text())["curve"]["digits"]
    assert [point["step"] for point in curve] == [0, 3, 4, 5] and all("paired" in point for point in curve[1:])
    left = json.loads(run.bucket.get("evaluation/curve.json"))
    assert left["curve"]["digits"] == curve
    training_id = json.loads((training / "lightreasoner.json").read_text())["training_id"]
    made = {"run": str(run), "of_this_run": True, "training_id": training_id, "objective": "contrast"}
    adapters = [*(f"{training}/checkpoints/checkpoint-{step}" for step in (3, 4)), str(training)]
    assert left["origins"] == {name: made | {"step": step} for name, step in zip(adapters, (3, 4, 5), strict=True)}
