"""Who may ask, how much, and what a refusal looks like: over real HTTP, with a pair that is still starting."""

import asyncio
import contextlib
import json
import logging
import socket
import time

import pytest
from support.servers.real_server import command
from support.servers.stand_in import BODY_BYTES, serving

from server import logs, metrics
from server.api import guard
from server.api.guard import ApiKeys, Guard, load_keys
from server.settings import ServerSettings, SettingsError


@pytest.fixture(scope="module")
def locked():
    with serving(["first-key", "second-key"]) as client:
        yield client


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "path", ["/metrics", "/version", "/v1/models", "/v1/tokenizer", "/docs", "/openapi.json", "/x"]
)
@pytest.mark.parametrize(
    "headers", [{}, bearer("wrong"), bearer("first-key2"), {"Authorization": "first-key"},
                {"Authorization": "Basic first-key"}, {"X-Api-Key": "first-key"}, bearer("first-key,second-key")]
)  # fmt: skip
def test_without_one_of_the_keys_nothing_is_told(locked, path, headers):
    answer = locked.get(path, headers=headers)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["content-type"] == "application/problem+json" and answer.json()["status"] == 401


@pytest.mark.parametrize("headers", [bearer("first-key"), bearer("second-key"), {"authorization": "bearer first-key"}])
def test_each_key_opens(locked, headers):
    assert locked.get("/version", headers=headers).status_code == 200
    assert locked.get("/v1/models", headers=headers).status_code == 503  # known now, and not ready


def test_without_a_key_a_probe_learns_only_whether_the_service_lives_and_serves(locked):
    assert locked.get("/health").json() == {"status": "ok"}
    answer = locked.get("/ready")
    assert answer.status_code == 503 and answer.json()["detail"] == "not ready: starting the engines"


def test_a_body_beyond_the_bound_is_refused_however_it_is_sent(locked):
    body, large = b" " * (BODY_BYTES + 1), [b" " * 1_000_000] * 20
    for content in (body, iter([body[:30_000], body[30_000:]]), iter(large), b"".join(large)):  # in chunks, and not
        answer = locked.post("/v1/trajectories", content=content, headers=bearer("first-key"))
        assert answer.status_code == 413 and "50,000 bytes" in answer.json()["detail"]
    assert locked.post("/v1/trajectories", content=body[1:], headers=bearer("first-key")).status_code in (400, 422, 503)


def test_a_large_body_is_not_read_before_its_sender_is_known(locked):
    answer = locked.post("/v1/trajectories", content=b" " * 20_000_000)
    assert answer.status_code == 401


def test_all_bodies_together_are_bounded_and_each_gives_back_its_share():
    with serving(limits={"all_bodies_bytes": 2 * BODY_BYTES}) as client, contextlib.ExitStack() as stack:
        head = "POST /v1/trajectories HTTP/1.1", "Host: x", "Content-Type: application/json"
        begun = ("\r\n".join([*head, f"Content-Length: {BODY_BYTES}"]) + "\r\n\r\n").encode() + b" " * 40_000

        def stranger():
            found = stack.enter_context(socket.create_connection((client.base_url.host, client.base_url.port)))
            found.settimeout(0.5)
            found.sendall(begun)
            return found

        first, second = stranger(), stranger()
        for waiting in (first, second):
            with pytest.raises(TimeoutError):
                waiting.recv(1)
        third = stranger().recv(2000)
        assert b" 503 " in third.splitlines()[0] and b"retry-after: 5" in third and b"problem+json" in third
        assert client.post("/v1/trajectories", content=b" " * 30_000).status_code == 503
        first.sendall(b" " * 10_000)  # it is whole, and answered
        assert b"422" in first.recv(2000)
        second.close()
        deadline = time.monotonic() + 10
        json_type = {"content-type": "application/json"}
        while (
            answer := client.post("/v1/trajectories", content=b" " * BODY_BYTES, headers=json_type)
        ).status_code != 422:
            assert answer.status_code == 503 and time.monotonic() < deadline
            time.sleep(0.05)


def test_a_body_that_never_comes_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.5)
    with serving() as client, socket.create_connection((client.base_url.host, client.base_url.port)) as stranger:
        head = "POST /v1/trajectories HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 100"
        stranger.sendall(("\r\n".join(head) + "\r\n\r\n{").encode())
        stranger.settimeout(10)
        assert b"408 Request Timeout" in stranger.recv(1000)


@pytest.mark.parametrize(
    "body", [b"[" * 40_000, b'{"a":' * 8_000, b"\xff\xfe", b"", b"null", b"NaN", b'{"problems": {}}']
)
def test_a_body_that_is_no_request_is_refused_and_never_an_error_of_the_servers(locked, body):
    headers = bearer("first-key") | {"content-type": "application/json"}
    answer = locked.post("/v1/trajectories", content=body, headers=headers)
    assert answer.status_code in (400, 422, 503) and answer.json()["title"]


def test_a_server_that_is_about_to_stop_takes_no_new_work_and_says_so():
    with serving() as client:
        client.service.draining = True
        answer = client.post("/v1/trajectories", json={"problems": [{"id": "a", "question": "q"}]})
        assert answer.status_code == 503 and answer.headers["retry-after"] and "stopping" in answer.json()["detail"]
        assert "stopping" in client.get("/ready").json()["detail"]
        assert client.get("/health").status_code == 200


def test_every_answer_carries_a_request_id_the_clients_own_where_it_may_be_logged(locked):
    assert len(locked.get("/health").headers["x-request-id"]) == 16
    assert locked.get("/x").headers["x-request-id"] != locked.get("/x").headers["x-request-id"]
    assert locked.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert locked.get("/health", headers={"x-request-id": "x" * 500}).headers["x-request-id"] != "x" * 500


def test_requests_are_logged_with_their_id_and_keys_never_are(locked, caplog):
    caplog.handler.addFilter(logs.AboutFilter())
    with caplog.at_level(logging.INFO, "lightreasoner"):
        locked.get("/health")
        locked.get("/version", headers=bearer("a-wrong-secret"))
        locked.get("/version", headers=bearer("first-key") | {"x-request-id": "seen-1"})
        locked.get("/ready")
    (seen,) = [record for record in caplog.records if getattr(record, "request_id", "") == "seen-1"]
    assert (seen.method, seen.path, seen.status) == ("GET", "/version", 200) and seen.seconds >= 0
    line = json.loads(logs.json_formatter().format(seen))
    assert line["request_id"] == "seen-1" and line["level"] == "INFO" and line["message"].startswith("GET /version 200")
    assert not any(
        "first-key" in str(vars(record)) or "a-wrong-secret" in str(vars(record)) for record in caplog.records
    )
    assert not any(getattr(record, "path", "") == "/health" for record in caplog.records)


def test_what_a_stranger_names_reaches_no_terminal_as_it_is(locked, caplog):
    with caplog.at_level(logging.INFO, "lightreasoner"):
        locked.get("/a%1b%5b31m%0d%0a2026%20forged", headers=bearer("first-key"))
        locked.get("/health")  # by the next answer the last one is logged
    (seen,) = [record for record in caplog.records if "forged" in record.getMessage()]
    assert seen.getMessage().startswith("GET /a%1B%5B31m%0D%0A2026%20forged 404 ")


def test_one_that_leaves_before_its_body_is_whole_is_counted_as_gone():
    def gone():
        return metrics.HTTP_REQUESTS.labels("POST", "/v1/trajectories", 499)._value.get()

    before = gone()
    with serving() as client:
        with socket.create_connection((client.base_url.host, client.base_url.port)) as stranger:
            stranger.sendall(b"POST /v1/trajectories HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
            time.sleep(0.2)
        deadline = time.monotonic() + 10
        while gone() == before and time.monotonic() < deadline:
            time.sleep(0.05)
    assert gone() == before + 1


@pytest.mark.parametrize(("more", "status"), [(False, 200), (True, 499)])
def test_one_that_leaves_before_its_answer_is_whole_is_counted_as_gone(more, status):
    """Straight at the ASGI layer: no race. `more`: whether the client leaves before the answer's last piece."""

    async def app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": more})
        await receive()

    def counted():
        return metrics.HTTP_REQUESTS.labels("POST", "unknown", status)._value.get()

    messages = iter([{"type": "http.request", "body": b""}, {"type": "http.disconnect"}])

    async def receive():
        return next(messages)

    async def send(message):
        pass

    before = counted()
    scope = {"type": "http", "method": "POST", "path": "/x", "headers": []}
    asyncio.run(Guard(app, ApiKeys([]), BODY_BYTES, lambda: False)(scope, receive, send))
    assert counted() == before + 1


def test_unknown_paths_and_methods_share_one_label(locked):
    for index in range(5):
        locked.request("PURGE", f"/nowhere/{index}", headers=bearer("first-key"))
        locked.get(f"/nowhere/{index}", headers=bearer("first-key"))
    said = locked.get("/metrics", headers=bearer("first-key")).text
    assert 'path="unknown"' in said and "nowhere" not in said and "PURGE" not in said


def test_keys_come_from_file_and_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# of the team\nfrom-file\n\n  padded  \n")
    monkeypatch.setenv(guard.API_KEYS_VARIABLE, "from-env, second-env")
    keys = load_keys(ServerSettings(api_key_file=file))
    assert all(keys.name_of(f"Bearer {key}") for key in ("from-file", "padded", "from-env", "second-env"))
    assert not keys.name_of("Bearer # of the team") and not keys.name_of("Bearer ")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_beyond_loopback_a_key_is_needed(host, monkeypatch):
    monkeypatch.delenv(guard.API_KEYS_VARIABLE, raising=False)
    with pytest.raises(SettingsError, match="API key is needed"):
        load_keys(ServerSettings(host=host))
    monkeypatch.setenv(guard.API_KEYS_VARIABLE, "long-enough")
    assert load_keys(ServerSettings(host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_on_loopback_none_is(host, monkeypatch):
    monkeypatch.delenv(guard.API_KEYS_VARIABLE, raising=False)
    assert not load_keys(ServerSettings(host=host))


@pytest.mark.parametrize(("host", "shortest"), [("127.0.0.1", 4), ("0.0.0.0", 8)])
def test_a_key_that_can_be_guessed_is_refused(host, shortest, monkeypatch):
    monkeypatch.setenv(guard.API_KEYS_VARIABLE, f"a-long-enough-key,{'x' * (shortest - 1)}")
    with pytest.raises(SettingsError, match=f"shorter than {shortest} characters"):
        load_keys(ServerSettings(host=host))
    monkeypatch.setenv(guard.API_KEYS_VARIABLE, "x" * shortest)
    assert load_keys(ServerSettings(host=host))


@pytest.mark.parametrize("path", ["/v1/jobs/", "/v1/models/", "/health/", "//evil.example/", "/v1/trajectories/"])
def test_a_path_that_is_none_is_not_redirected(locked, path):
    for host in ("evil.example", "127.0.0.1"):
        answer = locked.request("GET", path, headers=bearer("first-key") | {"host": host})
        assert answer.status_code == 404 and "location" not in answer.headers and "evil" not in answer.text


@pytest.mark.parametrize(
    ("content", "said"), [("", "holds no key"), ("two words\n", "neither spaces"), (None, "cannot")]
)
def test_a_key_file_that_will_not_do_is_named(tmp_path, content, said):
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match=said):
        load_keys(ServerSettings(api_key_file=file))


def test_the_command_refuses_to_listen_to_strangers_without_a_key():
    words = ["--expert", "deploy/demo/expert", "--amateur", "deploy/demo/amateur", "--host", "0.0.0.0", "--port", "0"]
    began = time.monotonic()
    said = command("server", *words)
    assert said.returncode == 1 and "--api-key-file" in said.stderr and "Traceback" not in said.stderr
    assert time.monotonic() - began < 60
