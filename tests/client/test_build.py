"""Another RUN from stored trajectories: the definitions of every selection and label, against plain computations."""

import dataclasses
import json

import numpy as np
import pytest
from support.runs.made_run import VOCABULARY, make_manifest, make_trajectory

from client.contrast import contrast, kl_lower_bound, top1
from client.errors import RunError
from client.protocol.requests import ContrastSettings, Failure
from client.runs.build import build_run
from client.runs.manifest import RunManifest
from client.runs.run import Run
from client.runs.tally import Divergences


@pytest.fixture
def trajectories():
    return [make_trajectory(f"p{index}", seed=index, tokens=10 + index) for index in range(12)]


@pytest.fixture
def source(tmp_path, trajectories):
    run = Run(str(tmp_path / "source"))
    run.claim(make_manifest(), b'{"the": "tokenizer"}')
    for begin in (0, 4, 8):
        run.write(trajectories[begin : begin + 4], {"p0": "How many?"}, run.manifest())
    run.write_failures([Failure("gone", 0, "context_length_exceeded", "too long")])
    run.seal(run.totals(run.manifest()))
    return run


def built(source, folder, **settings):
    run = Run(str(folder))
    build_run(source, run, ContrastSettings(**settings))
    return run


def plain(trajectory, alpha=0.2, beta=0.4):
    """Steps that may be kept, those kept by divergence, and the plausible ids of every step; a loop a step."""
    p, q = np.exp(trajectory.expert_logprobs.astype(float)), np.exp(trajectory.amateur_logprobs.astype(float))
    eligible, kept, plausible = [], [], []
    for t in range(len(p)):
        inside = [i for i in range(p.shape[1]) if p[t, i] >= alpha * p[t].max()]
        plausible.append(inside)
        rest_p, rest_q = 1 - p[t].sum(), 1 - q[t].sum()
        bound = (p[t] * np.log(p[t] / q[t])).sum() + rest_p * np.log(rest_p / rest_q)
        if t >= 1 and len(inside) < p.shape[1]:
            eligible.append(t)
            if bound > beta:
                kept.append(t)
    return eligible, kept, plausible


def labels_of(sample):
    kept = sample.contrast
    for index, step in enumerate(kept.steps):
        span = slice(kept.label_offsets[index], kept.label_offsets[index + 1])
        yield int(step), kept.label_ids[span], kept.label_weights[span]


def test_a_built_run_holds_what_sampling_with_those_settings_would_have_left(source, trajectories, tmp_path):
    settings = {"alpha": 0.3, "beta": 0.1, "first_step": 3, "keep_incomplete": True}
    new = built(source, tmp_path / "new", **settings)
    sampled = Run(str(tmp_path / "sampled"))
    sampled.claim(make_manifest(**settings), b"{}")
    sampled.write(trajectories, {}, sampled.manifest())
    for one, other in zip(new.samples(), sampled.samples(), strict=True):
        np.testing.assert_array_equal(one.contrast.steps, other.contrast.steps)
        np.testing.assert_array_equal(one.contrast.label_weights, other.contrast.label_weights)
    assert not new.manifest().differences(sampled.manifest())
    totals = dataclasses.asdict(sampled.totals(sampled.manifest())) | {"failed": 1}
    assert dataclasses.asdict(new.completion().totals) == totals


def test_the_new_run_stands_alone_and_the_old_one_is_untouched(source, tmp_path):
    before = {file: file.read_bytes() for file in (tmp_path / "source").rglob("*") if file.is_file()}
    new = built(source, tmp_path / "new", beta=0.1)
    assert before == {file: file.read_bytes() for file in (tmp_path / "source").rglob("*") if file.is_file()}
    assert new.parts("samples") == new.parts("trajectories") == source.parts("trajectories")
    for part in source.parts("trajectories"):
        name = f"trajectories/{part}.parquet"
        assert new.bucket.get(name) == source.bucket.get(name)
    assert new.tokenizer() == source.tokenizer() and new.failures() == source.failures()
    assert new.manifest().built_from == str(source) and new.manifest().beta == 0.1
    again = built(new, tmp_path / "again", beta=0.4)  # a build of a build is the first RUN's samples
    for one, other in zip(again.samples(), source.samples(), strict=True):
        np.testing.assert_array_equal(one.contrast.steps, other.contrast.steps)


def test_all_keeps_every_complete_step_from_the_first_on(source, trajectories, tmp_path):
    new = built(source, tmp_path / "new", select="all")
    steps = {sample.problem_id: sample.contrast.steps.tolist() for sample in new.samples()}
    assert steps == {t.problem_id: plain(t)[0] for t in trajectories}
    incomplete = {sample.problem_id: sample.contrast.incomplete for sample in new.samples()}
    assert incomplete == {sample.problem_id: sample.contrast.incomplete for sample in source.samples()}
    kept = built(source, tmp_path / "kept", keep_incomplete=True)
    assert incomplete == {sample.problem_id: sample.contrast.incomplete for sample in kept.samples()}
    loose = built(source, tmp_path / "loose", select="all", keep_incomplete=True, alpha=0.001)
    assert {s.problem_id: s.contrast.steps.tolist() for s in loose.samples()} == {
        t.problem_id: list(range(1, len(t.token_ids))) for t in trajectories
    }


def test_random_draws_as_many_complete_steps_as_kl_keeps_and_each_trajectory_its_own(source, trajectories, tmp_path):
    new = built(source, tmp_path / "new", select="random")
    drawn = {sample.problem_id: sample.contrast.steps.tolist() for sample in new.samples()}
    kl = {t.problem_id: plain(t)[1] for t in trajectories}
    assert {name: len(steps) for name, steps in drawn.items()} == {name: len(steps) for name, steps in kl.items()}
    assert all(set(drawn[t.problem_id]) <= set(plain(t)[0]) for t in trajectories)
    loose = built(source, tmp_path / "loose", select="random", keep_incomplete=True)
    assert all(sample.contrast.mask_complete.all() for sample in loose.samples())
    assert drawn != kl and all(steps == sorted(set(steps)) for steps in drawn.values())
    other = built(source, tmp_path / "other", select="random", select_seed=1)
    assert drawn != {sample.problem_id: sample.contrast.steps.tolist() for sample in other.samples()}


def test_a_seed_of_nothing_drawn_does_not_tell_runs_apart(source, tmp_path):
    drawn = built(source, tmp_path / "drawn", select="random", select_seed=7)
    back = built(drawn, tmp_path / "back", select="kl", select_seed=7)
    assert not back.manifest().differences(source.manifest())


def test_a_random_draw_does_not_depend_on_parts_or_their_order(source, trajectories, tmp_path):
    new = built(source, tmp_path / "new", select="random", select_seed=7)
    shuffled = Run(str(tmp_path / "shuffled"))
    shuffled.claim(make_manifest(select="random", select_seed=7), b"{}")
    for trajectory in reversed(trajectories):
        shuffled.write([trajectory], {}, shuffled.manifest())
    drawn = {sample.problem_id: sample.contrast.steps.tolist() for sample in new.samples()}
    assert drawn == {sample.problem_id: sample.contrast.steps.tolist() for sample in shuffled.samples()}
    twins = [dataclasses.replace(trajectories[-1], sample_index=index) for index in range(6)]
    several = shuffled.write(twins, {}, shuffled.manifest())
    assert len({tuple(sample.contrast.steps) for sample in several}) > 1


def test_a_random_draw_is_the_same_in_every_release():
    """The draw is a contract: a RUN is built again years later, and its samples must come out as they were."""
    made = make_trajectory("p", seed=3, tokens=20)
    settings = {"alpha": 0.2, "beta": 0.4, "first_step": 1, "vocab_size": VOCABULARY}
    arrays = made.top_ids, made.expert_logprobs, made.amateur_logprobs
    drawn = contrast(*arrays, **settings, select="random", seed=12345)
    raw = np.random.Philox(12345).random_raw(len(plain(made)[0]))
    expected = sorted(step for _, step in sorted(zip(raw, plain(made)[0], strict=True))[: len(plain(made)[1])])
    assert drawn.steps.tolist() == expected
    assert np.random.Philox(12345).random_raw(2).tolist() == RAW


def test_random_steps_are_drawn_evenly():
    made = make_trajectory("p", seed=3, tokens=20)
    settings = {"alpha": 0.2, "beta": 0.4, "first_step": 1, "vocab_size": VOCABULARY, "select": "random"}
    arrays = made.top_ids, made.expert_logprobs, made.amateur_logprobs
    draws = [contrast(*arrays, **settings, seed=seed).steps for seed in range(2000)]
    counts = np.bincount(np.concatenate(draws), minlength=20)[plain(made)[0]]
    expected = 2000 * len(plain(made)[1]) / len(plain(made)[0])
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_expert_labels_are_the_experts_probabilities_on_the_plausible_set(source, trajectories, tmp_path):
    new = built(source, tmp_path / "new", labels="expert")
    by_id = {t.problem_id: t for t in trajectories}
    sizes = []
    for sample in new.samples():
        trajectory = by_id[sample.problem_id]
        assert sample.contrast.steps.tolist() == plain(trajectory)[1]
        for step, ids, weights in labels_of(sample):
            inside = plain(trajectory)[2][step]
            p = np.exp(trajectory.expert_logprobs[step, inside].astype(float))
            assert ids.tolist() == trajectory.top_ids[step, inside].tolist()
            np.testing.assert_allclose(weights, p / p.sum(), rtol=1e-6)
            sizes.append(len(ids))
    assert max(sizes) > 1


def test_onehot_labels_are_the_tokens_of_the_trajectory_wherever_they_rank(source, trajectories, tmp_path):
    moved = dataclasses.replace(trajectories[3], problem_id="sampled", token_ids=trajectories[3].top_ids[:, 5].copy())
    source.write([moved], {}, source.manifest())
    new = built(source, tmp_path / "new", labels="onehot")
    steps = 0
    for sample in new.samples():
        for step, ids, weights in labels_of(sample):
            assert ids.tolist() == [sample.token_ids[step]] and weights.tolist() == [1.0]
            steps += 1
    assert steps > 12


def test_an_interrupted_build_goes_on_without_writing_anything_twice(source, tmp_path):
    def two_then_stop(parts):
        yield from parts[:2]
        raise KeyboardInterrupt

    new = Run(str(tmp_path / "new"))
    with pytest.raises(KeyboardInterrupt):
        build_run(source, new, ContrastSettings(beta=0.1), two_then_stop)
    assert len(new.parts("samples")) == 2 and new.completion() is None
    first, second = (tmp_path / "new" / "samples" / f"{part}.parquet" for part in new.parts("samples"))
    second.unlink()  # as if it had been stopped between a part's trajectories and its samples
    when = first.stat().st_mtime_ns
    again = build_run(source, new, ContrastSettings(beta=0.1))
    assert len(new.parts("samples")) == 3 and first.stat().st_mtime_ns == when
    whole = built(source, tmp_path / "whole", beta=0.1)
    assert second.read_bytes() == whole.bucket.get(f"samples/{second.name}")
    assert again.sealed and again.totals == build_run(source, whole, ContrastSettings(beta=0.1)).totals


def test_a_build_that_is_complete_reads_nothing_again(source, tmp_path, monkeypatch):
    new = Run(str(tmp_path / "new"))
    first = build_run(source, new, ContrastSettings(beta=0.1))
    monkeypatch.setattr(Run, "adopt", None)
    assert build_run(source, new, ContrastSettings(beta=0.1)) == first and first.sealed


def test_a_complete_build_of_a_run_that_was_given_more_since_says_so(source, tmp_path):
    new = Run(str(tmp_path / "new"))
    assert build_run(source, new, ContrastSettings(beta=0.1)).sealed
    source.reopen()
    source.write([make_trajectory("late", seed=50, tokens=9)], {}, source.manifest())
    with pytest.raises(RunError, match=r"new is complete, but .*source has 1 newer parts; name a new"):
        build_run(source, new, ContrastSettings(beta=0.1))


def test_a_run_that_is_still_being_sampled_gives_what_it_holds_and_later_the_rest(source, trajectories, tmp_path):
    (tmp_path / "source" / "complete.json").unlink()
    new = Run(str(tmp_path / "new"))
    assert not build_run(source, new, ContrastSettings(beta=0.1)).sealed and new.completion() is None
    source.write([make_trajectory("late", seed=50, tokens=9)], {}, source.manifest())
    source.seal(source.totals(source.manifest()))
    assert build_run(source, new, ContrastSettings(beta=0.1)).sealed
    assert len(list(new.samples())) == len(trajectories) + 1


def test_a_key_that_is_there_twice_is_counted_once_and_copied_as_it_is(source, trajectories, tmp_path):
    source.write(trajectories[:3], {}, source.manifest())
    new = Run(str(tmp_path / "new"))
    totals = build_run(source, new, ContrastSettings(beta=0.1)).totals
    assert totals.trajectories == 12 and totals == new.totals(new.manifest())
    assert new.parts("samples") == source.parts("trajectories") and len(new.parts("samples")) == 4


def test_a_place_that_is_taken_is_refused(source, tmp_path):
    new = built(source, tmp_path / "new", beta=0.1)
    with pytest.raises(RunError, match=r"beta: 0\.1 against 0\.2"):
        build_run(source, new, ContrastSettings(beta=0.2))
    with pytest.raises(RunError, match=r"labels: 'contrast' against 'expert'"):
        build_run(source, source, ContrastSettings(labels="expert"))
    other = Run(str(tmp_path / "other"))
    other.claim(make_manifest(), b"{}")
    other.write([make_trajectory("p0", seed=0, tokens=4)], {}, other.manifest())
    with pytest.raises(RunError, match=r"holds trajectories that .*/other does not"):
        build_run(other, new, ContrastSettings(beta=0.1))


def test_a_run_without_trajectories_is_refused_and_nothing_is_made(tmp_path):
    imported, empty = Run(str(tmp_path / "imported")), Run(str(tmp_path / "empty"))
    imported.claim(make_manifest(imported_from="samples.jsonl"), b"{}")
    empty.claim(make_manifest(), b"{}")
    with pytest.raises(RunError, match=r"imported from samples\.jsonl and holds samples only"):
        built(imported, tmp_path / "new", beta=0.1)
    with pytest.raises(RunError, match="holds no trajectory yet"):
        built(empty, tmp_path / "new", beta=0.1)
    assert not (tmp_path / "new").exists()


def test_run_json_of_before_selections_is_read_as_the_contrast(tmp_path):
    old = make_manifest().model_dump(exclude={"select", "labels", "select_seed", "built_from", "imported_from"})
    (tmp_path / "run.json").write_text(json.dumps(old))
    manifest = Run(str(tmp_path)).manifest()
    assert (manifest.select, manifest.labels) == (
        "kl",
        "contrast",
    ) and manifest.identity() == make_manifest().identity()
    for name, value in (("select", "all"), ("labels", "onehot"), ("select_seed", 1)):
        changed = RunManifest(**{**manifest.model_dump(), name: value})
        assert [line.split(":")[0] for line in manifest.differences(changed)] == [name]


def test_top1_says_only_what_can_be_known():
    amateur = np.log([[0.5, 0.2, 0.1], [0.3, 0.2, 0.1], [0.2, 0.3, 0.1], [0.5, 0.5, 1e-9], [0.4, 0.1, 0.1]])
    agreeing, differing = top1(amateur)
    assert agreeing.tolist() == [True, False, False, True, True]
    assert differing.tolist() == [False, False, True, False, False]
    unknown = np.array([[-np.inf, np.log(0.3)], [-np.inf, -np.inf]])
    assert [answer.tolist() for answer in top1(unknown)] == [[False, False], [True, True]]


def test_top1_never_contradicts_the_whole_vocabulary():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (500, VOCABULARY))
    expert = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    logits = logits + rng.normal(0, 1, logits.shape)
    amateur = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-expert, axis=1)[:, :8]
    agreeing, differing = top1(np.take_along_axis(amateur, ids, 1))
    truth = amateur.argmax(1) == ids[:, 0]
    assert truth[agreeing].all() and not truth[differing].any()
    assert agreeing.sum() > 50 and differing.sum() > 50 and (~agreeing & ~differing).any()


def test_divergences_are_counted_as_a_plain_sort_would_to_one_part_in_2048():
    values = np.random.default_rng(1).lognormal(-3, 3, 20_000).astype(np.float32)
    values[:50] = [-1e-7, 0.0] * 25
    counted = Divergences()
    for some in np.array_split(values, 37):
        counted.add(some)
    thresholds = np.array([0.0, 1e-6, 0.01, 0.4, 3.0, 1e6])
    low, high = [(values > t * (1 + 2**-11)).sum() for t in thresholds], [(values > t).sum() for t in thresholds]
    above = counted.above(thresholds)
    assert (low <= above).all() and (above <= high).all() and above[0] == high[0] and counted.count == 20_000
    for share in (0.1, 0.5, 0.9, 0.99):
        assert counted.quantile(share) == pytest.approx(np.quantile(values, share), rel=2e-3)
    assert counted.quantile(0.0) == 0.0 and np.isnan(Divergences().quantile(0.5))


def test_totals_agree_with_a_plain_pass(source, trajectories):
    totals = source.totals(source.manifest())
    bounds = np.concatenate([kl_lower_bound(t.expert_logprobs, t.amateur_logprobs)[1:] for t in trajectories])
    for share, value in totals.kl_quantiles.items():
        exact = np.sort(bounds)[int(float(share) * (len(bounds) - 1))]
        assert value == pytest.approx(exact, rel=2**-11, abs=1e-9)
    mass = np.concatenate([np.exp(t.expert_logprobs.astype(float)).sum(1)[1:] for t in trajectories])
    assert totals.mean_covered_mass == pytest.approx(mass.mean()) and totals.failed == 1


RAW = [7761547988346370368, 12048877680314648833]
"""What Philox says since its first release; see numpy's compatibility policy for bit generators."""
