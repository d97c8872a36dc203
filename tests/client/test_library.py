"""The client as a library: what `from client import …` gives, used as README shows it."""

import asyncio
from pathlib import Path

import pytest
from support.runs.made_run import make_manifest, make_trajectory
from support.servers.contract_server import ContractServer

import client
import client.servers.connection
from client import (
    Failure,
    LightReasonerError,
    Problem,
    Sample,
    SamplingClient,
    SamplingSettings,
    Trajectory,
    read_problems,
    read_samples,
    read_trajectories,
)
from client.runs.run import Run


def test_every_name_of_the_library_is_there_and_documented():
    assert sorted(client.__all__) == client.__all__ == dir(client)
    for name in client.__all__:
        assert getattr(client, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = client.Nothing


def test_it_is_typed():
    assert (Path(client.__file__).parent / "py.typed").exists()


def test_trajectories_come_from_servers_as_they_complete(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text('{"id": "a", "question": "What is 7 times 8?"}\n{"id": "b", "question": "unanswerable"}\n')

    async def ask(urls):
        async with SamplingClient(urls) as asked:
            problems = [*(row.problem for row in read_problems(str(file))), Problem(id="c", prompt_token_ids=[1, 2])]
            return [line async for line in asked.trajectories(problems, SamplingSettings(max_tokens=8, top_k=5))]

    with ContractServer().running() as one, ContractServer().running() as other:
        lines = asyncio.run(ask([one.url, other.url]))
    assert sorted(line.problem_id for line in lines) == ["a", "b", "c"]
    kinds = {line.problem_id: type(line) for line in lines}
    assert kinds == {"a": Trajectory, "b": Failure, "c": Trajectory}


@pytest.mark.parametrize(
    ("problems", "settings", "said"),
    [
        ([Problem(id="a", question="?")] * 2, SamplingSettings(), "problem"),
        ([Problem(id="a", question="?", token_ids=[1])], SamplingSettings(n=2, temperature=1.0), "token_ids"),
    ],
)
def test_problems_that_make_no_valid_request_are_an_error_of_the_librarys_own_family(problems, settings, said):
    async def ask(url):
        async with SamplingClient(url) as asked:
            return [line async for line in asked.trajectories(problems, settings)]

    with ContractServer().running() as server, pytest.raises(LightReasonerError, match=f"invalid request: .*{said}"):
        asyncio.run(ask(server.url))


@pytest.mark.parametrize(
    ("field", "value"),
    [("top_k", 0), ("n", 2), ("system_prompt", "x" * 100_001), ("chat_template_kwargs", {"a": object()})],
)
def test_settings_that_no_server_takes_are_refused_where_they_are_made(field, value):
    with pytest.raises(ValueError, match=field if field != "n" else "n > 1 needs temperature"):
        SamplingSettings(**{field: value})


def test_two_calls_of_one_client_at_a_time_wait_for_no_connection():
    """No line comes before the requests of both have come: more of them than httpx would have connections."""
    per_call = 1024
    server, all_have_come = ContractServer(slots=per_call), asyncio.Event()

    async def when_all_have_come():
        if sum(map(len, server.asked)) == 2 * per_call:
            all_have_come.set()
        await all_have_come.wait()

    async def ask():
        told = []
        async with SamplingClient(server.url, tell=told.append) as asked:

            async def one(name):
                problems = [Problem(id=f"{name}{index}", question="unanswerable") for index in range(per_call)]
                return [line async for line in asked.trajectories(problems)]

            return await asyncio.gather(one("a"), one("b")), told

    server.before_line = when_all_have_come
    with server.running():
        lines, told = asyncio.run(ask())
    assert len(server.asked) == 128  # by itself, httpx has 100 connections
    assert [len(some) for some in lines] == [per_call, per_call] and told == []


def test_what_a_run_holds_is_read_back(bucket):
    made = [make_trajectory(f"p{seed}", seed, 5) for seed in range(3)]
    manifest = make_manifest()
    run = Run(f"{bucket}/run")
    run.claim(manifest, b"{}")
    for trajectory in made:
        run.write([trajectory], {}, manifest)
    assert [line.problem_id for line in read_trajectories(f"{bucket}/run")] == ["p0", "p1", "p2"]
    samples = list(read_samples(f"{bucket}/run"))
    assert all(isinstance(sample, Sample) for sample in samples)
    assert [sample.token_ids.tolist() for sample in samples] == [line.token_ids.tolist() for line in made]


@pytest.mark.parametrize("read", [read_samples, read_trajectories])
def test_a_run_that_is_not_there_is_said_at_once(read, tmp_path):
    with pytest.raises(LightReasonerError, match=r"no RUN at .*nowhere"):
        read(str(tmp_path / "nowhere"))


@pytest.fixture
def filled(tmp_path):
    """A RUN of two parts, three trajectories each."""
    manifest, run = make_manifest(), Run(str(tmp_path / "run"))
    run.claim(manifest, b"{}")
    for start in (0, 3):
        run.write([make_trajectory(f"p{seed}", seed, 5) for seed in range(start, start + 3)], {}, manifest)
    return tmp_path / "run"


def test_datasets_opens_the_files_as_they_are(filled, tmp_path):
    datasets = pytest.importorskip("datasets")
    for kind, read in (("samples", read_samples), ("trajectories", read_trajectories)):
        rows = datasets.load_dataset(
            "parquet", data_files=f"{filled}/{kind}/*.parquet", split="train", cache_dir=str(tmp_path / "cache")
        )
        assert rows["token_ids"] == [line.token_ids.tolist() for line in read(str(filled))]


def test_duckdb_opens_the_files_as_they_are(filled):
    duckdb = pytest.importorskip("duckdb")
    found = duckdb.sql(
        f"select problem_id, len(steps), list_sum(flatten(label_weights)) from '{filled}/samples/*.parquet' order by 1"
    ).fetchall()
    expected = [
        (sample.problem_id, len(sample.contrast.steps), pytest.approx(sample.contrast.label_weights.sum(), abs=1e-5))
        for sample in read_samples(str(filled))
    ]
    assert [(name, kept, total or 0.0) for name, kept, total in found] == expected


def test_polars_opens_the_files_as_they_are(filled):
    polars = pytest.importorskip("polars")
    found = polars.read_parquet(f"{filled}/trajectories/*.parquet")
    trajectories = list(read_trajectories(str(filled)))
    assert found["expert_logprobs"].to_list() == [line.expert_logprobs.ravel().tolist() for line in trajectories]
