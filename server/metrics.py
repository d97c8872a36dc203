"""The service's Prometheus metrics: its own, and both engines' with a label `role`.

Own metrics are module values that other modules update. vLLM registers an engine's metrics with the default registry
and removes them when a second engine is built, so `adopt` moves them to a registry of their own in between.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client import REGISTRY as VLLM_REGISTRY
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from client.contrast import covered_mass, kl_lower_bound, mask_complete
from client.protocol.requests import ContrastSettings, Trajectory
from server.settings import Role

disable_created_metrics()
OURS = CollectorRegistry()
CONTENT_TYPE = CONTENT_TYPE_LATEST
LAG_SECONDS = 0.05
"""Interval at which the event loop's lag is measured."""
DEFAULTS = ContrastSettings()
SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
LONG = (0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class StepHistogram(Collector):
    """A histogram that takes the steps of a whole trajectory at once; prometheus_client's takes one value."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self._name, self._documentation = name, documentation
        self._edges = np.array([-np.inf, *bounds, np.inf])
        self._counts = np.zeros(len(bounds) + 1, np.int64)
        self._sum = 0.0
        OURS.register(self)

    def observe(self, values: npt.NDArray[np.floating]) -> None:
        """Count values, [T]. A value equal to a bound counts as below it, as in Prometheus."""
        values = values[np.isfinite(values)]  # one infinite value would spoil the sum for good
        buckets = np.searchsorted(self._edges[1:-1], values, side="left")
        self._counts += np.bincount(buckets, minlength=len(self._counts))
        self._sum += float(values.sum())

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._documentation)
        bounds = [*(str(float(edge)) for edge in self._edges[1:-1]), "+Inf"]
        totals = np.cumsum(self._counts).tolist()
        family.add_metric([], list(zip(bounds, totals, strict=True)), self._sum)
        yield family


TRAJECTORIES = Counter("lightreasoner_trajectories", "Trajectories by how they ended.", ["outcome"], registry=OURS)
STEPS = Counter("lightreasoner_steps", "Steps scored by both models.", registry=OURS)
TOKEN_COUNTS = Counter("lightreasoner_tokens", "Tokens of trajectories, by kind.", ["kind"], registry=OURS)
ENGINE_SECONDS = Histogram(
    "lightreasoner_engine_seconds", "A request's time in an engine, its waiting included.", ["role"],
    buckets=LONG, registry=OURS,
)  # fmt: skip
QUEUE_DEPTH = Gauge("lightreasoner_queue_depth", "Requests' trajectories, accepted and not yet sent.", registry=OURS)
LOOP_LAG = Histogram(
    "lightreasoner_event_loop_lag_seconds", "How late the event loop runs what is due.", buckets=SHORT, registry=OURS
)
KL = StepHistogram(
    "lightreasoner_kl_lower_bound_nats", f"The divergence's certified bound, from step {DEFAULTS.first_step} on.",
    (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0),
)  # fmt: skip
COVERED_MASS = StepHistogram(
    "lightreasoner_covered_mass", "The expert's probability on the ids that both models scored, a step.",
    (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999),
)  # fmt: skip
INCOMPLETE = Counter(
    "lightreasoner_incomplete_sets",
    f"Steps above beta {DEFAULTS.beta} whose plausible set (alpha {DEFAULTS.alpha}) is not proved whole.",
    registry=OURS,
)
ERRORS = Counter("lightreasoner_errors", "Trajectories that failed, by type of error.", ["type"], registry=OURS)
HTTP_REQUESTS = Counter(
    "lightreasoner_http_requests", "Requests by route and status.", ["method", "path", "status"], registry=OURS
)
HTTP_SECONDS = Histogram(
    "lightreasoner_http_request_seconds", "From a request's first byte to its answer's last.", ["method", "path"],
    buckets=LONG, registry=OURS,
)  # fmt: skip
READY = Gauge("lightreasoner_ready", "1 when both engines serve.", registry=OURS)
ENGINE_UP = Gauge("lightreasoner_engine_up", "1 while an engine lives.", ["role"], registry=OURS)
JOBS = Gauge("lightreasoner_jobs", "Open jobs of the whole bucket, by status.", ["status"], registry=OURS)
JOBS_ENDED = Counter("lightreasoner_jobs_ended", "Jobs that this server ended, by status.", ["status"], registry=OURS)


def count_trajectory(trajectory: Trajectory, vocab_size: int) -> None:
    """Count a complete trajectory; its steps are judged with the contrast's default settings."""
    TRAJECTORIES.labels("completed").inc()
    STEPS.inc(len(trajectory.token_ids))
    TOKEN_COUNTS.labels("prompt").inc(len(trajectory.prompt_token_ids))
    TOKEN_COUNTS.labels("completion").inc(len(trajectory.token_ids))
    logprobs = trajectory.expert_logprobs[DEFAULTS.first_step :], trajectory.amateur_logprobs[DEFAULTS.first_step :]
    if len(logprobs[0]):
        bound = kl_lower_bound(*logprobs)
        KL.observe(bound)
        COVERED_MASS.observe(covered_mass(*logprobs))
        INCOMPLETE.inc(int(((bound > DEFAULTS.beta) & ~mask_complete(*logprobs, DEFAULTS.alpha, vocab_size)).sum()))


def count_failure(kind: str) -> None:
    """Count a trajectory that ended in an error line."""
    TRAJECTORIES.labels("failed").inc()
    ERRORS.labels(kind).inc()


async def watch_loop() -> None:
    """Measure the event loop's lag until cancelled."""
    while True:
        due = time.perf_counter() + LAG_SECONDS
        await asyncio.sleep(LAG_SECONDS)
        LOOP_LAG.observe(max(0.0, time.perf_counter() - due))


class EngineMetrics(Collector):
    """vLLM's own metrics of both engines, with a label `role`."""

    def __init__(self) -> None:
        self._registries: dict[Role, CollectorRegistry] = {}

    def adopt(self, role: Role) -> None:
        """Move the metrics of the engine that was just built to a registry of its own."""
        mine = CollectorRegistry()
        for collector in list(VLLM_REGISTRY._collector_to_names):  # as vLLM itself finds them
            if getattr(collector, "_name", "").startswith("vllm:"):
                VLLM_REGISTRY.unregister(collector)
                mine.register(collector)
        self._registries[role] = mine

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for role, registry in self._registries.items():
            for found in registry.collect():
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                for sample in found.samples:
                    family.samples.append(sample._replace(labels={**sample.labels, "role": role}))
        yield from families.values()


ENGINES = EngineMetrics()
OURS.register(ENGINES)


def prometheus_text() -> bytes:
    """All metrics in Prometheus' text format."""
    return generate_latest(OURS)
