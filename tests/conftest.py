"""What every test may ask for. A pair of engines takes many seconds to start, so those here serve the whole session.

A test that ends one of them is marked `last`: it runs when all others have.
"""

from __future__ import annotations

import gc
import os
import secrets
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from support.costs import ENGINE, PROCESS, UNIT, cost, shares_engines
from support.servers.real_server import DEMO, SHARED_DATA, SMOLLM2, RunningServer, running_server
from support.servers.real_store import BUCKET, running_s3
from support.servers.restarting import SERVICE, Restarting

SHOWN_OF_A_PARAMETER = 60
# Threads that spin while they wait for each other, on cores that other processes use, take minutes for seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What one process compiles, all others read.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
PRELOADED = os.environ.get("LD_PRELOAD")
gc.disable()  # while test modules and what they import are loaded, which leaves no garbage


def pytest_configure(config: pytest.Config) -> None:
    """xdist's first process collects nothing, so that nothing would turn the search for garbage on again."""
    if config.getoption("dist", "no") != "no" and "PYTEST_XDIST_WORKER" not in os.environ:
        gc.enable()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Names of tests stay short enough to be read; pytest numbers those that are then alike."""
    if isinstance(val, (str, bytes)) and len(val) > SHOWN_OF_A_PARAMETER:
        return ascii(val[:SHOWN_OF_A_PARAMETER])
    return None


@pytest.hookimpl(tryfirst=True)  # xdist and -m read the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what each test costs. Tests of one file stay in one worker, as do all that share a server of the session.

    The dearest groups come first: what is left for the end is small, and both workers end at about the same time.
    """
    order = {}
    for item in items:
        item.add_marker(found := cost(item))
        shares = found == ENGINE and shares_engines(item)
        item.add_marker(pytest.mark.xdist_group("servers" if shares else item.nodeid.partition("::")[0]))
        last = item.get_closest_marker("last") is not None
        order[item] = (not shares, (ENGINE, PROCESS, UNIT).index(found), last)
    items.sort(key=order.__getitem__)


def pytest_collection_finish() -> None:
    """What was imported and collected stays: a search for garbage, as each training ends with one, need not look there.

    Over the modules of torch, transformers and vLLM one takes half a second.
    """
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """At the interpreter's end all is taken apart."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_preloaded() -> Iterator[None]:
    """What vLLM, once set up in this process, has all processes after it load is not for those of the next test."""
    _preload_as_before()
    yield
    _preload_as_before()


def _preload_as_before() -> None:
    if PRELOADED is None:
        os.environ.pop("LD_PRELOAD", None)
    else:
        os.environ["LD_PRELOAD"] = PRELOADED


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The demo pair in float32, open to all, without a bucket; started by the public command, as no other one is."""
    folder = tmp_path_factory.mktemp("demo-server")
    with running_server(DEMO / "expert", DEMO / "amateur", folder, grace_seconds=60) as server:
        yield server


@pytest.fixture(scope="session")
def service_bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bucket of `service`."""
    return tmp_path_factory.mktemp("jobs") / "bucket"


@pytest.fixture(scope="session")
def service(service_bucket: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Restarting]:
    """The demo pair with all that a server can have: a key, a bucket, low limits. It can be killed and restarted."""
    models, folder = (DEMO / "expert", DEMO / "amateur"), tmp_path_factory.mktemp("service")
    server = Restarting(partial(running_server, *models, folder, imported=True, bucket=str(service_bucket), **SERVICE))
    yield server
    server.close()


@pytest.fixture(scope="session")
def equal_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The demo's expert as both models; an engine that takes no step for 4 s is taken to hang."""
    folder = tmp_path_factory.mktemp("equal-server")
    with running_server(DEMO / "expert", DEMO / "expert", folder, imported=True, hang_seconds=4) as server:
        yield server


@pytest.fixture(scope="session")
def smollm2() -> tuple[Path, Path]:
    """SmolLM2-135M-Instruct and its weaker sibling, made once in a cache folder."""
    from smollm2 import make_pair

    return make_pair(SMOLLM2)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server, which this process and those that it starts find in their environment; a bucket's URL."""
    with running_s3(tmp_path_factory.mktemp("s3")) as environment:
        os.environ.update(environment)
        yield f"s3://{BUCKET}"
        for name in environment:
            os.environ.pop(name)


@pytest.fixture(params=["folder", "s3"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty bucket: a local folder, then a prefix on the S3 server."""
    if request.param == "folder":
        return str(tmp_path / "bucket")
    return f"{request.getfixturevalue('s3')}/{secrets.token_hex(4)}"


@pytest.fixture
def shared_data() -> Path:
    """Real benchmark problems, where they lie beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no benchmark problems at {SHARED_DATA}: this clone stands alone")
    return SHARED_DATA


@pytest.fixture(scope="session")
def smollm2_server(smollm2: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The SmolLM2 pair in float32, with room for long trajectories."""
    folder = tmp_path_factory.mktemp("smollm2-server")
    with running_server(*smollm2, folder, max_model_len=2304, cache_bytes=2 * 1024**3, imported=True) as server:
        yield server
