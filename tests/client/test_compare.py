"""RUNs side by side: figures against plain computations, and what is refused."""

import json
import sys

import numpy as np
import pytest
from support.runs.made_run import VOCABULARY, make_manifest, make_trajectory

from client.__main__ import main
from client.contrast import contrast, kl_lower_bound
from client.errors import RunError
from client.protocol.requests import ContrastSettings
from client.report.compare import compare_runs
from client.runs.build import build_run
from client.runs.run import Run


def make_run(folder, trajectories, **changes):
    run = Run(str(folder))
    run.claim(make_manifest(**changes), b"{}")
    run.write(trajectories, {}, run.manifest())
    return run


@pytest.fixture
def trajectories():
    return [make_trajectory(f"p{index}", seed=index, tokens=20 + index) for index in range(8)]


@pytest.fixture
def run(tmp_path, trajectories):
    return make_run(tmp_path / "one", trajectories)


def test_figures_agree_with_a_plain_computation(run, trajectories, tmp_path):
    amateur = make_manifest().amateur.model_copy(update={"id": "/weaker", "model_fingerprint": "w"})
    weaker = make_run(tmp_path / "two", trajectories, amateur=amateur, alpha=0.1, beta=0.2, first_step=2)
    run.seal(run.totals(run.manifest()))
    first, second = compare_runs([run, weaker])
    assert (first.amateur, first.sealed, second.amateur, second.sealed) == ("/amateur", True, "/weaker", False)
    for figures, alpha, beta, start in ((first, 0.2, 0.4, 1), (second, 0.1, 0.2, 2)):
        bounds, best, masses, entropies, kept, incomplete = [], [], [], [], 0, 0
        for t in trajectories:
            bounds.append(kl_lower_bound(t.expert_logprobs, t.amateur_logprobs)[start:])
            q = np.exp(t.amateur_logprobs[start:].astype(float))
            rest = 1 - q.sum(axis=1)
            other = q[:, 1:].max(axis=1) > q[:, 0]
            best.append(np.where(other, "other", np.where(q[:, 0] >= rest, "same", "open")))
            masses.append(np.exp(t.expert_logprobs[start:].astype(float)).sum(axis=1))
            made = contrast(t.top_ids, t.expert_logprobs, t.amateur_logprobs, alpha=alpha, beta=beta,
                            first_step=start, vocab_size=VOCABULARY)  # fmt: skip
            kept, incomplete = kept + len(made.steps), incomplete + made.incomplete
            for a, b in zip(made.label_offsets[:-1], made.label_offsets[1:], strict=True):
                weights = made.label_weights[a:b].astype(float)
                entropies.append(-(weights * np.log(weights)).sum())
        steps, answers = len(np.concatenate(bounds)), np.concatenate(best)
        assert (figures.steps, figures.kept, figures.incomplete) == (steps, kept, incomplete)
        assert figures.kept_share == pytest.approx(kept / steps) and figures.trajectories == 8
        assert figures.same_top1 == pytest.approx((answers == "same").mean()) and 0 < figures.same_top1 < 1
        assert figures.other_top1 == pytest.approx((answers == "other").mean()) and (answers == "open").any()
        assert figures.mean_covered_mass == pytest.approx(np.concatenate(masses).mean())
        assert figures.mean_label_entropy == pytest.approx(np.mean(entropies), rel=1e-5) and figures.incomplete > 0
        median = np.sort(np.concatenate(bounds))[int(0.5 * (steps - 1))]
        assert figures.kl_quantiles["0.5"] == pytest.approx(median, rel=1e-3)


def test_a_built_run_is_compared_with_the_one_it_was_built_from(run, tmp_path):
    new = Run(str(tmp_path / "new"))
    build_run(run, new, ContrastSettings(labels="onehot", select="all"))
    one, other = compare_runs([run, new])
    assert other.mean_label_entropy == 0.0 < one.mean_label_entropy and other.kept > one.kept
    assert one.kl_quantiles == other.kl_quantiles


def test_runs_of_other_problems_experts_or_decoding_are_refused_with_each_difference_named(run, trajectories, tmp_path):
    made = make_manifest()
    other = make_run(
        tmp_path / "other",
        trajectories,
        problems=made.problems.model_copy(update={"digest": "z"}),
        expert=made.expert.model_copy(update={"model_fingerprint": "ff"}),
        decoding=made.decoding.model_copy(update={"max_tokens": 64}),
        system_prompt=None,
        beta=0.1,
    )
    with pytest.raises(RunError) as caught:
        compare_runs([run, other])
    named = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert sorted(named) == ["decoding.max_tokens", "expert.model_fingerprint", "problems", "system_prompt"]
    assert f"{other} cannot be compared with {run}" in str(caught.value)


def test_one_run_or_one_without_trajectories_is_refused(run, tmp_path):
    with pytest.raises(RunError, match="at least two"):
        compare_runs([run])
    imported = Run(str(tmp_path / "imported"))
    imported.claim(make_manifest(imported_from="samples.jsonl"), b"{}")
    with pytest.raises(RunError, match="holds samples only"):
        compare_runs([run, imported])


def test_the_command_prints_a_table_or_json(run, trajectories, tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "two", trajectories, beta=0.1)
    words = ["lightreasoner-client", "compare", str(tmp_path / "one"), str(tmp_path / "two")]
    monkeypatch.setenv("COLUMNS", "200")
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        said = capsys.readouterr().out
        if more:
            assert [figures["beta"] for figures in json.loads(said)["runs"]] == [0.4, 0.1]
        else:
            assert "kept share" in said and "β 0.1" in said and str(tmp_path / "two") in said
