"""What a request's body may hold: read as pydantic would read it, but in pieces, and refused where it stands."""

import asyncio
import json
import threading

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError

from client.protocol.requests import MAX_IDS, JobRequest, TrajectoryRequest
from server.api import bodies
from server.api.bodies import BodyReader, BodyRoute
from server.api.problem_details import add_handlers

READERS = {model: BodyReader(model) for model in (TrajectoryRequest, JobRequest)}
MESSAGE = {"role": "user", "content": "q"}
ASKED = {"id": "a", "question": "What is 2 + 3?"}


def faults(body, model=TrajectoryRequest):
    with pytest.raises(RequestValidationError) as raised:
        READERS[model].read(body if isinstance(body, bytes) else json.dumps(body).encode())
    return [(entry["loc"][1:], entry["msg"]) for entry in raised.value.errors()]


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (TrajectoryRequest, {"problems": [ASKED]}),
        (TrajectoryRequest, {"problems": [ASKED | {"id": '\N{GRINNING FACE}\n"\\ '}], "temperature": 1, "n": 256}),
        (TrajectoryRequest, {"problems": [{"id": "b", "prompt_token_ids": [0, 2**31 - 1], "token_ids": [5]}, ASKED]}),
        (TrajectoryRequest, {"problems": [ASKED | {"token_ids": None}], "seed": 2**63 - 1, "system_prompt": None}),
        (TrajectoryRequest, {"problems": [ASKED], "chat_template_kwargs": {"a": [1, 2.5, {"b": [None, True, "é"]}]}}),
        (TrajectoryRequest, {"problems": [{"id": "m", "messages": [{"role": "user", "content": "q"}] * 3}]}),
        (JobRequest, {"problems": [ASKED], "run": "a/b", "alpha": 1, "beta": 0.5}),
        (JobRequest, {"problems": None, "problems_url": "x.jsonl", "run": "a"}),
        (JobRequest, {"problems": [{"id": str(index), "question": "q" * 20} for index in range(50_000)], "run": "a"}),
    ],
)
@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"ensure_ascii": False, "separators": (",", ":")}])
def test_a_valid_body_is_read_as_pydantic_reads_it(model, body, style):
    text = json.dumps(body, **style).encode()
    assert READERS[model].read(text) == model.model_validate_json(text)


@pytest.mark.parametrize("number", ["3", True, 1.0, 1e3, "", [], None, float("nan")])
@pytest.mark.parametrize("field", ["n", "max_tokens", "top_k"])
def test_an_integer_is_an_integer(number, field):
    (fault,) = faults({"problems": [ASKED], field: number})
    assert fault[0] in ((field,), ())


@pytest.mark.parametrize("value", ["3", True, 1.0, -1, 2**31, 10**30, [], None, {}])
@pytest.mark.parametrize("field", ["prompt_token_ids", "token_ids"])
def test_an_id_is_an_integer_within_its_bounds(value, field):
    problem = {"id": "b", "question": "q"} if field == "token_ids" else {"id": "b"}
    ((where, _),) = faults({"problems": [ASKED, problem | {field: [1, 2, value]}]})
    assert where == ("problems", 1, field, 2)


@pytest.mark.parametrize(
    ("body", "where", "said"),
    [
        ({}, ("problems",), "Field required"),
        ({"problems": []}, ("problems",), "at least 1 item"),
        ({"problems": [ASKED], "x": 1}, ("x",), "Extra inputs are not permitted"),
        ({"problems": [ASKED, ASKED | {"id": "b", "x": 1}]}, ("problems", 1, "x"), "Extra inputs are not permitted"),
        ({"problems": [{"question": "q"}]}, ("problems", 0, "id"), "Field required"),
        ({"problems": [ASKED | {"id": 3}]}, ("problems", 0, "id"), "a string"),
        ({"problems": [ASKED | {"question": [1]}]}, ("problems", 0, "question"), "a string"),
        ({"problems": [ASKED | {"prompt_token_ids": [1]}]}, ("problems", 0), "exactly one of"),
        ({"problems": [{"id": "a", "prompt_token_ids": []}]}, ("problems", 0, "prompt_token_ids"), "at least 1 item"),
        ({"problems": [{"id": "a", "prompt_token_ids": 7}]}, ("problems", 0, "prompt_token_ids"), "a list"),
        (
            {"problems": [{"id": "a", "messages": [{"role": "user"}]}]},
            ("problems", 0, "messages", 0, "content"),
            "Field",
        ),
        ({"problems": [{"id": "a", "messages": [MESSAGE, {}]}]}, ("problems", 0, "messages", 1, "role"), "Field"),
        ({"problems": [{"id": "a", "messages": [MESSAGE | {"x": 1}]}]}, ("problems", 0, "messages", 0, "x"), "Extra"),
        ({"problems": [ASKED, ASKED]}, (), "two problems have the id 'a'"),
        ({"problems": [ASKED | {"id": str(index)} for index in range(1025)]}, ("problems",), "at most 1024 items"),
        ({"problems": "a"}, ("problems",), "array"),
        (b'{"problems": [], "temperature": 1e999}', ("temperature",), "out of range"),
        (b'{"problems": [], "chat_template_kwargs": {"a": {"b": 1e400}}}', ("chat_template_kwargs",), "out of range"),
        (b'{"problems": [{"id": "a", "question": "q", "token_ids": [1, 1e999]}]}', ("problems", 0, "token_ids", 1), ""),
        ([ASKED], (), "object"),
        (b"", (), "not valid JSON"),
        (b"{} {}", (), "not valid JSON"),
        (b'{"problems": [{"id": "\xff", "question": "q"}]}', (), "not valid JSON"),
        (b'{"problems": [{"id": "\\ud800", "question": "q"}]}', (), "not valid JSON"),
    ],
)
def test_a_fault_is_told_with_its_place(body, where, said):
    (fault,) = faults(body)
    assert fault[0] == where and said in fault[1]


SIZE = 2_000_000


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"problems":' + b"[" * SIZE, "nested too deeply"),
        (b'{"problems":[{"id":"a","question":' + b"[" * SIZE, "nested too deeply"),
        (b'{"problems":[],"chat_template_kwargs":{"a":' + b"[" * SIZE, "nested too deeply"),
        (b'{"a":' * SIZE, "names and texts"),
        (b'{"problems":[' + b'{"id":""},' * SIZE + b"1]}", "names and texts"),
        (b"{" + b'"n":1,' * SIZE + b'"n":1}', "names and texts"),
        (b'{"problems":[{"id":"a","messages":[' + b"{}," * SIZE + b"{}]}]}", "Field required"),
        (b'{"problems":[' + b"{}," * SIZE + b"{}]}", "Field required"),
        (b'{"problems":[' + b"0," * SIZE + b"0]}", "Expected `object`"),
        (b'{"problems":[{"id":"a","question":[' + b"{}," * SIZE + b"{}]}]}", "a string"),
        (b'{"problems":[{"id":"a","prompt_token_ids":[' + b"[]," * SIZE + b"1]}]}", f"at most {MAX_IDS:,}"),
        (b'{"problems":[],"chat_template_kwargs":{"a":[' + b"0," * SIZE + b"0]}}", "beside the problems"),
        (b'{"problems":[{"id":"a","question":"q"}],"stop":[' + b"{}," * SIZE + b"{}]}", "Extra inputs"),
    ],
)  # fmt: skip
def test_what_no_valid_request_holds_is_refused_where_it_stands(body, said):
    """Not after all of it has been made into values: the reason is the first thing that does not belong."""
    (fault,) = faults(body)
    assert said in fault[1]


def test_a_large_body_is_read_beside_the_event_loop_and_a_small_one_at_once(monkeypatch):
    read_in = []

    class Watched(BodyReader):
        def read(self, body):
            read_in.append(threading.current_thread())
            return super().read(body)

    monkeypatch.setattr(bodies, "BodyReader", Watched)
    routes = APIRouter(route_class=BodyRoute)

    @routes.post("/")
    async def count(asked: TrajectoryRequest) -> int:
        return sum(len(problem.prompt_token_ids) for problem in asked.problems)

    app = FastAPI()
    add_handlers(app)
    app.include_router(routes)

    async def post(ids):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http:
            return await http.post("/", json={"problems": [{"id": "a", "prompt_token_ids": ids}]})

    for size in (10, 100_000):
        assert asyncio.run(post([7] * size)).json() == size
    assert read_in[0] is threading.main_thread() and read_in[1] is not threading.main_thread()
    answer = asyncio.run(post([7] * 100_000 + [-1]))
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "problems[0].prompt_token_ids[100000]"


def test_a_body_of_another_type_than_json_is_refused_with_the_type_to_send():
    routes = APIRouter(route_class=BodyRoute)

    @routes.post("/")
    async def count(asked: TrajectoryRequest) -> int:
        return len(asked.problems)

    app = FastAPI()
    add_handlers(app)
    app.include_router(routes)
    body = json.dumps({"problems": [ASKED]}).encode()

    async def statuses():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            for kind in ("application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"):
                assert (await client.post("/", content=body, headers={"content-type": kind})).json() == 1
            for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
                answer = await client.post("/", content=body, headers=headers)
                (error,) = answer.json()["errors"]
                assert answer.status_code == 422 and "send Content-Type: application/json" in error["detail"], error
            assert (await client.post("/")).status_code == 422  # it has no body

    asyncio.run(statuses())
