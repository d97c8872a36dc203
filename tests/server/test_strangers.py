"""A server with keys under made-up requests, sent as bytes: no answer is a server's error, and none is awaited in vain.

`test_api` asks what the document describes. Here heads, paths and bodies are anything; each run has another seed.
"""

import json
import os
import random
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from support.servers.stand_in import stand_in_server

KEYS = {"alice": "alices-secret-key", "bob": "bobs-secret-key", "admin": "the-admins-secret"}
THREADS, PATIENCE_SECONDS = 4, 30
EVERYWHERE = {400, 401, 404, 405, 408, 413, 431}
"""Statuses that need no route."""
PATHS = [
    "/v1/trajectories", "/v1/jobs", "/v1/jobs/{job}", "/v1/jobs/{job}/cancel", "/v1/models", "/v1/tokenizer", "/health",
    "/ready", "/metrics", "/version", "/openapi.json", "/docs", "/", "*", "/v1/jobs?limit=%s", "/v1/jobs?after=%s",
]  # fmt: skip
BODIES = PATHS[:2]
"""Where a body is read, which half of all are sent to."""
METHODS = ["GET", "GET", "POST", "POST", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "X", "get"]
VALUES = [
    None, True, 0, 1, -1, 2, 1.0, 0.5, 1e300, 2**31, 2**63, 10**400, "", "3", "x", "\N{GRINNING FACE}" * 300,
    "\x00\x1b[31m",
    "a" * 5000, [], {}, [1, 2, 3], ["1"], [None], [[]], {"a": 1}, [{"role": "user", "content": "q"}], "../..", "//x",
]  # fmt: skip
NAMES = [
    "problems", "max_tokens", "top_k", "n", "temperature", "top_p", "seed", "system_prompt", "chat_template_kwargs",
    "encoding", "run", "problems_url", "alpha", "beta", "first_step", "select", "labels", "stop_token_ids", "date", "x",
    "messages", "conversation", "amateur_prompt",
]  # fmt: skip
BYTES = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"null",
    b"\xef\xbb\xbf{}",
    b'"\\ud800"',
    b"1" * 5000,
    b"{}x",
]
HEADERS = [
    "Range: bytes=0-3", "Range: x", "Expect: 100-continue", "Idempotency-Key: same", "Idempotency-Key: ",
    "X-Request-Id: \x7f", "Accept-Encoding: gzip", "Content-Encoding: gzip", "Content-Type: text/plain",
    "Content-Length: 1", "Content-Length: 99999999999999999999999", "Transfer-Encoding: gzip", "bad header",
    "Connection: upgrade", "If-None-Match: *", f"X: {'y' * 20_000}", "Te: trailers",
    "Upgrade: websocket", "Host: evil.example",
]  # fmt: skip


def problem(rng):
    made = {"id": rng.choice(["a", "b", "\N{GRINNING FACE}", str(rng.random())]), "question": "What is 2 + 3?"}
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        made[rng.choice(["id", "question", "prompt_token_ids", "token_ids", "messages", "x"])] = rng.choice(VALUES)
    return made


def body(rng):
    if rng.random() < 0.1:
        return rng.choice(BYTES)
    asked = {"problems": [problem(rng) for _ in range(rng.choice([0, 1, 1, 1, 2]))], "max_tokens": 2}
    if rng.random() < 0.4:
        asked["run"] = f"runs/{rng.randrange(50)}"
    for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
        asked[rng.choice(NAMES)] = rng.choice(VALUES)
    text = json.dumps(asked, ensure_ascii=rng.random() < 0.5, allow_nan=True).encode(errors="replace")
    return text if rng.random() < 0.9 else text[: rng.randrange(len(text))]


def message(rng, jobs):
    """A whole request, and its method and path."""
    path = rng.choice(BODIES if rng.random() < 0.5 else PATHS)
    posts = path in BODIES and rng.random() < 0.8
    path = path.replace("{job}", rng.choice([*jobs[-20:], "job-1", "..", "%2e%2e", "\N{SNOWMAN}"]))
    path = path.replace("%s", rng.choice(["1", "0", "x", "1e9", "9" * 5000, "%00", "job-0000000000000-00000000"]))
    if rng.random() < 0.1:
        path += rng.choice(["/", "?", "#", "%", "%00", "//", "?a=b" * 50, ";", "\\", "/" + "z" * 9000])
    method = "POST" if posts else rng.choice(METHODS)
    lines = [f"{method} {path} HTTP/{rng.choice(['1.1'] * 9 + ['1.0', '2.0', 'x'])}", "Host: x", "Connection: close"]
    if rng.random() < 0.8:
        lines.append(f"Authorization: Bearer {rng.choice(list(KEYS.values()))}")
    content = body(rng) if method != "GET" or rng.random() < 0.1 else b""
    if content or rng.random() < 0.5:
        lines.append("Content-Type: application/json")
        chunked = rng.random() < 0.2
        lines.append("Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(content)}")
        content = b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content) if chunked and content else content
        content = content or (b"0\r\n\r\n" if chunked else b"")
    lines += rng.sample(HEADERS, rng.choice([0, 0, 0, 0, 1, 2]))
    if "Content-Length: 1" in lines:
        content = content or b"1"  # a body that does not come is waited for: see test_guard
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "replace") + content, method, path


def answer(address, said):
    """Status and head of the answer; b"" where the server closes without one. Raises TimeoutError where it hangs."""
    with socket.create_connection(address, timeout=PATIENCE_SECONDS) as stranger:
        found = b""
        try:
            stranger.sendall(said)
            while piece := stranger.recv(65536):
                found += piece
        except ConnectionError:
            pass
        return found


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.long)])
def test_no_request_of_a_stranger_is_an_error_of_the_servers_or_hangs(tmp_path, count):
    seed = int(os.environ.get("STRANGERS_SEED", random.SystemRandom().randrange(10**6)))
    print("seed", seed)
    (tmp_path / "keys").write_text("".join(f"{name}: {key}\n" for name, key in KEYS.items()))
    settings = {"api_key_file": str(tmp_path / "keys"), "bucket": str(tmp_path / "bucket")}
    with stand_in_server(tmp_path, limits={"open_jobs": 10**6}, **settings) as server:
        admin = {"Authorization": f"Bearer {KEYS['admin']}"}
        address = (urlsplit(server.url).hostname, urlsplit(server.url).port)
        document = server.ask("GET", "/openapi.json", headers=admin).json()
        statuses, wrong, jobs = Counter(), [], ["job-0000000000000-00000000"]

        def ask(number):
            said, method, path = message(random.Random(f"{seed}/{number}"), jobs)
            found = answer(address, said)
            status = int(found[9:12]) if found else 0
            statuses[status] += 1
            route = path.partition("?")[0]
            route = "/v1/jobs/{job_id}" + "/cancel" * route.endswith("/cancel") if "/jobs/" in route else route
            known = document["paths"].get(route, {}).get(method.lower(), {}).get("responses", {})
            documented = status < 300 or status in EVERYWHERE or str(status) in known
            kind = b"application/problem+json" in found.partition(b"\r\n\r\n")[0].lower()
            if status >= 500 or not documented or (status >= 400 and not kind):
                wrong.append((number, said[:300], found[:300]))
            if status == 202:
                jobs.append(json.loads(found.partition(b"\r\n\r\n")[2])["id"])

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(ask, range(count)))
        print(dict(statuses))
        assert not wrong, wrong[:5]
        usual = {200, 401, 404, 405, 422} | ({202} if count > 1000 else set())  # few requests make a valid job
        assert usual <= statuses.keys()
        assert server.ask("GET", "/health").status_code == 200 and "Traceback" not in server.log.read_text()
