"""Parts of the check that cover one thing each: the start, exactness, sampling, training. Each returns `Figures`."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from gpu.card import MIB, cpu_seconds
from gpu.session import TOP_K, Figures, Session
from prometheus_client.parser import text_string_to_metric_families
from support.models.oracle import Oracle
from support.servers.real_server import ROOT, RunningServer, engine_processes

from client.protocol.requests import Failure, Trajectory, parse_line
from client.runs.run import Run

EXACT = 2e-3
"""Largest difference in float32, in nats: other kernels add in another order."""
MANY = 128
PHASES = ("checks and imports", "expert loads", "amateur loads", "warm-up")
MARKS = ("listening on ", "expert: vLLM's model runner", "amateur: vLLM's model runner", "ready: ")
"""Beginnings of lines in the server's log: each ends a phase."""
PLAN = re.compile(r"memory of a card of [\d.]+ GiB: (\w+): weights ([\d.]+) GiB, beside them ([\d.]+), cache ([\d.]+)")
"""A line in the server's log on a GPU: the memory that each engine may take."""
IEEE = {"TRITON_F32_DEFAULT": "ieee"}
"""vLLM's attention in float32 is Triton's, which by default multiplies in TF32, with ten bits of each number."""
PUBLISHED_PART = 50
TIGHT_TOKENS, TIGHT_SEQUENCES, TIGHT_CONTEXT = 16, 8, 256
TIGHT_BLOCKS = {"expert": 36, "amateur": 20}
"""Cache blocks of 16 tokens: enough for one or two whole contexts, while eight requests run."""
GENERATE = """
import json, sys, time
from vllm import LLM, SamplingParams
from client.problems.reader import read_problems
model, problems, limit, max_tokens, top_k, arguments = sys.argv[1:]
llm = LLM(model, generation_config="vllm", disable_log_stats=True, **json.loads(arguments))
system = {"role": "system", "content": "Please reason step by step."}
chats = [[system, {"role": "user", "content": row.question}] for row in read_problems(problems, int(limit))]
params = SamplingParams(temperature=0, max_tokens=int(max_tokens), logprobs=int(top_k), detokenize=False)
llm.chat(chats[:64], params, use_tqdm=False)
llm.reset_prefix_cache()
began = time.perf_counter()
llm.chat(chats, params, use_tqdm=False)
print("\\nseconds", time.perf_counter() - began, flush=True)
"""


def start(session: Session) -> Figures:
    """Both engines with default settings: seconds to ready by phase, memory by engine."""
    found, server = Figures(), session.shared
    found.add("seconds to ready", session.start_seconds)
    for phase, seconds in phases(server):
        found.add(f"of which {phase}", seconds)
    pids = engine_processes(server)
    found.claim(len(pids) == 2, f"{len(pids)} engine processes, where two were expected")
    planned = {match[1]: 1024 * sum(map(float, match.groups()[1:])) for match in plans(server)}
    for role, held in memory(session, server, pids):
        said = f"planned {planned[role]:.0f}" if role in planned else ""
        found.add(f"{role}, memory taken, MiB", held / MIB, said)
        found.add(f"{role}, slots", server.ask("GET", "/v1/models").json()["data"][role == "amateur"]["slots"])
    for role, labels in cache_settings(server):
        found.add(f"{role}, planned: share of the card", labels["gpu_memory_utilization"])
        found.add(f"{role}, planned: bytes of cache", labels["kv_cache_memory_bytes"])
        found.add(f"{role}, blocks of cache", labels["num_gpu_blocks"])
    return found


def memory(session: Session, server: RunningServer, pids: list[int]) -> Iterator[tuple[str, int]]:
    """Bytes that each engine takes. On a GPU: how much more is in use when the engine has loaded."""
    if not session.start_looks:
        yield from zip(("expert", "amateur"), (session.card.held_by([pid]) for pid in pids), strict=False)
        return
    before, loaded, _, ready = marks(server)
    used = {
        time: next((look.used for look in session.start_looks if look.time >= time), session.start_looks[-1].used)
        for time in (before, loaded, ready)
    }
    yield "expert", used[loaded] - used[before]
    yield "amateur", used[ready] - used[loaded]  # with what the warm-up adds to both


def plans(server: RunningServer) -> Iterator[re.Match[str]]:
    return filter(None, (PLAN.match(line["message"]) for line in lines_of(server)))


def cache_settings(server: RunningServer) -> Iterator[tuple[str, dict[str, str]]]:
    """Each engine's cache settings, from vLLM's own metrics."""
    for family in text_string_to_metric_families(server.ask("GET", "/metrics").text):
        for sample in family.samples:
            if sample.name.startswith("vllm:cache_config_info"):
                yield sample.labels["role"], sample.labels


def phases(server: RunningServer) -> Iterator[tuple[str, float]]:
    """Seconds of each phase, by the times in the log, which are whole seconds."""
    first = datetime.fromisoformat(next(lines_of(server))["time"])
    for phase, (before, after) in zip(PHASES, itertools.pairwise([first, *marks(server)]), strict=True):
        yield phase, (after - before).total_seconds()


def marks(server: RunningServer) -> list[datetime]:
    """When each phase ended."""
    return [
        next(datetime.fromisoformat(line["time"]) for line in lines_of(server) if line["message"].startswith(mark))
        for mark in MARKS
    ]


def lines_of(server: RunningServer) -> Iterator[dict[str, Any]]:
    """The JSON lines of the server's log. Libraries print other lines between them."""
    for text in server.log.read_text(errors="replace").splitlines():
        if text.startswith('{"time"'):
            yield json.loads(text)


def exactness(session: Session) -> Figures:
    """Compare both models with transformers in float32 on the same device. On a GPU in float32 with preemption, then in
    the default dtype; on a CPU in float32.
    """
    found, usual = Figures(), asked(session, session.shared)
    if session.card.cuda:
        tight = {
            "max_num_seqs": TIGHT_SEQUENCES, "max_num_batched_tokens": 4 * TIGHT_TOKENS, "gpu_memory_utilization": 0.45,
            "long_prefill_token_threshold": TIGHT_TOKENS, "block_size": 16,
        }  # fmt: skip
        changes = {
            f"{role}_arguments": {**tight, "num_gpu_blocks_override": blocks} for role, blocks in TIGHT_BLOCKS.items()
        }
        with session.server(dtype="float32", max_model_len=TIGHT_CONTEXT, environment=IEEE, **changes) as server:
            lines = asked(session, server)
            for role in ("expert", "amateur"):
                count = server.metric("vllm:num_preemptions_total", role=role)
                found.add(f"{role}, requests preempted", count)
                crowded = session.pair.name != "demo"  # whose answers are short: its requests hardly meet
                found.claim(count > 0 or not crowded, f"no request of the {role} was preempted")
        compare(session, "float32", lines, found, EXACT)
    # On a CPU the server uses float32, and tests/server/test_model_runner.py tests the tight cache.
    name, most = ("default dtype", None) if session.card.cuda else ("float32", EXACT)
    compare(session, name, usual, found, most)
    return found


def asked(session: Session, server: RunningServer) -> list[Trajectory]:
    """Trajectories, generated and given, with few and many ids a step and with unknown tokens, all asked at once."""
    cards = [card["vocab_size"] for card in server.ask("GET", "/v1/models").json()["data"]]
    questions, many = session.questions(session.sizes.compared), min(MANY, *cards)
    rng = np.random.default_rng(0)
    completion = rng.integers(6, 100, 24).tolist()
    if cards[0] > cards[1]:
        completion[5] = completion[-1] = cards[1] + 2  # beyond the amateur's head
    given = [{**row, "id": f"given-{row['id']}", "token_ids": completion} for row in questions[:8]]
    bodies = [
        {"problems": questions[::2], "top_k": TOP_K, "max_tokens": session.sizes.tokens},
        {"problems": questions[1::2], "top_k": many, "max_tokens": session.sizes.tokens},
        {"problems": questions[:4], "top_k": TOP_K, "max_tokens": 48, "n": 4, "temperature": 1.0, "seed": 1},
        {"problems": given, "top_k": many},
    ]

    def ask(body: dict[str, object]) -> list[Trajectory]:
        answer = httpx.post(f"{server.url}/v1/trajectories", json={**body, "encoding": "base64"}, timeout=600)
        lines = [parse_line(line) for line in answer.text.splitlines()]
        failures = [line for line in lines if isinstance(line, Failure)]
        assert answer.status_code == 200 and not failures, failures or answer.text[:500]
        return [line for line in lines if isinstance(line, Trajectory)]

    with ThreadPoolExecutor() as pool:
        return list(itertools.chain.from_iterable(pool.map(ask, bodies)))


def compare(session: Session, name: str, lines: list[Trajectory], found: Figures, most: float | None) -> None:
    """Add the differences from transformers to the figures. On a GPU, stop the server first."""
    if session.card.cuda:
        session.stop()
    for role in ("expert", "amateur"):
        every = session.apart(differences, role, getattr(session.pair, role), session.card.device, lines)
        target = f"{most:g}" if most else ""
        found.add(f"{name}, {role}: largest difference from transformers in float32", float(every.max()), target)
        found.add(f"{name}, {role}: mean", float(every.mean()))
        found.claim(most is None or every.max() <= most, f"{name}, {role}: {every.max():.2g} nats from transformers")


def differences(role: str, folder: Path, device: str, lines: list[Trajectory]) -> np.ndarray:
    """The difference of each log-probability of a role from transformers', in nats."""
    oracle, parts = Oracle(folder, device), []
    for line in lines:
        if role == "expert":
            mine, exact = line.expert_logprobs, oracle.logprobs(line.prompt_token_ids, line.token_ids)
        else:
            mine, exact = line.amateur_logprobs, read_without_unknown(oracle, line)
        known = np.isfinite(mine)
        ids = np.where(known, line.top_ids, 0).astype(int)
        parts.append(np.abs(mine - np.take_along_axis(exact, ids, 1))[known])
    return np.concatenate(parts)


def read_without_unknown(oracle: Oracle, line: Trajectory) -> np.ndarray:
    """The amateur's exact rows. The amateur reads the trajectory without the tokens that its head does not have."""
    read = np.concatenate((line.prompt_token_ids, line.token_ids[:-1]))
    known = read < oracle.columns
    rows = oracle.logprobs(read[known][:1], np.append(read[known][1:], 6))
    return rows[(np.cumsum(known) - 1)[len(line.prompt_token_ids) - 1 :]]


def sampling(session: Session) -> Figures:
    """Sample all problems with one client, then with two."""
    found, server, count = Figures(), session.shared, session.sizes.problems
    session.sample(session.folder / "warm")
    before, seconds = cpu_seconds(server.process.pid), {}
    with session.card.watched() as busy:
        session.run  # noqa: B018  # is made here
        seconds[1] = session.sample_seconds
    spent = cpu_seconds(server.process.pid) - before
    totals = Run(str(session.run)).completion().totals
    seconds[2] = session.sample(session.folder / "run-2", clients=2)
    for clients, value in seconds.items():
        found.add(f"problems/s, {clients} client{'s' * (clients > 1)}", count / value)
    found.add("tokens/s", totals.tokens / seconds[1])
    found.add("front end, CPU ms a trajectory", 1e3 * spent / count, "2.3")
    found.add("utilisation, %", float(np.mean([look.busy for look in busy])) if busy else "not on a CPU")
    found.claim(totals.failed == 0, f"{totals.failed} problems failed")
    session.sample_seconds = min(seconds.values())
    return found


def alone(session: Session) -> Figures:
    """The speed of vLLM with the expert alone, with as many sequences and the same k, against the service's best."""
    found, count = Figures(), session.sizes.problems
    session.run  # noqa: B018  # is made here
    session.stop()
    seconds = generate(session, session.slots)
    found.add("the expert alone in LLM.chat, problems/s", count / seconds)
    found.add("service : alone", seconds / session.sample_seconds, "at least 0.9")
    return found


def eager(session: Session) -> Figures:
    """Whether CUDA graphs pay off for the amateur, which never decodes: the start and all problems without them."""
    found, count = Figures(), session.sizes.problems
    began = time.monotonic()
    with session.server(amateur_arguments={"enforce_eager": True}) as server:
        found.add("amateur with enforce_eager: seconds to ready", time.monotonic() - began, "less than with graphs")
        session.sample(session.folder / "eager-warm", server=server)
        seconds = session.sample(session.folder / "eager", server=server)
    found.add("amateur with enforce_eager: problems/s, 1 client", count / seconds, "as with graphs")
    return found


def generate(session: Session, slots: int) -> float:
    """Seconds that vLLM takes for all problems, in a process of its own."""
    arguments: dict[str, object] = {"max_num_seqs": slots}
    if not session.card.cuda:
        arguments |= {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 256 * MIB}
    words = [
        session.pair.expert,
        session.problems,
        session.sizes.problems,
        session.sizes.tokens,
        TOP_K,
        json.dumps(arguments),
    ]
    said = subprocess.run(
        [sys.executable, "-c", GENERATE, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr[-2000:]
    return float(next(line for line in said.stdout.splitlines() if line.startswith("seconds")).split()[1])


def training(session: Session) -> Figures:
    """An epoch over the sampled RUN, against one forward pass per kept step, of which only a part is run."""
    found, kept = Figures(), session.kept
    session.stop()
    program = Path(ROOT, "tests", "benchmarks", "training.py")
    for name in ("packed", "published"):
        words = [program, kept, session.pair.expert, "--only", name, "--part", PUBLISHED_PART]
        said = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stderr[-2000:]
        for figure, value in json.loads(said.stdout.splitlines()[-1]).items():
            found.add(f"{name}: {figure}", value)
    return found
