"""Pairs that differ: an added token with another name, ids beyond the amateur's head, and no difference at all."""

import httpx
import numpy as np
import pytest
from support.models.oracle import Oracle, disagreement
from support.models.small_models import save_small_model
from support.servers.real_server import running_server
from word_problems import rows

from client.contrast import contrast, covered_mass, kl_lower_bound, mask_complete
from client.protocol.requests import parse_line

THINK, TOOL, END = 110, 111, 2
VOCABULARY, AMATEUR_VOCABULARY = 112, 111


@pytest.fixture(scope="module")
def unlike(tmp_path_factory):
    """Token 110 has another name in the amateur, 111 is beyond its head; its prompts are computed in chunks."""
    folder = tmp_path_factory.mktemp("unlike")
    expert = save_small_model(folder / "expert", VOCABULARY, 1, {THINK: "<|think|>", TOOL: "<|tool|>"})
    amateur = save_small_model(folder / "amateur", AMATEUR_VOCABULARY, 2, {THINK: "<|other|>"})
    with running_server(
        expert, amateur, folder, imported=True, amateur_arguments={"max_num_batched_tokens": 16, "max_num_seqs": 4}
    ) as server:
        yield server


@pytest.fixture(scope="module")
def expert(unlike):
    return Oracle(unlike.expert)


@pytest.fixture(scope="module")
def amateur(unlike):
    return Oracle(unlike.amateur)


def ask(server, problems, **fields):
    body = {"problems": problems, "top_k": VOCABULARY, **fields}
    response = httpx.post(f"{server.url}/v1/trajectories", json=body, timeout=120)
    return {line.problem_id: line for line in map(parse_line, response.text.splitlines()) if line}


def known_rows(line):
    """Both models' rows with the unknown ids' columns taken out: [T, 110] each, and their ids."""
    known = line.top_ids < THINK
    shape = (len(line.top_ids), THINK)
    return (array[known].reshape(shape) for array in (line.expert_logprobs, line.amateur_logprobs, line.top_ids))


def test_differing_tokens_are_listed(unlike):
    (card,) = (c for c in httpx.get(f"{unlike.url}/v1/models").json()["data"] if c["role"] == "amateur")
    assert card["unknown_tokens"] == [
        {"id": THINK, "expert": "<|think|>", "amateur": "<|other|>"},
        {"id": TOOL, "expert": "<|tool|>", "amateur": None},
    ]
    assert card["slots"] == 4, "its max_num_seqs"
    assert "'<|think|>' / '<|other|>'" in unlike.log.read_text(errors="replace")


def test_unknown_ids_have_no_amateur_logprob_and_the_others_are_exact(unlike, expert, amateur):
    problems = [{"id": str(n), "prompt_token_ids": list(range(6, 6 + n))} for n in (5, 40, 90)]
    compared = 0
    for line in ask(unlike, problems, max_tokens=24).values():
        unknown = line.top_ids >= THINK
        assert unknown.sum() == 2 * len(line.top_ids)
        assert np.isneginf(line.amateur_logprobs[unknown]).all() and np.isfinite(line.amateur_logprobs[~unknown]).all()
        exact = expert.logprobs(line.prompt_token_ids, line.token_ids)
        assert disagreement(line.expert_logprobs, exact, line.top_ids) <= 2e-4
        until = next((t + 1 for t, token in enumerate(line.token_ids) if token >= THINK), len(line.token_ids))
        _, scores, ids = known_rows(line)
        exact = amateur.logprobs(line.prompt_token_ids, np.where(line.token_ids >= THINK, 6, line.token_ids))
        assert disagreement(scores[:until], exact[:until], ids[:until]) <= 2e-4
        compared += until
    assert compared > 20


def test_the_amateur_reads_on_without_the_tokens_that_it_does_not_know(unlike, amateur):
    prompt, completion = [6, THINK, 7, 8], [20, THINK, TOOL, 21, 22, TOOL]
    (line,) = ask(unlike, [{"id": "x", "prompt_token_ids": prompt, "token_ids": completion}]).values()
    assert line.token_ids.tolist() == completion
    _, scores, ids = known_rows(line)
    # What the amateur has read before each step; after an unknown token it is what it was before it.
    read = [[6, 7, 8], [6, 7, 8, 20], [6, 7, 8, 20], [6, 7, 8, 20], [6, 7, 8, 20, 21], [6, 7, 8, 20, 21, 22]]
    for step, before in enumerate(read):
        exact = amateur.logprobs(np.array(before), np.array([6]))
        assert disagreement(scores[step : step + 1], exact, ids[step : step + 1]) <= 2e-4


def test_the_contrast_folds_unknown_ids_into_the_remainder_and_never_labels_them(unlike, expert):
    problems = [{"id": str(n), "prompt_token_ids": [6 + n, 7, 8]} for n in range(30)]
    incomplete = 0
    for line in ask(unlike, problems, max_tokens=24).values():
        arrays = line.expert_logprobs, line.amateur_logprobs
        mass = np.exp(expert.logprobs(line.prompt_token_ids, line.token_ids))
        np.testing.assert_allclose(covered_mass(*arrays), 1 - mass[:, THINK:].sum(axis=1), atol=1e-4)
        assert np.isfinite(kl_lower_bound(*arrays)).all()
        settings = {"alpha": 0.2, "beta": 0.0, "first_step": 0, "vocab_size": VOCABULARY}
        kept = contrast(line.top_ids, *arrays, **settings)
        assert (kept.label_ids < THINK).all()
        threatened = (mass[:, THINK:] >= 0.2 * mass.max(axis=1, keepdims=True)).any(axis=1)
        complete = mask_complete(*arrays, alpha=0.2, vocab_size=VOCABULARY)
        assert (complete == ~threatened).all()
        incomplete += int((~complete).sum())
    assert incomplete > 0


def test_an_amateur_equal_to_the_expert_gives_no_divergence_and_uniform_labels(equal_server):
    problems = [{"id": row["id"], "question": row["question"]} for row in rows("dev", 32)]
    lines = ask(equal_server, problems, max_tokens=48, top_k=32)
    assert len(lines) == 32
    for line in lines.values():
        arrays = line.expert_logprobs, line.amateur_logprobs
        assert np.abs(kl_lower_bound(*arrays)).max() < 1e-4
        kept = contrast(line.top_ids, *arrays, alpha=0.2, beta=-1.0, first_step=0, vocab_size=110)
        sizes = np.diff(kept.label_offsets)
        np.testing.assert_allclose(kept.label_weights, np.repeat(1 / sizes, sizes), atol=1e-4)
