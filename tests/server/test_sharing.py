"""Keys share a server: slots, queue and jobs in turn; a key sees its own jobs, and an admin's key those of all."""

import asyncio
import contextlib

import pytest
from starlette.exceptions import HTTPException
from support.servers.job_calls import ended, posted, questions
from support.servers.stand_in import stand_in_server

from client.protocol.requests import JobRequest
from server.api.guard import API_KEYS_VARIABLE, ApiKeys, load_keys
from server.api.sharing import ADMIN, Caller, EngineSlots
from server.api.streaming import RequestQueue
from server.jobs.leases import Claimant
from server.jobs.store import JobStore, TooManyJobs
from server.settings import ServerSettings, SettingsError

ALICE, BOB, BOSS, NAMELESS = "alices-secret-key", "bobs-secret-key", "the-bosss-key", "a-key-without-a-name"


def test_keys_have_names_and_a_key_without_one_has_one_that_stays_and_says_nothing_of_it():
    keys = ApiKeys([f"alice: {ALICE}", f"alice:   {BOB}", f"{ADMIN}: {BOSS}", NAMELESS, "a:b"])
    assert [keys.name_of(f"Bearer {key}") for key in (ALICE, BOB, BOSS)] == ["alice", "alice", ADMIN]
    name = keys.name_of(f"Bearer {NAMELESS}")
    assert name == ApiKeys([NAMELESS]).name_of(f"Bearer {NAMELESS}") and name.startswith("key-")
    assert NAMELESS not in name and name != keys.name_of("Bearer a:b")
    assert len(keys.names) == 4
    assert keys.name_of("Bearer alice") is keys.name_of(f"Bearer alice: {ALICE}") is keys.name_of(ALICE) is None


def test_a_named_key_is_held_to_what_a_key_may_be(monkeypatch):
    monkeypatch.setenv(API_KEYS_VARIABLE, f"alice: {ALICE}, {NAMELESS}")
    assert load_keys(ServerSettings()).name_of(f"Bearer {ALICE}")
    for entry, said in (("alice: x", "shorter"), ("alice: two words", "spaces"), ("two words", "spaces"),
                        ("alice:", "x"), ("a b: secret-key", "spaces")):  # fmt: skip
        monkeypatch.setenv(API_KEYS_VARIABLE, f"{NAMELESS},{entry}")
        if entry == "alice:":
            assert load_keys(ServerSettings()).name_of("Bearer alice:")  # a key like any other
            continue
        with pytest.raises(SettingsError, match=said):
            load_keys(ServerSettings())


def test_who_may_see_a_job():
    assert Caller("alice").may_see("alice") and not Caller("alice").may_see("bob")
    assert Caller("alice").may_see(None)  # posted on a server without keys
    assert Caller(ADMIN).may_see("alice") and Caller(None).may_see("alice")


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


class Holder:
    """Asks for slots, and holds what it gets."""

    def __init__(self, slots, name, given):
        self.task = asyncio.ensure_future(self._hold(slots.of(name), name, given))
        self.enough = asyncio.Event()

    async def _hold(self, slot, name, given):
        async with slot():
            given.append(name)
            await self.enough.wait()


def test_slots_go_to_the_keys_in_turn_and_one_key_never_has_all():
    async def go():
        slots, given = EngineSlots(4), []
        first = [Holder(slots, "a", given) for _ in range(20)]
        await settle()
        assert given == ["a"] * 3  # three quarters
        others = [Holder(slots, name, given) for name in ("b", "c", "b")]
        await settle()
        assert given[3:] == ["b"]
        for count, holder in enumerate(first[:3], 5):
            holder.enough.set()
            await settle()
            assert len(given) == count
        assert sorted(given[4:]) == ["a", "b", "c"]  # each as often, though a asked for all of its own before them
        for holder in [*first, *others]:
            holder.enough.set()
        await asyncio.gather(*(holder.task for holder in [*first, *others]))
        assert len(given) == 23 and not +slots._held and not slots._waiting

    asyncio.run(go())


def test_a_slot_of_one_that_leaves_is_given_on():
    async def go():
        slots, given = EngineSlots(1), []
        holders = [Holder(slots, name, given) for name in "abc"]
        await settle()
        holders[1].task.cancel()  # while it waits
        await settle()
        holders[0].enough.set()
        async with asyncio.timeout(10):
            while not slots._held["c"]:  # noqa: ASYNC110 (an event would come too late)
                await asyncio.sleep(0)
        holders[2].task.cancel()  # as it is given the slot: before it knows
        with contextlib.suppress(asyncio.CancelledError):
            await holders[2].task
        await settle()
        last = Holder(slots, "d", given)
        await settle()
        assert given == ["a", "d"]
        last.enough.set()
        await last.task

    asyncio.run(go())


def test_a_key_that_has_less_than_its_share_has_room_in_a_full_queue():
    async def go():
        queue = RequestQueue(10, keys=2)
        queue.enter(10, "a")
        for count, name in ((1, "a"), (6, "b")):
            with pytest.raises(HTTPException) as refused:
                queue.enter(count, name)
            assert refused.value.status_code == 429
        queue.enter(5, "b")
        with pytest.raises(HTTPException):
            queue.enter(1, "b")
        queue.leave(10, "a")
        queue.enter(5, "b")
        queue.leave(10, "b")
        assert queue.depth == 0

    asyncio.run(go())


def request(name):
    return JobRequest(problems=[{"id": "1", "question": "q"}], run=name)


def test_jobs_are_taken_of_the_keys_in_turn_and_of_each_key_oldest_first(tmp_path):
    store = JobStore(str(tmp_path))
    posts = [store.post(request(f"r{index}"), None, 99, name) for index, name in enumerate("aaabacc")]
    names = dict(zip(posts, "aaabacc", strict=True))
    claimant, taken = Claimant(JobStore(str(tmp_path)), 30), []
    while claim := claimant.claim():
        taken.append(claim.job_id)
    assert "".join(names[job_id] for job_id in taken) == "abcacaa"
    for name in "abc":
        mine = [job_id for job_id in posts if names[job_id] == name]
        assert [job_id for job_id in taken if names[job_id] == name] == sorted(mine)


def test_a_key_that_has_less_than_its_share_may_post_where_others_have_filled_the_open_jobs(tmp_path):
    store = JobStore(str(tmp_path))
    for index in range(4):
        store.post(request(f"a{index}"), None, 4, "a", keys=2)
    with pytest.raises(TooManyJobs):
        store.post(request("a"), None, 4, "a", keys=2)
    for index in range(2):
        store.post(request(f"b{index}"), None, 4, "b", keys=2)
    with pytest.raises(TooManyJobs):
        store.post(request("b"), None, 4, "b", keys=2)


def test_two_keys_may_choose_the_same_idempotency_key(tmp_path):
    store = JobStore(str(tmp_path))
    mine, theirs = (store.post(request(name), "the-same", 9, name) for name in ("a", "b"))
    assert mine != theirs and store.post(request("a"), "the-same", 9, "a") == mine


def test_over_http_a_key_sees_its_own_jobs_and_an_admins_key_all(tmp_path):
    (tmp_path / "keys").write_text(f"alice: {ALICE}\nbob: {BOB}\n{ADMIN}: {BOSS}\n")
    bucket = tmp_path / "bucket"
    with stand_in_server(tmp_path, api_key_file=str(tmp_path / "keys"), bucket=str(bucket)) as server:

        def ask(key, method, path, headers=None, **more):
            return server.ask(method, path, headers={"Authorization": f"Bearer {key}"} | (headers or {}), **more)

        class Of:
            """The server as the holder of a key has it."""

            def __init__(self, key):
                self.ask = lambda method, path, **more: ask(key, method, path, **more)

        alices, bobs = (
            posted(Of(key), f"runs/{index}", questions(3), max_tokens=4) for index, key in enumerate((ALICE, BOB))
        )
        for key, theirs in ((ALICE, bobs), (BOB, alices)):
            assert ask(key, "GET", f"/v1/jobs/{theirs}").status_code == 404
            assert ask(key, "POST", f"/v1/jobs/{theirs}/cancel").status_code == 404
        assert ended(Of(ALICE), alices)["status"] == ended(Of(BOSS), bobs)["status"] == "completed"
        assert ask(BOB, "GET", f"/v1/jobs/{alices}").status_code == 404  # nor when it has ended

        def listed(key, **query):
            return [job["id"] for job in ask(key, "GET", "/v1/jobs", params=query).json()["data"]]

        assert (listed(ALICE), listed(BOB), listed(BOSS)) == ([alices], [bobs], [bobs, alices])
        assert listed(ALICE, limit=1) == [alices]
        text = b"".join(file.read_bytes() for file in (bucket / "jobs").rglob("*") if file.is_file())
        assert b'"key_name":"alice"' in text and ALICE.encode() not in text and BOB.encode() not in text

        whole = ask(ALICE, "GET", "/v1/tokenizer")
        for ranges in ("bytes=0-3", "bytes=5-2", "bytes=99999999999-", "lines=1", "bytes=0-1,3-4"):
            answer = ask(ALICE, "GET", "/v1/tokenizer", headers={"Range": ranges})
            assert (answer.status_code, answer.content) == (200, whole.content)
