"""The contrast loss against its definition over the whole vocabulary."""

import pytest
import torch
from torch.nn.functional import kl_div

from trainer.loss import contrast_loss


@pytest.fixture
def labelled():
    """Logits [20, 50] and labels of 1 to 4 ids, ragged: rows are filled with id 0 at weight 0."""
    torch.manual_seed(3)
    ids = torch.stack([torch.randperm(50)[:4] for _ in range(20)])
    weights = torch.rand(20, 4) * (torch.arange(4) < torch.randint(1, 5, (20, 1)))
    return torch.randn(20, 50) * 3, ids * (weights > 0), weights / weights.sum(1, keepdim=True)


def test_it_is_the_mean_divergence_of_the_model_from_the_labels(labelled):
    logits, ids, weights = labelled
    dense = torch.zeros_like(logits).scatter_add_(1, ids, weights)
    expected = kl_div(logits.log_softmax(1), dense, reduction="batchmean")
    torch.testing.assert_close(contrast_loss(logits, ids, weights), expected)


def test_it_is_zero_where_the_model_says_what_the_label_says():
    weights = torch.tensor([[0.7, 0.2, 0.1]])
    assert contrast_loss(weights.log(), torch.arange(3)[None], weights).abs() < 1e-7


def test_half_precision_logits_are_normalised_in_float32(labelled):
    logits, ids, weights = labelled
    rounded = logits.bfloat16()
    loss = contrast_loss(rounded, ids, weights)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, contrast_loss(rounded.float(), ids, weights), rtol=0, atol=0)
