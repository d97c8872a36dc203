"""Problems that fail in `lightreasoner-client sample` are counted, kept with their reason, and retried on request.

Against a real HTTP server that answers from memory, on a folder and on a real S3 server.
"""

from support.servers.client_calls import PROBLEMS, sample, unanswerable
from support.servers.contract_server import line_of, refusal
from support.servers.job_calls import read_by_others

from client.protocol.requests import Failure
from client.runs.run import Run


def test_too_many_failures_stop_a_run_and_keep_what_was_answered(server, problem_file, tmp_path):
    problems, run = problem_file([*PROBLEMS[:16], *unanswerable("a", "b", "c"), *PROBLEMS[16:]]), tmp_path / "run"
    asked = []
    for _ in range(2):  # the second time, those of the first are too many already
        said = sample(problems, run, server, "--max-failures", 2)
        assert said.returncode == 1 and "error: 3 trajectories failed, more than --max-failures 2" in said.stderr
        assert "--retry-failed" in said.stderr and "Traceback" not in said.stderr
        asked.append(sum(map(len, server.asked)))
    assert asked[0] == asked[1]
    held = Run(str(run))
    assert held.completion() is None and len(held.keys()) >= 16 and len(held.failures()) == 3
    said = sample(problems, run, server, "--max-failures", 3)
    assert (
        said.returncode == 0 and held.completion().totals.failed == 3 and held.completion().totals.trajectories == 600
    )


def test_what_had_arrived_when_a_run_is_stopped_is_written(server, problem_file, tmp_path):
    """The failure comes first, in one piece with the answers to all others."""
    rows = [*unanswerable("a"), *PROBLEMS[:15]]

    def line(problem, index):
        return b"".join(line_of(problem | row, 0) for row in rows) if problem["id"] == "a" else b""

    server.line = line
    said = sample(problem_file(rows), tmp_path / "run", server, "--max-failures", 0)
    assert said.returncode == 1 and len(Run(str(tmp_path / "run")).keys()) == 15


def test_what_failed_is_asked_again_and_its_trajectory_is_what_readers_find(server, problem_file, bucket):
    """`a` can be answered the second time, `b` never."""
    problems = problem_file([*PROBLEMS[:30], *unanswerable("a", "b")])
    assert sample(problems, bucket, server, "--max-failures", 0).returncode == 1
    run = Run(bucket)
    wait_for = {("a", 0), ("b", 0)}
    assert run.failures().keys() == wait_for
    server.line = lambda problem, index: line_of(problem | ({"question": "?"} if problem["id"] == "a" else {}), index)
    server.asked.clear()
    there = run.keys()
    said = sample(problems, bucket, server, "--retry-failed", "--max-failures", 1)
    assert said.returncode == 0, said.stderr
    asked = [problem for batch in server.asked for problem in batch]
    assert {"a", "b"} <= set(asked) and not {problem for problem, _ in there} & set(asked)
    totals = run.completion().totals
    assert (totals.trajectories, totals.failed, totals.problems) == (31, 1, 31)
    assert "a" in {sample.problem_id for sample in run.samples()}


def test_without_being_told_to_nothing_that_failed_is_asked_again(server, problem_file, tmp_path):
    problems = problem_file([*PROBLEMS[:30], *unanswerable("a")])
    assert sample(problems, tmp_path / "run", server, "--max-failures", 0).returncode == 1
    server.asked.clear()
    assert sample(problems, tmp_path / "run", server).returncode == 0
    assert "a" not in {problem for batch in server.asked for problem in batch}


def test_a_complete_run_is_opened_again_for_what_failed_and_for_nothing_else(server, problem_file, bucket, tmp_path):
    problems, run = problem_file([*PROBLEMS[:30], *unanswerable("a", "b")]), Run(bucket)
    assert sample(problems, bucket, server).returncode == 0
    assert (run.completion().totals.trajectories, run.completion().totals.failed) == (30, 2)
    assert "nothing to do" in sample(problems, bucket, server).stdout
    server.asked.clear()
    server.refuse = lambda request: refusal(422, "no") if request.method == "POST" else None
    assert sample(problems, bucket, server, "--retry-failed").returncode == 1
    assert run.completion() is None and len(run.keys()) == 30
    server.refuse = lambda request: None
    server.line = lambda problem, index: line_of(problem | ({"question": "?"} if problem["id"] == "a" else {}), index)
    said = sample(problems, bucket, server, "--retry-failed")
    assert said.returncode == 0, said.stderr
    assert sorted(problem for batch in server.asked for problem in batch) == ["a", "b"]
    totals = run.completion().totals
    assert (totals.trajectories, totals.failed) == (31, 1) == (len(run.keys()), 1)
    server.line = lambda problem, index: line_of(problem | {"question": "?"}, index)
    assert sample(problems, bucket, server, "--retry-failed").returncode == 0
    assert run.completion().totals.failed == 0
    server.asked.clear()
    assert "nothing to do" in sample(problems, bucket, server, "--retry-failed").stdout and not server.asked


def test_failures_are_retried_by_one_client(server, problem_file, tmp_path):
    said = sample(problem_file(PROBLEMS), tmp_path / "run", server, "--shard", "1/2", "--retry-failed")
    assert (
        said.returncode == 1 and "--retry-failed cannot be combined with --shard" in said.stderr and not server.requests
    )


def test_engine_errors_that_stay_are_failures_with_their_reason_and_can_be_retried(server, problem_file, tmp_path):
    def line(problem, index):
        return Failure("p1", 0, "engine_error", "died").to_line() if problem["id"] == "p1" else line_of(problem, index)

    server.line = line
    problems, run = problem_file(PROBLEMS[:10]), Run(str(tmp_path / "run"))
    said = sample(problems, run, server)
    assert said.returncode == 0 and "1 trajectories failed; the reasons are in" in said.stdout
    assert "run the same command with --retry-failed" in said.stdout
    assert sum(batch.count("p1") for batch in server.asked) == 4
    assert run.failures()[("p1", 0)] == Failure("p1", 0, "engine_error", "died")
    server.line = line_of
    assert sample(problems, run, server, "--retry-failed").returncode == 0
    assert "10 problems once" in read_by_others(run, PROBLEMS[:10], tmp_path)
