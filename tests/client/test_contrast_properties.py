"""The mathematics of the contrast, on distributions that hypothesis looks for, against the whole vocabulary.

The client sees the k best ids of the expert, rounded to float32, and of some of them nothing of the amateur's. What it
proves from them must hold of the distributions as they are.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.runs.distributions import EXAMPLES, alphas, ks, many, pairs, seen, true_kl

from client.contrast import SMALLEST_REMAINDER, contrast, covered_mass, kl_lower_bound, mask_complete

ROUNDING = 5e-5
"""Nats: what float32 log-probabilities may add to the sum over the k ids."""
SUM_ROUNDING = 3e-7
"""What they may add to the sum of k probabilities, and take from the remainder."""


def rounding(log_p, log_q):
    """Nats that float32 may add to a bound: p_r log(p_r / q_r) moves by p_r times the relative error of q_r."""
    known = np.isfinite(log_q)
    masses = (np.where(known, np.exp(array.astype(np.float64)), 0.0).sum(axis=1) for array in (log_p, log_q))
    rest = [np.maximum(1 - mass, 0) for mass in masses]
    return ROUNDING + rest[0] * SUM_ROUNDING / np.maximum(rest[1], SMALLEST_REMAINDER)


@many
@given(pairs(), ks)
def test_the_bound_is_at_most_the_full_divergence_whatever_the_amateur_gives_to_what_it_hides(pair, k):
    logprobs = seen(pair, k)[1:]
    assert (kl_lower_bound(*logprobs) <= true_kl(pair) + rounding(*logprobs)).all()


@many
@given(pairs(most_unknown=0))
def test_the_bound_is_the_divergence_where_k_is_the_whole_vocabulary(pair):
    bound = kl_lower_bound(*seen(pair, pair[0].shape[1])[1:])
    np.testing.assert_allclose(bound, true_kl(pair), atol=ROUNDING, rtol=1e-5)


@many
@given(pairs())
def test_the_bound_grows_with_k_as_long_as_the_amateurs_remainder_is_not_raised(pair):
    bounds, rests, slack = [], [], []
    for k in range(1, pair[0].shape[1] + 1):
        _, expert, amateur = seen(pair, k)
        bounds.append(kl_lower_bound(expert, amateur))
        slack.append(rounding(expert, amateur))
        rests.append(1 - np.exp(amateur.astype(np.float64)).sum(axis=1))
    grows = np.diff(bounds, axis=0) >= -(np.array(slack[:-1]) + np.array(slack[1:]))
    raised = np.minimum(rests[:-1], rests[1:]) < SMALLEST_REMAINDER
    assert (grows | raised).all()


@many
@given(pairs(), ks, alphas)
def test_the_certificate_is_given_exactly_where_the_plausible_set_is_whole_as_far_as_k_can_tell(pair, k, alpha):
    expert, _, known, _ = pair
    rounded = expert.astype(np.float32).astype(np.float64)
    every = rounded >= rounded.max(axis=1, keepdims=True) + np.log(alpha)  # the plausible set over the vocabulary
    ids, log_p, log_q = seen(pair, k)
    complete = mask_complete(log_p, log_q, alpha, vocab_size=expert.shape[1])
    for step, certified in enumerate(complete):
        plausible = set(np.flatnonzero(every[step]))
        whole = plausible <= set(ids[step]) and known[list(plausible)].all()
        beyond_doubt = k >= expert.shape[1] or ids[step][-1] not in plausible
        assert certified == (whole and beyond_doubt)


@many
@given(pairs(), ks, alphas, st.floats(0, 3), st.booleans())
def test_labels_are_the_contrast_over_the_plausible_set_of_the_whole_vocabulary(pair, k, alpha, beta, keep_incomplete):
    expert, amateur, known, _ = pair
    ids, log_p, log_q = seen(pair, k)
    made = contrast(
        ids, log_p, log_q, alpha=alpha, beta=beta, first_step=0, vocab_size=expert.shape[1],
        keep_incomplete=keep_incomplete,
    )  # fmt: skip
    assert (made.kl_lower_bound > beta).all() and (made.mask_complete | keep_incomplete).all()
    rounded = expert.astype(np.float32).astype(np.float64)
    for place, step in enumerate(made.steps):
        inside = slice(*made.label_offsets[place : place + 2])
        label, weights = made.label_ids[inside], made.label_weights[inside]
        assert abs(weights.astype(np.float64).sum() - 1) < 1e-6 and (weights >= 0).all() and known[label].all()
        assert len(set(label)) == len(label) > 0
        plausible = rounded[step] >= rounded[step].max() + np.log(alpha)
        assert plausible[label].all()
        if made.mask_complete[place]:
            assert set(label) == set(np.flatnonzero(plausible))
        ratio = expert[step][label] - amateur[step][label]
        exact = np.exp(ratio - ratio.max())
        np.testing.assert_allclose(weights, exact / exact.sum(), atol=1e-4)


@many
@given(pairs(), ks)
def test_the_covered_mass_is_what_the_expert_gives_to_ids_that_both_know(pair, k):
    expert, _, known, order = pair
    mass = [np.exp(expert[step][[i for i in order[step, :k] if known[i]]]).sum() for step in range(len(expert))]
    np.testing.assert_allclose(covered_mass(*seen(pair, k)[1:]), mass, atol=1e-5)


@pytest.mark.long
def test_all_of_it_holds_of_thousands():
    said = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, EXAMPLES: "4000"}, capture_output=True, text=True,
    )  # fmt: skip
    assert said.returncode == 0 and " passed" in said.stdout, said.stdout[-4000:]
