"""The paper's tables, from RUNs to Markdown, on a tiny model: real trainings, one real engine.

Most trainings are forks; the one that is refused is the process that a user's is.
"""

import json

import numpy as np
import pytest
from support.models.tiny_pair import saying, trajectory, write_run

from client.errors import LightReasonerError
from client.protocol.requests import ContrastSettings
from client.runs.build import build_run
from client.runs.run import Run
from trainer.adapters.model_folder import ModelFolder
from trainer.cli.train import is_trained
from trainer.evaluation.paper_tables import cell, sampling_seconds
from trainer.evaluation.records import Record, Records
from trainer.evaluation.variants import PAPER_VARIANTS, variants_of

ASKED = ("--max-tokens", 8, "--system-prompt", "The answer is")
LIGHT = ("--", "--max-steps", 1, "--batch-size", 4, "--learning-rate", 0.05)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmark") / "digits.jsonl"
    rows = [{"question": f"Ann has {a} + {b} apples How many ?", "answer": str(a)} for a in range(4) for b in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.engine
def test_an_ablation_trains_and_evaluates_its_four_variants_and_does_nothing_twice(
    tmp_path, expert, benchmark, trainer_cli, forked_trainings, monkeypatch
):
    run = write_run(tmp_path / "run", expert, trajectories=[trajectory(f"p{seed}", seed) for seed in range(6)])
    out = tmp_path / "tables"
    words = ("ablation", run, "--model", expert, "--output", out, "--benchmark", f"digits={benchmark}", *ASKED, *LIGHT)
    code, shown, err = trainer_cli(*words)
    assert code == 0, err
    rows = json.loads((out / "ablation.json").read_text())
    variants = ["full", "without step selection", "without contrast", "without either"]
    assert [row["name"] for row in rows] == ["expert", *variants]
    made = {}
    for name in variants:
        folder = out / "adapters" / f"{name.replace(' ', '-')}-0"
        about = json.loads((folder / "lightreasoner.json").read_text())
        identity = about["run_identity"]
        made[name] = identity["select"], identity["labels"], about["kept_steps"]
        weights = (folder / "adapter_model.safetensors").read_bytes()
        made[name] += (weights,)
    assert [of_one[:2] for of_one in made.values()] == [
        ("kl", "contrast"), ("random", "contrast"), ("kl", "expert"), ("random", "expert"),
    ]  # fmt: skip
    assert len({of_one[2] for of_one in made.values()}) == 1  # as many steps each
    assert len({of_one[3] for of_one in made.values()}) == 4  # and yet four adapters
    for name, row in zip(variants, rows[1:], strict=True):
        records = Records.read(out / "outputs.jsonl").of(
            str(out / "adapters" / f"{name.replace(' ', '-')}-0"), "digits"
        )
        assert len(records) == 12 and row["kept steps"] == made[name][2]
        assert row["benchmarks"]["digits"]["accuracy"] == pytest.approx(np.mean([one[0].correct for one in records]))
    assert "| without either |" in (out / "ablation.md").read_text() and "without either" in shown

    before = {file: file.stat().st_mtime_ns for file in (out / "adapters").rglob("*") if file.is_file()}
    monkeypatch.setattr("trainer.evaluation.paper_tables.run_training", None)  # no training can be started
    code, shown, err = trainer_cli(*words)
    assert code == 0 and shown.count(" is complete") == len(variants), err
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert json.loads((out / "ablation.json").read_text()) == rows


@pytest.mark.engine
def test_an_ablation_of_other_variants_has_a_row_for_each(tmp_path, expert, benchmark, trainer_cli, forked_trainings):
    run = write_run(tmp_path / "run", expert, trajectories=[trajectory(f"p{seed}", seed) for seed in range(6)])
    out, listed = tmp_path / "tables", tmp_path / "variants.txt"
    listed.write_text("full  # the RUN itself\n\ngentle: labels=tilt gamma=0.25 max-shift=0.1\nselect=top keep=0.5\n")
    words = ("ablation", run, "--model", expert, "--output", out, "--benchmark", f"digits={benchmark}", *ASKED)
    code, shown, err = trainer_cli(*words, "--variants", listed, *LIGHT)
    assert code == 0, err
    rows = json.loads((out / "ablation.json").read_text())
    assert [row["name"] for row in rows] == ["expert", "full", "gentle", "select=top keep=0.5"]
    gentle, top = Run(str(out / "runs" / "gentle")), Run(str(out / "runs" / "select=top-keep=0.5"))
    made = gentle.manifest()
    assert (made.labels, made.gamma, made.max_shift, made.select) == ("tilt", 0.25, 0.1, "kl")
    assert (top.manifest().select, top.manifest().keep, top.manifest().labels) == ("top", 0.5, "contrast")
    for row, built in zip(rows[2:], (gentle, top), strict=True):
        totals = built.completion().totals
        assert (row["kept steps"], row["label shift, nats"]) == (totals.kept, totals.label_shifts.mean)
        assert row["overturned"] == totals.label_shifts.overturned_share
    assert rows[0]["label shift, nats"] is None and 0 < rows[2]["label shift, nats"] < rows[1]["label shift, nats"]
    assert "select=top keep=0.5" in shown and (out / "adapters" / "gentle-0").is_dir()


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("labels=tilted", "labels=tilted: labels: expected 'contrast', 'expert'"),
        ("gamma=0.5", "gamma=0.5: gamma belongs to labels tilt"),
        ("labels=expert max-shift=1", "labels=expert max-shift=1: max-shift belongs to labels contrast or tilt"),
        ("labels", "'labels' in 'labels' is not SETTING=VALUE"),
        ("lables=tilt", "'lables=tilt' in 'lables=tilt' is not SETTING=VALUE, each setting once"),
        ("labels=expert labels=tilt", "each setting once"),
        ("beta=much", "beta: expected a number"),
        ("full, one: beta=1, one: beta=2", "'one' is given twice"),
        (": beta=1", "has no name before its colon"),
        (" , ", "names no variant"),
    ],
)
def test_variants_that_mean_nothing_are_named_before_anything_is_done(
    tmp_path, expert, run, benchmark, trainer_cli, written, said
):
    words = ("ablation", run, "--model", expert, "--output", tmp_path / "out", "--benchmark", f"digits={benchmark}")
    code, _, err = trainer_cli(*words, "--variants", written)
    assert code == 1 and said in err and not (tmp_path / "out").exists()


def test_a_list_names_the_papers_variants_and_its_own():
    found = variants_of("without contrast, labels=tilt  gamma=1.0, my own: seed=3 first-step=2")
    assert [variant.name for variant in found] == ["without contrast", "labels=tilt gamma=1.0", "my own"]
    assert found[0] is PAPER_VARIANTS[2] and found[2].settings == {"select_seed": 3, "first_step": 2}
    settings = found[1].of(ContrastSettings(beta=0.1, labels="expert"))
    assert (settings.beta, settings.labels, settings.gamma) == (0.1, "tilt", 1.0)
    assert found[0].of(ContrastSettings(labels="tilt", max_shift=0.1)) == ContrastSettings(labels="expert")


def test_a_list_may_be_long_and_infinite_shifts_are_no_bound():
    found = variants_of(", ".join(f"name {number}: labels=tilt gamma=0.{number}" for number in range(1, 200)))
    assert len(found) == 199 and found[-1].settings == {"labels": "tilt", "gamma": 0.199}
    for spelling in ("inf", "Infinity", "INF"):
        (variant,) = variants_of(f"max-shift={spelling}")
        assert variant.of(ContrastSettings(labels="tilt", max_shift=0.1)).max_shift is None
    with pytest.raises(LightReasonerError, match="max-shift: expected a number"):
        variants_of("max-shift=-inf")[0].of(ContrastSettings())


@pytest.mark.engine
def test_efficiency_sets_the_contrast_beside_sft_over_seeds(tmp_path, expert, benchmark, trainer_cli, forked_trainings):
    run = write_run(tmp_path / "run", expert, trajectories=[trajectory(f"p{seed}", seed) for seed in range(6)])
    solutions = write_run(tmp_path / "solutions", expert, trajectories=[saying("right", "7"), saying("wrong", "5")])
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(f'{{"id": "{name}", "question": "q", "answer": "7"}}\n' for name in ("right", "wrong")))
    out = tmp_path / "tables"
    words = ("efficiency", run, solutions, "--answers", answers, "--model", expert, "--output", out, "--seeds", "0,1")
    words += ("--benchmark", f"digits={benchmark}", *ASKED, *LIGHT)
    code, shown, err = trainer_cli(*words)
    assert code == 0, err
    base, sft, contrast = json.loads((out / "efficiency.json").read_text())
    assert (base["name"], sft["name"], contrast["name"]) == ("expert", "SFT", "LightReasoner")
    tokens = len(next(Run(str(solutions)).trajectories()).token_ids)
    kept = sum(len(sample.contrast.steps) for sample in Run(str(run)).samples())
    assert (sft["tuned tokens"], contrast["tuned tokens"]) == (tokens, kept)
    assert 0 < sft["training, s"] < 60 and contrast["sampling, s"] >= 0
    assert base["benchmarks"]["digits"]["deviation"] is None and sft["benchmarks"]["digits"]["deviation"] >= 0
    assert "tuned tokens" in shown and "gain" in shown


@pytest.mark.process
def test_what_cannot_be_done_is_said(tmp_path, expert, run, benchmark, trainer_cli, forked_trainings):
    words = ("ablation", run, "--model", expert, "--output", tmp_path / "out", "--benchmark", f"digits={benchmark}")
    for more, code, message in (
        (("--seeds", "0,x"), 1, "--seeds '0,x': give whole numbers"),
        (("--seeds", "1,1"), 1, "give each seed once"),
        (("--", "--learning-rat", "1"), 1, "full, seed 0: "),
        (("--", "--seed", "4"), 1, "--seed cannot stand after --"),
        (("--", "--output=x"), 1, "--output=x cannot stand after --"),
        (("--benchmark", "more=none.jsonl"), 1, "error: no problem set at none.jsonl"),
        (("--epochs", "2"), 2, "--epochs"),
    ):
        found, _, err = trainer_cli(*words, *more)
        assert found == code and message in err, (more, err)


def test_a_cell_is_over_problems_and_its_deviation_over_seeds():
    def record(number, right):
        return Record("m", "b", number, "p", 0, "q", "o", "e", "g", bool(right))

    right = np.random.default_rng(3).integers(0, 2, (3, 40))
    found = cell([[[record(number, one)] for number, one in enumerate(seed)] for seed in right])
    assert found.accuracy == pytest.approx(right.mean())
    assert found.deviation == pytest.approx(right.mean(axis=1).std(ddof=1))
    spread = 1.96 * right.mean(axis=0).std() / np.sqrt(40)
    assert found.interval == pytest.approx((right.mean() - spread, right.mean() + spread), abs=0.02)


@pytest.mark.process
def test_a_refused_training_says_why_with_every_line_of_it(tmp_path, expert, run, benchmark, trainer_cli):
    out = tmp_path / "out"
    words = ("ablation", run, "--model", expert, "--output", out, "--benchmark", f"digits={benchmark}", *ASKED)
    adapter = out / "adapters" / "full-0"
    assert trainer_cli("train", run, "--model", expert, "--output", adapter, "--max-steps", 1)[0] == 0
    code, _, err = trainer_cli(*words, "--", "--max-steps", 1, "--learning-rate", 0.25)
    assert code == 1 and "full, seed 0: " in err and "--learning-rate: 5e-05 against 0.25" in err
    assert str(adapter) in err.partition("--learning-rate")[0]


def test_an_adapter_counts_as_trained_only_for_the_words_that_made_it(tmp_path, expert, run, trainer_cli):
    other = write_run(tmp_path / "other", expert, beta=0.1)
    base, out = ModelFolder(expert), str(tmp_path / "out")
    words = [str(run), "--model", str(expert), "--output", out, "--resume", "--max-steps", "1"]
    assert not is_trained(words, base)
    assert trainer_cli("train", *words)[0] == 0 and is_trained(words, base)
    assert is_trained([*words, "--save-steps", "7"], base)  # which changes no weight
    for more in (("--max-steps", "2"), ("--learning-rate", "0.25"), ("--seed", "1"), ("--learning-rat", "1")):
        assert not is_trained([*words, *more], base), more
    assert not is_trained([str(other), *words[1:]], base) and not is_trained([out, *words[1:]], base)
    (tmp_path / "out" / "lightreasoner.json").unlink()
    assert not is_trained(words, base)


def test_outputs_of_other_benchmarks_are_refused_before_anything_is_trained(
    tmp_path, expert, run, benchmark, trainer_cli
):
    out = tmp_path / "out"
    out.mkdir()
    Records(out / "outputs.jsonl", {"base": "of another model", "adapters": {}}).close()
    words = ("ablation", run, "--model", expert, "--output", out, "--benchmark", f"digits={benchmark}", *ASKED)
    code, _, err = trainer_cli(*words)
    assert code == 1 and "is of another evaluation" in err and not (out / "adapters").exists()


def test_a_run_that_was_built_took_the_seconds_of_the_one_that_was_sampled(tmp_path, expert):
    sampled = write_run(tmp_path / "run", expert)
    built = Run(str(tmp_path / "built"))
    build_run(Run(str(sampled)), built, ContrastSettings(beta=0.1))
    began = int(Run(str(sampled)).completion().sealed_at) - 500
    body = Run(str(sampled)).manifest().model_copy(update={"created_at": began}).model_dump_json()
    (tmp_path / "run" / "run.json").write_text(body)
    assert sampling_seconds(built) == sampling_seconds(Run(str(sampled))) >= 500
