"""Packed or padded trajectories: none sees another, none is cut, and every rank gets its share."""

import dataclasses
import itertools

import pytest
import torch
from support.models.tiny_pair import VOCABULARY, load, trajectory, write_run
from support.training.reading import read_training_set

from trainer.adapters.model_folder import ModelFolder
from trainer.data.dataset import Limits
from trainer.data.packing import Layout, Sharing, micro_batches, pack
from trainer.settings import Lora
from trainer.training.lora import Head, hidden_states, with_lora


@pytest.fixture(scope="module")
def examples(tmp_path_factory, expert):
    rows = [trajectory(f"p{index}", index) for index in range(13)]
    run = write_run(tmp_path_factory.mktemp("runs") / "thirteen", expert, trajectories=rows)
    return read_training_set(run, ModelFolder(expert), Limits(VOCABULARY)).examples


def logits_of(model, examples):
    batch = pack(examples)
    with torch.no_grad():
        states = hidden_states(model.get_decoder(), batch["input_ids"], batch["position_ids"])
        logits = Head(model)(states[0, batch["kept"]])
    return logits.split([len(example.positions) for example in examples])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_no_attention_crosses_from_one_packed_trajectory_to_another(expert, examples, mode, attention):
    model = getattr(load(expert), mode)()
    model.set_attn_implementation(attention)
    alone = [logits_of(model, [example])[0] for example in examples]
    for packed, single in zip(logits_of(model, examples), alone, strict=True):
        torch.testing.assert_close(packed, single, rtol=0, atol=2e-5)
    changed = dataclasses.replace(examples[0], input_ids=(examples[0].input_ids + 1) % VOCABULARY)
    after = logits_of(model, [changed, *examples[1:]])
    assert (after[0] - alone[0]).abs().max() > 0.1
    for packed, single in zip(after[1:], alone[1:], strict=True):
        torch.testing.assert_close(packed, single, rtol=0, atol=2e-5)


def loss_of(model, batches):
    with torch.no_grad():
        return sum(model(**batch).loss for batch in batches)


def test_permuting_separating_or_sharing_out_trajectories_changes_the_loss_by_rounding_only(expert, examples):
    model = with_lora(load(expert), "x", Lora()).eval()
    together = loss_of(model, [pack(examples)])
    assert together > 1
    for batches in (
        [pack(examples[::-1])],
        [pack([example]) for example in examples],
        micro_batches(examples, 40)[0],
        micro_batches(examples, 80, layout=Layout(Sharing.PADDED))[0],
        [batch for rank in micro_batches(examples, 80, 3, Layout(Sharing.PADDED)) for batch in rank],
        [batch for rank in micro_batches(examples, 40, ranks=3) for batch in rank],
        [batch for rank in micro_batches(examples[:1], 40, ranks=2) for batch in rank] + [pack(examples[1:])],
    ):
        torch.testing.assert_close(loss_of(model, batches), together, rtol=1e-6, atol=0)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_micro_batches_keep_to_the_budget_without_padding_and_are_as_many_for_every_rank(examples, ranks):
    budget = 45
    shares = micro_batches(examples, budget, ranks)
    assert len(shares) == ranks and len({len(share) for share in shares}) == 1
    sizes = [batch["input_ids"].shape[1] for share in shares for batch in share]
    held = sum(len(example.input_ids) for example in examples)
    idle = sum(not batch["label_weights"].any() for share in shares for batch in share)
    assert sum(sizes) - idle == held and max(sizes) <= budget
    assert [len(share) for share in micro_batches(examples[:1], budget, ranks)] == [1] * ranks
    assert len(shares[0]) <= 1.5 * held / ranks / budget + 1
    per_rank = [sum(batch["input_ids"].shape[1] for batch in share) for share in shares]
    assert max(per_rank) - min(per_rank) <= max(len(example.input_ids) for example in examples)


@pytest.mark.parametrize(("ranks", "budget", "switch"), [(1, 60, 15), (3, 60, 15), (1, 400, 99)])
def test_padded_rows_fill_the_budget_with_trajectories_of_like_length_from_one_side_of_a_switch(
    examples, ranks, budget, switch
):
    shares = micro_batches(examples, budget, ranks, Layout(Sharing.PADDED, switch))
    assert len(shares) == ranks and len({len(share) for share in shares}) == 1
    held = []
    for share in shares:
        passes = [batch["input_ids"] for batch in share if batch["label_weights"].any()]
        lengths = [[int((row > 0).sum()) for row in ids] for ids in passes]  # padding is 0, which no trajectory holds
        sizes = [(ids.shape[1], ids.numel()) for ids in passes]
        assert all(size == (max(rows), max(rows) * len(rows)) for size, rows in zip(sizes, lengths, strict=True))
        assert max(tokens for _, tokens in sizes) <= budget
        for rows, after in itertools.pairwise(lengths):
            assert min(rows) >= max(after)
            full = (len(rows) + 1) * max(rows) > budget
            assert full or max(after) <= switch < max(rows) or 2 * max(after) < max(rows)
        assert not any(min(rows) <= switch < max(rows) or 2 * min(rows) < max(rows) for rows in lengths)
        held += [tuple(row[row > 0].tolist()) for ids in passes for row in ids]
    assert sorted(held) == sorted(tuple(example.input_ids.tolist()) for example in examples)


def test_an_example_above_the_budget_gets_a_sequence_of_its_own_and_stays_whole(examples):
    sizes = sorted(batch["input_ids"].shape[1] for batch in micro_batches(examples, 1)[0])
    assert sizes == sorted(len(example.input_ids) for example in examples)
