"""The same commands on a real vocabulary: SmolLM2-135M and its weaker sibling, on GSM8K problems, in float32."""

import numpy as np
import pytest
from support.models.oracle import Oracle, disagreement
from support.servers.real_server import command

from client.contrast import kl_lower_bound
from client.runs.run import Run

PROBLEMS = 8


@pytest.fixture(scope="module")
def sampled(smollm2_server, tmp_path_factory):
    """A RUN of the first GSM8K problems."""
    from support.servers.real_server import SHARED_DATA

    problems = SHARED_DATA / "gsm8k_train.jsonl"
    if not problems.is_file():
        pytest.skip(f"no benchmark problems at {problems}: this clone stands alone")
    folder = tmp_path_factory.mktemp("smollm2")
    words = ["--server", smollm2_server.url, "--limit", PROBLEMS, "--max-tokens", 48]
    said = command("client", "sample", problems, folder / "run", *words)
    assert said.returncode == 0, said.stderr
    return Run(str(folder / "run"))


def test_both_models_agree_with_transformers_over_a_vocabulary_of_49152(sampled, smollm2):
    expert, amateur = map(Oracle, smollm2)
    lines = list(sampled.trajectories())
    assert len(lines) == PROBLEMS
    worst, precision, recall = 0.0, [], []
    for line in lines:
        p = expert.logprobs(line.prompt_token_ids, line.token_ids)
        q = amateur.logprobs(line.prompt_token_ids, line.token_ids)
        worst = max(worst, disagreement(line.expert_logprobs, p, line.top_ids))
        worst = max(worst, disagreement(line.amateur_logprobs, q, line.top_ids))
        exact = (np.exp(p) * (p - q)).sum(axis=1)
        bound = kl_lower_bound(line.expert_logprobs, line.amateur_logprobs)
        assert (bound <= exact + 1e-4).all()
        precision += (exact[bound > 0.4] > 0.4 - 1e-4).tolist()
        recall += (bound[exact > 0.4] > 0.4).tolist()
    assert worst <= 2e-4
    assert all(precision) and len(recall) > 20 and np.mean(recall) > 0.85


def test_the_summary_counts_steps_of_a_real_model(sampled):
    totals = sampled.completion().totals
    assert totals.problems == PROBLEMS and totals.failed == 0
    assert 0 < totals.kept_share < 1 and 0.5 < totals.mean_covered_mass < 1
