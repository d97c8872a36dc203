"""The mathematics of the contrast against a plain computation over a full vocabulary."""

import numpy as np
import pytest

from client.contrast import contrast, covered_mass, kl_lower_bound, mask_complete, plausible

VOCABULARY = 60


def log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.fixture
def full():
    """Full-vocabulary log-probabilities of both models, [T, V], float32."""
    rng = np.random.default_rng(5)
    expert = log_softmax(rng.normal(0, 3, (200, VOCABULARY)))
    amateur = log_softmax(expert + rng.normal(0, 1.5, expert.shape))
    return expert.astype(np.float32), amateur.astype(np.float32)


def top_k(full, k):
    expert, amateur = full
    ids = np.argsort(-expert, axis=1, kind="stable")[:, :k].astype(np.int32)
    return ids, np.take_along_axis(expert, ids, 1), np.take_along_axis(amateur, ids, 1)


def plain_kl(full):
    expert, amateur = (array.astype(np.float64) for array in full)
    return (np.exp(expert) * (expert - amateur)).sum(axis=1)


def settings(**changes):
    return {"alpha": 0.2, "beta": 0.4, "first_step": 1, "vocab_size": VOCABULARY} | changes


def test_bound_never_exceeds_the_full_divergence_grows_with_k_and_meets_it_at_the_whole_vocabulary(full):
    exact = plain_kl(full)
    previous = np.full(len(exact), -np.inf)
    for k in (1, 5, 20, VOCABULARY - 1, VOCABULARY):
        bound = kl_lower_bound(*top_k(full, k)[1:])
        assert (bound <= exact + 1e-6).all()
        assert (bound >= previous - 1e-6).all()
        previous = bound
    np.testing.assert_allclose(previous, exact, atol=1e-5)


def test_bound_is_zero_for_equal_models_and_labels_are_uniform(full):
    ids, expert, _ = top_k(full, 20)
    assert np.abs(kl_lower_bound(expert, expert)).max() < 1e-5
    kept = contrast(ids, expert, expert, **settings(beta=-1.0, first_step=0))
    sizes = np.diff(kept.label_offsets)
    assert len(kept.steps) > 100 and sizes.max() > 1
    np.testing.assert_allclose(kept.label_weights, np.repeat(1 / sizes, sizes), rtol=1e-6)


def test_a_remainder_that_rounding_made_negative_contributes_nothing():
    expert, amateur = np.log([[0.7, 0.3 + 1e-7]]), np.log([[0.5, 0.5]])
    expected = 0.7 * np.log(0.7 / 0.5) + 0.3 * np.log(0.3 / 0.5)
    np.testing.assert_allclose(kl_lower_bound(expert, amateur), [expected], atol=1e-6)


def test_the_amateurs_remainder_is_raised_so_that_the_bound_stays_finite():
    expert, amateur = np.log([[0.5]]), np.log([[1.0]])
    np.testing.assert_allclose(kl_lower_bound(expert, amateur), [0.5 * np.log(0.5) + 0.5 * np.log(0.5 / 1e-6)])


def test_an_id_unknown_to_the_amateur_is_folded_into_the_remainder_and_never_labelled(full):
    ids, expert, amateur = top_k(full, 20)
    amateur = amateur.copy()
    amateur[:, 0] = -np.inf
    p = np.exp(expert.astype(np.float64))
    np.testing.assert_allclose(covered_mass(expert, amateur), p[:, 1:].sum(axis=1), atol=1e-9)
    assert np.isfinite(kl_lower_bound(expert, amateur)).all()
    assert (kl_lower_bound(expert, amateur) <= plain_kl(full) + 1e-6).all()
    assert not mask_complete(expert, amateur, 0.2, VOCABULARY).any()
    strict = contrast(ids, expert, amateur, **settings(beta=-1.0))
    assert len(strict.steps) == 0 and strict.incomplete == len(ids) - 1
    loose = contrast(ids, expert, amateur, **settings(beta=-1.0, keep_incomplete=True))
    assert not loose.mask_complete.any() and 0 < len(loose.steps) < len(ids)
    for index, step in enumerate(loose.steps):
        assert ids[step, 0] not in loose.label_ids[loose.label_offsets[index] : loose.label_offsets[index + 1]]


def test_a_step_without_a_single_known_id_says_nothing():
    expert, unknown = np.log([[0.6, 0.4]]), np.full((1, 2), -np.inf)
    assert kl_lower_bound(expert, unknown) == [0.0] and covered_mass(expert, unknown) == [0.0]


def test_plausible_set_and_its_certificate():
    expert = np.log(np.array([[0.5, 0.3, 0.09], [0.5, 0.3, 0.11]]))
    assert plausible(expert, 0.2).tolist() == [[True, True, False], [True, True, True]]
    assert mask_complete(expert, expert, 0.2, vocab_size=10).tolist() == [True, False]
    assert mask_complete(expert, expert, 0.2, vocab_size=3).tolist() == [True, True]


def test_selection_and_labels_agree_with_the_definition_over_the_full_vocabulary(full):
    expert, amateur = full
    ids, top_expert, top_amateur = top_k(full, VOCABULARY)
    kept = contrast(ids, top_expert, top_amateur, **settings())
    informative = np.flatnonzero(plain_kl(full) > 0.4)
    assert kept.steps.tolist() == [step for step in informative if step >= 1]
    assert kept.incomplete == 0 and kept.mask_complete.all()
    for index, step in enumerate(kept.steps):
        label = np.zeros(VOCABULARY)
        inside = np.exp(expert[step]) >= 0.2 * np.exp(expert[step]).max()
        label[inside] = np.exp(expert[step] - amateur[step])[inside]
        span = slice(kept.label_offsets[index], kept.label_offsets[index + 1])
        mine = np.zeros(VOCABULARY)
        mine[kept.label_ids[span]] = kept.label_weights[span]
        np.testing.assert_allclose(mine, label / label.sum(), atol=1e-6)


def test_first_step_keeps_earlier_steps_out(full):
    kept = contrast(*top_k(full, 20), **settings(beta=-1.0, first_step=150))
    assert kept.steps.min() >= 150


def test_a_trajectory_with_no_kept_step_gives_empty_arrays(full):
    kept = contrast(*top_k(full, 20), **settings(beta=1e9))
    assert len(kept.steps) == len(kept.label_ids) == len(kept.label_weights) == 0
    assert kept.label_offsets.tolist() == [0]
