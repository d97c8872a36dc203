"""Which trajectories each optimizer step takes: every one once an epoch, the same for whoever asks."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from support.models.tiny_pair import VOCABULARY, trajectory, write_run
from support.training.reading import read_training_set

from trainer.adapters.model_folder import ModelFolder
from trainer.data.dataset import Limits, TrainingSet
from trainer.data.steps import Steps
from trainer.settings import PRESETS, Preset, Recipe, Unit


@pytest.fixture(scope="module")
def training_set(tmp_path_factory, expert):
    rows = [trajectory(f"p{index}", index) for index in range(10)]
    run = write_run(tmp_path_factory.mktemp("runs") / "ten", expert, trajectories=rows)
    return read_training_set(run, ModelFolder(expert), Limits(VOCABULARY))


def taken(steps):
    """The examples of each step, as tuples of their ids, sorted."""
    return [sorted(ids for batch in step["micro_batches"] for ids in sequences(batch)) for step in steps]


def together(steps):
    return sorted(itertools.chain.from_iterable(steps))


def sequences(batch):
    starts = np.flatnonzero(batch["position_ids"][0].numpy() == 0)
    return [tuple(ids.tolist()) for ids in np.split(batch["input_ids"][0].numpy(), starts[1:])]


def whole(training_set):
    return sorted(tuple(example.input_ids.tolist()) for example in training_set.examples)


def test_an_epoch_takes_every_trajectory_once_in_an_order_of_its_own(training_set):
    steps = list(Steps(training_set, Recipe(batch_size=4, epochs=2), 60))
    first, second = taken(steps[:3]), taken(steps[3:])
    assert [len(step) for step in first] == [4, 4, 2] and len(steps) == 6
    assert together(first) == together(second) == whole(training_set) and first != second
    assert steps[2]["epoch"] == 1 and steps[5]["epoch"] == 2
    assert sum(step["kept_steps"] for step in steps) == 2 * training_set.kept_steps
    assert taken(Steps(training_set, Recipe(batch_size=4, epochs=2, seed=1), 60))[:3] != first


def test_steps_that_begin_later_are_those_that_would_have_come(training_set):
    recipe = Recipe(batch_size=4, max_steps=9)
    assert taken(Steps(training_set, recipe, 60, first=4)) == taken(Steps(training_set, recipe, 60))[4:]


@pytest.mark.parametrize("unit", Unit)
def test_ranks_share_out_what_one_rank_would_take(training_set, unit):
    recipe = Recipe(unit=unit, batch_size=5, max_steps=5)
    alone = list(Steps(training_set, recipe, 60))
    shares = [list(Steps(training_set, recipe, 60, rank=rank, ranks=3)) for rank in range(3)]
    for step, *mine in zip(alone, *shares, strict=True):
        batches = [batch for share in mine for batch in share["micro_batches"] if batch["label_weights"].any()]
        assert sorted(s for batch in batches for s in sequences(batch)) == taken([step])[0]
        assert {share["kept_steps"] for share in mine} == {step["kept_steps"]}


def test_the_paper_draws_single_kept_steps_from_the_whole_run_until_all_were_had(training_set):
    paper = PRESETS[Preset.PAPER]
    assert (paper.unit, paper.batch_size, paper.max_steps, paper.learning_rate) == ("step", 16, 1000, 5e-5)
    steps = Steps(training_set, paper, 200)
    epoch = -(-training_set.kept_steps // 16)
    drawn = [step for _, step in zip(range(epoch), steps, strict=False)]
    assert all(step["kept_steps"] == 16 for step in drawn[:-1]) and steps.total() == 1000
    prefixes = sorted(
        tuple(example.input_ids[: position + 1].tolist())
        for example in training_set.examples
        for position in example.positions
    )
    assert together(taken(drawn)) == prefixes


class Trickle:
    """A source of one part at a time."""

    def __init__(self, training_set, parts):
        self.set, self.parts = training_set, list(parts)

    def more(self):
        if not self.parts:
            return False
        self.set.add(self.parts.pop(0))
        return True


def test_a_growing_run_is_taken_in_the_order_of_its_parts_and_then_again_in_a_drawn_one(tmp_path, expert):
    run = write_run(tmp_path / "run", expert, trajectories=[], sealed=False)
    for begin in range(0, 10, 3):
        run.write([trajectory(f"p{index}", index) for index in range(begin, min(begin + 3, 10))], {}, run.manifest())
    parts = run.parts("samples")
    growing = TrainingSet(run, Limits(VOCABULARY))
    steps = Steps(growing, Recipe(batch_size=4, epochs=2), 60, source=Trickle(growing, parts))
    all_taken, sizes = [], []
    for step in steps:
        all_taken.append(taken([step])[0])
        sizes.append(len(growing.examples))
    assert sizes == [6, 9, 10, 10, 10, 10]  # no part is waited for before it is needed
    in_order = [tuple(example.input_ids.tolist()) for example in growing.examples]
    assert [ids for step in all_taken[:3] for ids in step] == [
        ids for begin in (0, 4, 8) for ids in sorted(in_order[begin : begin + 4])
    ]
    assert together(all_taken[3:]) == whole(growing) and all_taken[3:] != all_taken[:3]
    again = TrainingSet(run, Limits(VOCABULARY))
    resumed = Steps(again, Recipe(batch_size=4, epochs=2), 60, source=Trickle(again, parts), first=2)
    assert taken(resumed) == all_taken[2:]


def test_the_time_of_a_step_does_not_grow_with_the_run(training_set, monkeypatch):
    """Under --preset paper, which draws single kept steps: no step goes through all examples."""

    class Counted(list):
        looks = 0

        def __iter__(self):
            Counted.looks += 1
            return super().__iter__()

    steps = Steps(training_set, replace(PRESETS[Preset.PAPER], batch_size=2, max_steps=20), 512)
    expected = [step["kept_steps"] for step in steps]
    monkeypatch.setattr(training_set, "examples", Counted(training_set.examples))
    again = Steps(training_set, replace(PRESETS[Preset.PAPER], batch_size=2, max_steps=20), 512)
    before = Counted.looks
    assert [step["kept_steps"] for step in again] == expected
    assert Counted.looks == before
