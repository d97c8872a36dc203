"""The contrast loss against its definition over the whole vocabulary, and what it holds in memory."""

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div

from trainer.training.loss import contrast_sums

STEPS, VOCABULARY, WIDTH = 20, 50, 16


@pytest.fixture
def labelled():
    """Hidden states [20, 16], a head, and labels of 1 to 4 ids, ragged: rows are filled with id 0 at weight 0."""
    torch.manual_seed(3)
    ids = torch.stack([torch.randperm(VOCABULARY)[:4] for _ in range(STEPS)])
    weights = torch.rand(STEPS, 4) * (torch.arange(4) < torch.randint(1, 5, (STEPS, 1)))
    hidden = (torch.randn(STEPS, WIDTH) * 2).requires_grad_()
    return hidden, nn.Linear(WIDTH, VOCABULARY, bias=False), ids * (weights > 0), weights / weights.sum(1, keepdim=True)


def dense(ids, weights):
    return torch.zeros(len(ids), VOCABULARY).scatter_add_(1, ids, weights)


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_loss_and_gradients_are_those_of_the_divergence_from_the_labels_whatever_the_chunk(labelled, rows):
    hidden, head, ids, weights = labelled
    expected = kl_div(head(hidden).log_softmax(1), dense(ids, weights), reduction="sum")
    theirs = torch.autograd.grad(expected, (hidden, head.weight))
    mine = contrast_sums(hidden, head, ids, weights, VOCABULARY, chunk_elements=rows * VOCABULARY).loss
    torch.testing.assert_close(mine, expected)
    for ours, reference in zip(torch.autograd.grad(mine, (hidden, head.weight)), theirs, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_it_is_zero_where_the_model_says_what_the_label_says():
    weights = torch.tensor([[0.7, 0.2, 0.1]])
    sums = contrast_sums(weights.log(), nn.Identity(), torch.arange(3)[None], weights, 3)
    assert sums.loss.abs() < 1e-6 and sums.agreeing == 1


def test_half_precision_logits_are_normalised_in_float32(labelled):
    hidden, head, ids, weights = labelled
    rounded = head(hidden).bfloat16()
    loss = contrast_sums(rounded, nn.Identity(), ids, weights, VOCABULARY).loss
    assert loss.dtype == torch.float32
    exact = contrast_sums(rounded.float(), nn.Identity(), ids, weights, VOCABULARY).loss
    torch.testing.assert_close(loss, exact, rtol=0, atol=0)


def test_entropy_of_the_labels_and_agreement_of_the_likeliest_token_are_counted(labelled):
    hidden, head, ids, weights = labelled
    sums = contrast_sums(hidden, head, ids, weights, VOCABULARY, chunk_elements=3 * VOCABULARY)
    labels = dense(ids, weights)
    torch.testing.assert_close(sums.entropy, -torch.xlogy(labels, labels).sum())
    assert sums.agreeing == (head(hidden).argmax(1) == labels.argmax(1)).sum()
    perfect = contrast_sums(labels * 30, nn.Identity(), ids, weights, VOCABULARY)
    assert perfect.agreeing == STEPS


def test_a_step_whose_label_weighs_nothing_adds_nothing(labelled):
    hidden, head, ids, weights = labelled
    sums = contrast_sums(hidden, head, ids, torch.zeros_like(weights), VOCABULARY)
    assert sums.loss == sums.entropy == sums.agreeing == 0
    assert not torch.autograd.grad(sums.loss, hidden)[0].any()


def test_logits_of_more_than_one_chunk_are_never_held_backward_included():
    """What autograd saves for backward, and the largest tensor that backward makes, in elements."""
    steps, vocabulary, rows = 64, 1000, 8
    hidden = torch.randn(steps, WIDTH, requires_grad=True)
    ids, weights = torch.zeros(steps, 1, dtype=torch.int64), torch.ones(steps, 1)
    head = nn.Linear(WIDTH, vocabulary, bias=False).requires_grad_(False)
    saved, made = [], []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), options=None):
            result = operation(*arguments, **(options or {}))
            made.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t), Largest():
        sums = contrast_sums(hidden, head, ids, weights, vocabulary, chunk_elements=rows * vocabulary)
        forward = sum(saved)
        sums.loss.backward()
    # the head's own weight is as large as two chunks and is no copy
    assert forward < rows * vocabulary and max(made) <= max(rows * vocabulary, vocabulary * WIDTH)
