"""A Ray cluster of one node or several on this machine, with the application on it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from support.cluster.memory_pair import FOLDER, from_memory
from support.servers.real_server import DEMO, ENGINE_TITLE, ROOT, free_port
from support.servers.stand_in_engines import SLOTS

START_TRIES = 3
NODE = {
    "object_store_memory": 100 * 1024**2, "include_dashboard": False, "include_log_monitor": False,
    "no_monitor": True,
}  # fmt: skip
RAY = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_niceness": "0",
}  # fmt: skip
"""Keeps Ray from starting unneeded processes, which cost seconds each, and from giving its workers a low priority."""


class LocalCluster:
    """`url` answers once `serve` has returned."""

    def __init__(self, folder: Path, nodes: int, real_engines: bool, cpus: int) -> None:
        import ray
        from ray import serve
        from ray.cluster_utils import Cluster

        self.folder = folder
        paths = [ROOT, ROOT / "tests", *([] if real_engines else [Path(__file__).parent / "on_path"])]
        os.environ |= RAY | {FOLDER: str(folder), "PYTHONPATH": ":".join(map(str, paths))}
        for tries_left in reversed(range(START_TRIES)):
            try:
                self.cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": cpus})
                self.others = [self.cluster.add_node(**NODE, num_cpus=cpus) for _ in range(nodes - 1)]
                break
            except Exception as error:  # Ray waits 30 s for a node, and a busy machine may take longer
                if not tries_left or "timed out during startup" not in str(error):
                    raise
        ray.init(self.cluster.address, log_to_driver=False, logging_level="error")
        port = free_port()  # only now: a node takes many ports as it starts
        self.url = f"http://127.0.0.1:{port}"
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")

    def serve(
        self, start: Callable[..., Any] = from_memory, scaling: Mapping[str, float] | None = None, **args: Any
    ) -> None:
        """Deploy the application, and wait until replicas and front are ready.

        `scaling`: fields of `autoscaling_config`, as in a Serve YAML. By default Ray waits 10 minutes before it ends a
        replica.
        """
        from ray import serve

        from server.cluster.application import application_over

        models = {role: {"model": str(DEMO / role), "max_num_seqs": SLOTS} for role in ("expert", "amateur")}
        application = application_over(start, {**models, "gpus": 0, "host": "127.0.0.1", **args})
        pair = application._bound_deployment.init_args[1]._bound_deployment
        for name, value in (scaling or {}).items():
            setattr(pair._deployment_config.autoscaling_config, name, value)
        serve.run(application, route_prefix="/")

    def end(self) -> None:
        """Delete the application, as `serve shutdown` does."""
        from ray import serve

        serve.delete("default")

    def replicas(self, deployment: str = "Pair") -> int:
        """The number of running replicas."""
        from ray import serve

        return serve.status().applications["default"].deployments[deployment].replica_states.get("RUNNING", 0)

    def counts(self, kind: str = "asked") -> dict[int, int]:
        """The number of trajectories that each replica was asked for (or another `kind`), by its process's id."""
        return {int(file.stem): file.stat().st_size for file in self.folder.glob(f"*.{kind}")}

    @contextlib.contextmanager
    def held(self, seconds: float | None = None) -> Iterator[None]:
        """Within the block no trajectory ends; with `seconds`, none ends before it has taken so long."""
        (self.folder / "hold").write_text("" if seconds is None else str(seconds))
        try:
            yield
        finally:
            (self.folder / "hold").unlink()

    def kill(self, process: int) -> None:
        os.kill(process, signal.SIGKILL)

    def pid_of(self, deployment: str) -> int:
        """The id of a process of a deployment."""
        return self._process(f"ray::ServeReplica:default:{deployment}")

    def engine(self) -> int:
        """The id of a process of a real engine."""
        return self._process(ENGINE_TITLE)

    def _process(self, title: str) -> int:
        mine = f"{FOLDER}={self.folder}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if title in (process / "cmdline").read_text() and mine in (process / "environ").read_bytes():
                    return int(process.name)
        raise AssertionError(f"no process {title}")

    def close(self) -> None:
        import ray
        from ray import serve

        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()
        self.cluster.shutdown()


@contextlib.contextmanager
def local_cluster(folder: Path, nodes: int = 1, real_engines: bool = False, cpus: int = 4) -> Iterator[LocalCluster]:
    """Start a cluster. `cpus`: the CPUs of each node, as Ray counts them."""
    before = dict(os.environ)
    cluster = LocalCluster(folder, nodes, real_engines, cpus)
    try:
        yield cluster
    finally:
        cluster.close()
        os.environ.clear()
        os.environ.update(before)


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait until `condition` returns a true value. Returns that value."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it has not come"
        time.sleep(0.2)
    return found
