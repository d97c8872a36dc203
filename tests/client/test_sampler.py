"""How lines become parts, without a server."""

import asyncio
import contextlib
import threading

import pytest
from support.runs.made_run import make_manifest, make_trajectory

import client.runs.run
import client.sampling.sampler
import client.sampling.writer
from client.protocol.requests import Failure, Trajectory
from client.runs.parts import Parts
from client.runs.run import Run
from client.runs.tally import CountedParts
from client.sampling.writer import Counts, Writer
from client.storage.bucket import BucketError


@pytest.fixture
def run(tmp_path):
    run = Run(str(tmp_path / "run"))
    run.claim(make_manifest(), b"{}")
    return run


def lines(count):
    return [make_trajectory(f"p{index}", seed=index, tokens=4) for index in range(count)]


def refusing(run, monkeypatch, *errors):
    """The first puts end in these errors; returns those that are still to come."""
    put, left = run.bucket.put, list(errors)

    def refuse_first(name, data):
        if left:
            raise left.pop()
        put(name, data)

    monkeypatch.setattr(run.bucket, "put", refuse_first)
    return left


async def until(true):
    for _ in range(6000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("waited in vain")


async def take(writer, counts, some):
    for line in some:
        await writer.add(line, counts)


def test_a_full_part_is_written_while_lines_go_on_and_the_rest_at_the_end(run, monkeypatch):
    monkeypatch.setattr(client.sampling.writer, "PART_TRAJECTORIES", 4)

    async def go():
        writer, counts = Writer(run, make_manifest(), {}.get), Counts(total=11)
        await take(writer, counts, lines(11))
        await writer.close(counts)
        return counts

    counts = asyncio.run(go())
    assert sorted(len(run.trajectories_of(part)) for part in run.parts("trajectories")) == [3, 4, 4]
    assert counts.done == 11 and counts.steps == 33
    assert counts.kept == sum(len(sample.contrast.steps) for sample in run.samples()) > 0


def test_what_one_client_wrote_is_counted_as_it_is_written_and_read_again_only_where_others_wrote_too(run, monkeypatch):
    manifest, counted = run.manifest(), CountedParts(run.manifest())
    names = ["part-2", "part-1"]  # the later part is the first by name
    monkeypatch.setattr(Parts, "new_name", lambda self: names.pop(0))
    run.write(lines(12)[:6], {}, manifest, counted)
    run.write(lines(12)[6:], {}, manifest, counted)
    read, data = [], Parts.data
    monkeypatch.setattr(Parts, "data", lambda self, *of: read.append(of) or data(self, *of))
    tally = run.tally(manifest, (), counted)
    assert not read and len(tally.keys) == 12
    assert tally.totals([]) == run.tally(manifest).totals([]) and tally.mean_label_entropy > 0
    assert tally.mean_label_entropy == run.tally(manifest).mean_label_entropy
    assert tally.shifts.oddest == run.tally(manifest).shifts.oddest
    names.append("part-3")
    run.write(lines(15)[9:], {}, manifest)  # another client's, of which three were there
    assert run.tally(manifest, (), counted).totals([]) == run.tally(manifest).totals([])
    assert len(run.tally(manifest, (), counted).keys) == 15


def test_a_part_that_the_store_has_lost_is_not_counted(run):
    counted = CountedParts(run.manifest())
    run.write(lines(6), {}, run.manifest(), counted)
    run.write(lines(12)[6:], {}, run.manifest(), counted)
    run.bucket.remove(f"trajectories/{run.parts('trajectories')[0]}.parquet")
    assert len(run.tally(run.manifest(), (), counted).keys) == 6


def test_an_old_part_is_written_and_progress_is_told_though_no_line_comes(run, monkeypatch):
    monkeypatch.setattr(client.sampling.writer, "PART_SECONDS", 1.5)
    told = []

    class Progress:
        def update(self, counts):
            told.append((counts.done, bool(run.parts("samples"))))

    async def go():
        writer, counts = Writer(run, make_manifest(), {}.get), Counts(total=9)
        await take(writer, counts, lines(2))
        ticking = asyncio.create_task(client.sampling.sampler._every_second(writer, counts, Progress()))
        await until(lambda: run.parts("samples"))
        ticking.cancel()

    asyncio.run(go())
    assert run.keys() == {("p0", 0), ("p1", 0)} and told[0] == (2, False)


def test_a_part_is_written_when_it_is_large_in_memory(run, monkeypatch):
    size = sum(getattr(lines(1)[0], name).nbytes for name in Trajectory.ARRAYS)
    monkeypatch.setattr(client.sampling.writer, "PART_BYTES", 3 * size)

    async def go():
        writer, counts = Writer(run, make_manifest(), {}.get), Counts(total=7)
        await take(writer, counts, lines(7))
        await writer.close(counts)

    asyncio.run(go())
    assert sorted(len(run.trajectories_of(part)) for part in run.parts("trajectories")) == [1, 3, 3]


def test_parts_are_named_by_the_time_of_their_writing(run, monkeypatch):
    for now in (3_000_000_000, 20_000_000_000):
        monkeypatch.setattr(client.runs.run.time, "time_ns", lambda now=now: now)
        run.write(lines(1), {}, make_manifest())
    assert [part.split("-")[1] for part in run.parts("trajectories")] == ["0000000003000", "0000000020000"]


def test_sampling_goes_on_while_parts_are_written_until_too_many_wait(run, monkeypatch):
    monkeypatch.setattr(client.sampling.writer, "PART_TRAJECTORIES", 4)
    slow, write, begun = threading.Event(), run.write, []

    def write_slowly(trajectories, *others):
        begun.append(len(trajectories))
        slow.wait(60)
        return write(trajectories, *others)

    monkeypatch.setattr(run, "write", write_slowly)
    most = 4 * client.sampling.writer.PARTS_AT_A_TIME

    async def go():
        writer, counts = Writer(run, make_manifest(), {}.get), Counts(total=most + 4)
        some = lines(most + 4)
        await take(writer, counts, some[:-1])  # three of them belong to the part that has to wait
        await until(lambda: len(begun) == client.sampling.writer.PARTS_AT_A_TIME)
        one_more = asyncio.create_task(take(writer, counts, some[-1:]))
        _, waiting = await asyncio.wait([one_more], timeout=0.2)
        assert waiting and not run.parts("trajectories")
        slow.set()
        await one_more
        await writer.close(counts)

    asyncio.run(go())
    assert len(run.keys()) == most + 4 and begun == [4] * (client.sampling.writer.PARTS_AT_A_TIME + 1)


def test_a_store_that_is_out_is_waited_for_and_told_of_once(run, monkeypatch):
    monkeypatch.setattr(client.sampling.writer, "PART_TRAJECTORIES", 4)
    monkeypatch.setattr(client.sampling.writer, "STORE_PAUSE_SECONDS", 0.1)
    told = []
    refusing(run, monkeypatch, *[BucketError("out", may_pass=True)] * 3)

    async def go():
        writer, counts = Writer(run, make_manifest(), {}.get, tell=told.append), Counts(total=4)
        await take(writer, counts, lines(4))
        await until(lambda: counts.written)
        await writer.close(counts)

    asyncio.run(go())
    assert len(run.keys()) == 4 and told == ["out; trying again", f"{run} can be written again"]


@pytest.mark.parametrize("ended_by", ["patience", "stopping", "an error that stays"])
def test_a_store_that_stays_out_is_named_in_the_end(run, monkeypatch, ended_by):
    monkeypatch.setattr(client.sampling.writer, "PART_TRAJECTORIES", 4)
    monkeypatch.setattr(client.sampling.writer, "STORE_PAUSE_SECONDS", 0.1 if ended_by == "patience" else 1000)
    stopping, patience = [], 0.2 if ended_by == "patience" else 1000

    def never(*_):
        raise BucketError("out", may_pass=ended_by != "an error that stays")

    monkeypatch.setattr(run.bucket, "put", never)

    async def go():
        writer = Writer(run, make_manifest(), {}.get, stopping=lambda: bool(stopping), patience=patience)
        counts = Counts(total=5)
        await take(writer, counts, lines(4))
        if ended_by == "stopping":
            await asyncio.sleep(0.3)  # into the pause
            assert not writer._error
            stopping.append(True)
        await until(lambda: writer._error)
        with pytest.raises(BucketError, match="out"):
            await take(writer, counts, lines(5)[4:])
        with pytest.raises(
            BucketError, match=r"out. 5 trajectories could not be written .* Run the same command again to resume"
        ):
            await asyncio.wait_for(writer.close(counts), 30)

    asyncio.run(go())


def test_what_is_being_written_when_cancelled_is_still_counted_and_its_errors_are_raised(run, monkeypatch):
    monkeypatch.setattr(client.sampling.writer, "PART_TRAJECTORIES", 1)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(run, "write", fail)

    async def go():
        writer, counts = Writer(run, make_manifest(), {}.get), Counts(total=1)
        await take(writer, counts, lines(1))
        closing = asyncio.create_task(writer.close(counts))
        await asyncio.sleep(0)
        closing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await closing
        await writer.close(counts)

    with pytest.raises(OSError, match="disk full"):
        asyncio.run(go())


@pytest.mark.parametrize("asks_again", [False, True])
def test_a_failure_that_may_pass_is_kept_only_where_it_has_been_asked_again(run, asks_again):
    async def go():
        writer, counts = Writer(run, make_manifest(), {}.get, asks_again=asks_again), Counts(total=2)
        await writer.add(Failure("a", 0, "engine_error", "died"), counts)
        await writer.add(Failure("b", 0, "context_length_exceeded", "long"), counts)
        await writer.close(counts)
        return counts

    counts = asyncio.run(go())
    assert (counts.passing, counts.failed) == ((0, 2) if asks_again else (1, 1))
    assert run.failures().keys() == {("b", 0)} | ({("a", 0)} if asks_again else set())


def test_a_part_that_could_not_be_written_once_is_written_in_the_end(run, monkeypatch):
    monkeypatch.setattr(client.sampling.writer, "PART_TRAJECTORIES", 4)
    refusing(run, monkeypatch, BucketError("No space left"))

    async def go():
        writer, counts = Writer(run, make_manifest(), {}.get), Counts(total=11)
        await take(writer, counts, lines(8))
        await until(lambda: writer._error)
        with pytest.raises(BucketError):
            await take(writer, counts, lines(11)[8:])
        await writer.close(counts)
        return counts

    counts = asyncio.run(go())
    assert len(run.keys()) == counts.done == counts.written == 9  # the ninth met the error, and is there too


def test_what_could_not_be_written_at_the_end_is_tried_once_more(run, monkeypatch):
    failures = refusing(run, monkeypatch, BucketError("No space left"))

    async def go():
        writer, counts = Writer(run, make_manifest(), {}.get), Counts(total=3)
        await take(writer, counts, lines(3))
        await writer.close(counts)

    asyncio.run(go())
    assert len(run.keys()) == 3 and not failures
