"""Pairs of distributions that hypothesis generates, and what the service would return for them."""

import os

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st


def log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@st.composite
def pairs(draw, most_unknown=10):
    """Both models' full log-probabilities [T, V], which ids the amateur knows [V], and the expert's order of ids.

    The pairs include ties, one-hot predictions, ids that the expert rules out (-inf), and equal models.
    """
    size, steps = draw(st.integers(2, 10)), draw(st.integers(1, 3))
    value = st.one_of(st.floats(-12, 12, width=32), st.sampled_from([0.0, 1.0, 18.0, 60.0]))
    ruled_out = st.one_of(value, value, value, st.just(-np.inf))
    logits = np.array(draw(st.lists(ruled_out, min_size=size * steps, max_size=size * steps))).reshape(steps, size)
    logits[:, 0] = np.where(np.isfinite(logits).any(axis=1), logits[:, 0], 0.0)
    expert = log_softmax(logits)
    amateur = log_softmax(
        np.array(draw(st.lists(value, min_size=expert.size, max_size=expert.size))).reshape(logits.shape)
    )
    if draw(st.integers(0, 5)) == 0 and np.isfinite(expert).all():
        amateur = expert
    known = np.ones(size, bool)
    known[draw(st.lists(st.integers(0, size - 1), max_size=most_unknown))] = False
    return expert, amateur, known, np.argsort(-expert, axis=1, kind="stable")


def seen(pair, k):
    """What the service returns: ids, the expert's and the amateur's log-probabilities, [T, k], float32."""
    expert, amateur, known, order = pair
    ids = order[:, :k]
    told = np.where(known, amateur, -np.inf)
    values = (np.take_along_axis(array, ids, 1).astype(np.float32) for array in (expert, told))
    return ids.astype(np.int32), *values


def true_kl(pair):
    expert, amateur = pair[:2]
    p = np.exp(expert)
    return np.where(p > 0, p * (np.where(p > 0, expert, 0.0) - amateur), 0.0).sum(axis=1)


ks = st.integers(1, 10)
alphas = st.one_of(st.sampled_from([1.0, 0.2]), st.floats(1e-3, 1.0))
EXAMPLES = "EXAMPLES"
"""Environment variable: the number of pairs on which each property is tested."""
many = settings(max_examples=int(os.environ.get(EXAMPLES, "150")), deadline=None)
