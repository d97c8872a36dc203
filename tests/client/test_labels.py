"""Labels that stay near the expert: their formulas over the whole vocabulary, their bound, and select top.

The client sees the expert's k best ids alone; with k the whole vocabulary, or a plausible set that is proved whole, its
labels must be those of the distributions as they are.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs.distributions import alphas, ks, pairs, seen
from support.runs.made_run import VOCABULARY, make_manifest, make_trajectory

import client.runs.build
from client.contrast import contrast, kl_lower_bound, label_shifts
from client.errors import RunError
from client.protocol.requests import ContrastSettings, JobRequest
from client.runs.build import build_run, top_cut
from client.runs.run import Run
from client.runs.samples import sample_of

gammas = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.floats(0, 5))
shifts = st.one_of(st.just(0.0), st.floats(1e-4, 2.0))
some = settings(max_examples=120, deadline=None)
kinds = st.sampled_from(["contrast", "tilt"])


def made(pair, k, alpha, **settings):
    """Every step that may be kept, labelled."""
    return contrast(
        *seen(pair, k), alpha=alpha, beta=0.0, first_step=0, vocab_size=pair[0].shape[1], select="all", **settings
    )


def by_step(found):
    """ids and weights of each kept step."""
    ends = found.label_offsets
    return {
        int(step): (found.label_ids[a:b], found.label_weights[a:b].astype(np.float64))
        for step, a, b in zip(found.steps, ends, ends[1:], strict=False)
    }


def of_the_whole_vocabulary(pair, step, alpha, favour, against):
    """Plausible ids and exp(favour log pi_E - against log pi_A) over them, normalised, and the expert's own."""
    expert, amateur = (array[step].astype(np.float32).astype(np.float64) for array in pair[:2])
    inside = np.flatnonzero(expert >= expert.max() + np.log(alpha))
    values = favour * expert[inside] - against * amateur[inside]
    label, own = np.exp(values - values.max()), np.exp(expert[inside])
    return inside, label / label.sum(), own / own.sum()


def divergence(w, p):
    return float(np.where(w > 0, w * (np.log(np.where(w > 0, w, 1)) - np.log(p)), 0).sum())


def in_order_of(ids, inside):
    return np.argsort(ids)[np.searchsorted(np.sort(ids), inside)]


@some
@given(pairs(), ks, alphas, gammas)
def test_a_tilted_label_is_that_of_the_whole_vocabulary(pair, k, alpha, gamma):
    for step, (ids, weights) in by_step(made(pair, k, alpha, labels="tilt", gamma=gamma)).items():
        inside, label, _ = of_the_whole_vocabulary(pair, step, alpha, 1 + gamma, gamma)
        assert set(ids) == set(inside)
        np.testing.assert_allclose(weights[in_order_of(ids, inside)], label, atol=1e-6)


@some
@given(pairs(), ks, alphas, st.booleans())
def test_a_tilt_of_0_is_the_experts_own_label_and_a_large_one_the_contrasts_favourite(pair, k, alpha, keep_incomplete):
    own = made(pair, k, alpha, labels="expert", keep_incomplete=keep_incomplete)
    tilted = made(pair, k, alpha, labels="tilt", gamma=0.0, keep_incomplete=keep_incomplete)
    assert own.label_ids.tolist() == tilted.label_ids.tolist()
    np.testing.assert_allclose(tilted.label_weights, own.label_weights, atol=1e-7)


@some
@given(pairs(), ks, alphas, kinds, gammas, shifts)
def test_a_bounded_label_meets_its_bound_and_is_the_label_itself_where_that_does_not_exceed_it(
    pair, k, alpha, labels, gamma, most
):
    free = by_step(made(pair, k, alpha, labels=labels, gamma=gamma))
    bounded = by_step(made(pair, k, alpha, labels=labels, gamma=gamma, max_shift=most))
    favour, against = (1, 1) if labels == "contrast" else (1 + gamma, gamma)
    assert free.keys() == bounded.keys()
    for step, (ids, weights) in bounded.items():
        inside, label, own = of_the_whole_vocabulary(pair, step, alpha, favour, against)
        weights = weights[in_order_of(ids, inside)]
        assert abs(weights.sum() - 1) < 1e-6
        if divergence(label, own) <= most:
            np.testing.assert_array_equal(bounded[step][1], free[step][1])
            continue
        assert divergence(weights / weights.sum(), own) == pytest.approx(most, abs=1e-6)
        held = (weights > 1e-6) & (label > 1e-6)  # log w is between log pi_E and log v, by one share s at every id
        toward, moved = np.log(label[held] / own[held]), np.log(weights[held] / own[held])
        apart = toward - toward[0]
        s = (moved - moved[0]) @ apart / max(apart @ apart, 1e-12)
        assert -1e-3 <= s <= 1 + 1e-3
        np.testing.assert_allclose(moved - moved[0], s * apart, atol=2e-2)


@some
@given(pairs(), ks, alphas, st.sampled_from(["contrast", "tilt", "expert"]), st.booleans())
def test_shifts_are_divergences_from_the_expert_on_the_plausible_set(pair, k, alpha, labels, keep_incomplete):
    ids, log_p, log_q = seen(pair, k)
    found = made(pair, k, alpha, labels=labels, keep_incomplete=keep_incomplete)
    shifts = label_shifts(found, ids, log_p, log_q, alpha)
    for place, (step, (label, weights)) in enumerate(by_step(found).items()):
        columns = [ids[step].tolist().index(token) for token in label]
        own = np.exp(log_p[step, columns].astype(np.float64))
        assert shifts.nats[place] == pytest.approx(divergence(weights, own / own.sum()), abs=1e-5)
        heaviest = weights.max()
        best = {token for token, p in zip(ids[step], log_p[step], strict=True) if p == log_p[step].max()}
        assert shifts.overturned[place] == all(weights[place_] < heaviest for place_, token in enumerate(label)
                                               if token in best)  # fmt: skip
        assert weights[label.tolist().index(shifts.heaviest[place])] == heaviest == shifts.weight[place]
        assert ids[step, shifts.columns[place]] == shifts.heaviest[place]
        if labels == "expert":
            assert shifts.nats[place] < 1e-6 and shifts.overturned[place] == (not best & set(label))


def test_a_token_that_is_taken_though_it_is_implausible_is_held_against_what_is_known_of_it():
    trajectory = make_trajectory("p", seed=2, tokens=6)
    ids, log_p, log_q = trajectory.top_ids, trajectory.expert_logprobs, trajectory.amateur_logprobs
    taken = np.array([ids[0, 0], ids[1, 5], 48, ids[3, 0], ids[4, 0], ids[5, 0]], np.int32)
    assert 48 not in ids[2]
    settings = {"alpha": 0.2, "beta": 0.4, "first_step": 0, "vocab_size": VOCABULARY}
    found = contrast(ids, log_p, log_q, **settings, select="all", labels="onehot", token_ids=taken)
    shifts = label_shifts(found, ids, log_p, log_q, 0.2)
    assert found.steps.tolist() == [0, 1, 2, 3, 4, 5]
    p = np.exp(log_p.astype(np.float64))
    mass = np.where(p >= 0.2 * p.max(axis=1, keepdims=True), p, 0).sum(axis=1)
    expected = [mass[0] / p[0, 0], (mass[1] + p[1, 5]) / p[1, 5], (mass[2] + p[2, -1]) / p[2, -1]]
    np.testing.assert_allclose(shifts.nats[:3], np.log(expected), atol=1e-6)
    assert shifts.overturned.tolist()[:3] == [False, True, True] and shifts.columns.tolist()[:3] == [0, 5, 8]


@pytest.fixture
def source(tmp_path):
    """A complete RUN of twelve trajectories in three parts, of which one repeats a key; steps with equal bounds."""
    run = Run(str(tmp_path / "source"))
    run.claim(make_manifest(), b"{}")
    trajectories = [make_trajectory(f"p{index}", seed=index % 9, tokens=9 + index % 9) for index in range(12)]
    for trajectory in trajectories[::3]:
        for rows in (trajectory.top_ids, trajectory.expert_logprobs, trajectory.amateur_logprobs):
            rows[2:5] = rows[1]
    for begin in range(0, 12, 4):
        run.write(trajectories[begin : begin + 4], {}, run.manifest())
    run.write(trajectories[:2], {}, run.manifest())
    run.seal(run.totals(run.manifest()))
    return run


def kept_of(samples):
    return [(s.problem_id, s.sample_index, int(step)) for s in samples for step in s.contrast.steps]


def test_top_keeps_the_share_with_the_largest_bounds_of_the_whole_run(source, tmp_path):
    """So also wherever the cut falls between equal bounds, of one trajectory or of several."""
    ranked = []
    for t in source.trajectories():
        bounds = kl_lower_bound(t.expert_logprobs, t.amateur_logprobs)
        whole = t.expert_logprobs[:, -1] < t.expert_logprobs[:, 0] + np.log(0.2)
        ranked += [(-bounds[step], t.problem_id, 0, step) for step in range(1, len(bounds)) if whole[step]]
    ranked.sort()
    assert len({row[0] for row in ranked}) < len(ranked) - 5
    made = source.manifest()
    between = {count for count in range(1, len(ranked)) if ranked[count - 1][0] == ranked[count][0]}
    assert len(between) >= 5
    for count in sorted({*between, *range(1, len(ranked) + 1, 5), len(ranked)}):
        settings = made.model_copy(update={"select": "top", "keep": count / len(ranked)})
        settings = settings.model_copy(update={"top_cut": top_cut(source, settings)})
        samples = [sample_of(trajectory, settings) for trajectory in source.trajectories()]
        assert sorted(kept_of(samples)) == sorted(row[1:] for row in ranked[:count])
    new = Run(str(tmp_path / "new"))
    assert build_run(source, new, ContrastSettings(select="top", keep=0.33)).sealed
    assert new.manifest().keep == 0.33 and new.completion().totals.kept == round(0.33 * len(ranked))
    least = Run(str(tmp_path / "least"))
    assert build_run(source, least, ContrastSettings(select="top", keep=1e-6)).totals.kept == 1


def test_a_cut_does_not_depend_on_a_processors_last_digits(source, monkeypatch):
    """With and without AVX-512, sums of float64 differ in their last digits."""
    made = source.manifest()
    shares = [made.model_copy(update={"select": "top", "keep": share / 20}) for share in range(1, 21)]
    here = [top_cut(source, settings) for settings in shares]
    bound = client.runs.build.kl_lower_bound
    monkeypatch.setattr(client.runs.build, "kl_lower_bound", lambda *logprobs: bound(*logprobs) * (1 + 4e-16))
    assert [top_cut(source, settings) for settings in shares] == here


def test_top_with_everything_is_all_and_its_samples_can_be_made_again(source, tmp_path):
    everything, top = Run(str(tmp_path / "all")), Run(str(tmp_path / "top"))
    build_run(source, everything, ContrastSettings(select="all", labels="tilt", gamma=1.0, max_shift=0.2))
    build_run(source, top, ContrastSettings(select="top", keep=1.0, labels="tilt", gamma=1.0, max_shift=0.2))
    half = Run(str(tmp_path / "half"))
    build_run(source, half, ContrastSettings(select="top", keep=0.5, labels="tilt", gamma=1.0, max_shift=0.2))
    for part in top.parts("samples"):
        assert (tmp_path / "top" / "samples" / f"{part}.parquet").read_bytes() == (
            tmp_path / "all" / "samples" / f"{part}.parquet"
        ).read_bytes()
    lost = tmp_path / "half" / "samples" / f"{half.parts('samples')[1]}.parquet"
    had = lost.read_bytes()
    lost.unlink()
    assert half.mend(half.manifest()) == 1 and lost.read_bytes() == had


def test_top_waits_for_the_whole_run(source, tmp_path):
    (tmp_path / "source" / "complete.json").unlink()
    with pytest.raises(RunError, match=r"source is not complete yet, and --select top chooses from the whole RUN"):
        build_run(source, Run(str(tmp_path / "new")), ContrastSettings(select="top"))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="select top needs the whole RUN"):
        JobRequest(run="r", problems_url="p.jsonl", select="top")


def test_run_json_carries_what_a_choice_needs_and_nothing_else(source, tmp_path):
    assert ContrastSettings(labels="tilt").gamma == 0.5 and ContrastSettings(select="top").keep == 0.05
    assert ContrastSettings().model_dump(include={"gamma", "max_shift", "keep"}) == dict.fromkeys(
        ("gamma", "max_shift", "keep")
    )
    gentle = Run(str(tmp_path / "gentle"))
    build_run(source, gentle, ContrastSettings(labels="tilt", max_shift=0.3))
    made = gentle.manifest()
    assert (made.labels, made.gamma, made.max_shift) == ("tilt", 0.5, 0.3)
    with pytest.raises(RunError, match=r"gamma: 0\.5 against 1\.0"):
        build_run(source, gentle, ContrastSettings(labels="tilt", gamma=1.0, max_shift=0.3))
    with pytest.raises(RunError, match=r"max_shift: 0\.3 against 0\.4"):
        build_run(source, gentle, ContrastSettings(labels="tilt", max_shift=0.4))
    assert made.changed(labels="contrast")["gamma"] is None and made.changed(labels="contrast")["max_shift"] == 0.3
    assert made.changed(labels="onehot")["max_shift"] is None and made.changed(gamma=1.0)["gamma"] == 1.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gamma": 1.0}, "gamma belongs to labels tilt, and these are contrast"),
        ({"labels": "expert", "max_shift": 0.1}, "max_shift belongs to labels contrast or tilt"),
        ({"keep": 0.1}, "keep belongs to select top, and this is kl"),
        ({"labels": "tilt", "gamma": -1.0}, "greater than or equal to 0"),
        ({"max_shift": float("nan")}, "finite"),
        ({"select": "top", "keep": 0.0}, "greater than 0"),
        ({"select": "top", "keep": 1.1}, "less than or equal to 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        ContrastSettings(**settings)
