"""Plans a pair's memory: what each engine needs of a card, what is left for its cache, which context fits.

In: the shape of each engine and the memory of the cards. Out: engine arguments that pass vLLM's own checks, or a
SettingsError saying what does not fit. vLLM uses the numbers unchanged: with `kv_cache_memory_bytes` it measures
nothing, and `gpu_memory_utilization` only says how much must be free when an engine starts. Queries no device, and
imports neither torch nor vLLM.

A card's memory holds, for each engine on it: weights; an allowance for what vLLM allocates beside them; the cache of
keys and values. The caches get what remains, shared so that both engines hold as many tokens. The amateur's cache is
not larger than it can use: the amateur reads a trajectory in one or two steps and forgets it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.logs import log
from server.settings import GIB, ROLES, EngineArguments, Role, SettingsError

GPU_MEMORY_SHARE = 0.9
"""Share of a card's memory for all engines on it. The rest is for fragmentation, and for errors of an allowance."""
SLOTS, MOST_SLOTS = 256, 1024
"""Default number of sequences that an engine runs at a time on a GPU. The amateur runs as many as the expert, up to the
second value: the pair works on as many trajectories as the smaller of the two."""
BATCHED_TOKENS, SMALL_BATCHED_TOKENS, SMALL_CARD = 8192, 4096, 36 * GIB
"""Default tokens of one step on a GPU; those on a small card; and the memory below which a card is small."""
CONTEXT = GIB // 2
"""Bytes of a device context. An engine creates its own before vLLM checks whether its share of the card is free."""
RUNTIME = CONTEXT + GIB // 4
"""Bytes of a device context, compiled kernels, and the workspaces of libraries."""
BETWEEN_CARDS = GIB // 2
"""Bytes of the communication buffers of an engine on several cards."""
GRAPHS, GRAPHS_A_LAYER = GIB // 4, 12 * 1024**2
"""Bytes of CUDA graphs, and more for each layer, as vLLM reports them for models of 28 to 80 layers."""
SCORED_ROWS = 1024
"""Rows whose logits vLLM computes at a time to score a prompt. vLLM's own memory profile does not count them."""
SAMPLED_VALUE = 16
"""Bytes per logit of a sampled row, which is copied, sorted and normalised in float32."""
BLOCK = 128
"""Tokens of the largest cache block. One block of a cache is never used."""
SMALLEST_CONTEXT = 1024
"""Least tokens for which an engine's cache must have room, unless its model's context is smaller."""
KV_CACHE_SHARE = 0.1
"""Share of the machine's memory for each engine's cache on a CPU, limited to between 0.5 and 4 GiB."""
CPU_CONTEXT = 32_768
"""Most tokens of the expert's default context on a CPU: prompts are computed whole there, so a step must have room for
a whole context."""


@dataclass(frozen=True)
class EngineShape:
    """The properties of an engine that decide its memory. Bytes are those of one card, which holds a part of the model.

    `columns`: values of activations per token: those of the widest layer, and those beside it in every layer.
    """

    devices: tuple[int, ...]
    weights: int
    layers: int
    columns: int
    vocabulary: int
    value_bytes: int
    token_bytes: int
    context: int
    graphs: bool = True

    def allowance(self, sequences: int, batched_tokens: int) -> int:
        """Bytes that vLLM allocates beside weights and cache."""
        activations = batched_tokens * self.columns * self.value_bytes
        logits = self.vocabulary * max(sequences * SAMPLED_VALUE, 2 * SCORED_ROWS * self.value_bytes)
        graphs = GRAPHS + self.layers * GRAPHS_A_LAYER if self.graphs else 0
        return RUNTIME + activations + logits + graphs + (BETWEEN_CARDS if len(self.devices) > 1 else 0)

    def tokens(self, cache: int) -> int:
        """The longest sequence, in tokens, that a cache of `cache` bytes holds."""
        return max(0, cache // (BLOCK * max(1, self.token_bytes)) - 1) * BLOCK


def gpu_arguments(
    shapes: Mapping[Role, EngineShape], given: Mapping[Role, EngineArguments], memory: Mapping[int, int]
) -> dict[Role, EngineArguments]:
    """The engine arguments that decide memory on a GPU, for each engine. Arguments in `given` do not change.

    `memory`: bytes of each card. Engines on disjoint cards do not share. Raises SettingsError if they do not fit.
    """
    expert, amateur = shapes["expert"].devices, shapes["amateur"].devices
    groups: list[tuple[Role, ...]] = [ROLES] if {*expert} & {*amateur} else [("expert",), ("amateur",)]
    arguments: dict[Role, EngineArguments] = {}
    for roles in groups:
        card = min(memory[device] for role in roles for device in shapes[role].devices)
        plans = [EnginePlan(role, shapes[role], given[role], card, slots_a_rank(role, given)) for role in roles]
        _share(plans, card)
        for plan in plans:
            log.info("memory of a card of %.1f GiB: %s", card / GIB, plan)
            arguments[plan.role] = {
                "max_num_seqs": plan.sequences,
                "max_num_batched_tokens": plan.batched_tokens,
                "kv_cache_memory_bytes": plan.cache,
                "gpu_memory_utilization": min(GPU_MEMORY_SHARE, int(plan.taken / card * 10_000) / 10_000),
            } | _context(plan.role, shapes, given, plan.shape.tokens(plan.cache))
    return arguments


def cpu_arguments(
    shapes: Mapping[Role, EngineShape], given: Mapping[Role, EngineArguments]
) -> dict[Role, EngineArguments]:
    """The engine arguments that decide memory on a CPU, for each engine. Arguments in `given` do not change."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    usual = min(max(KV_CACHE_SHARE * machine, GIB // 2), 4 * GIB)
    arguments: dict[Role, EngineArguments] = {}
    for role, shape in shapes.items():
        cache = int(_number(given[role], "kv_cache_memory_bytes") or usual)
        fits = min(shape.tokens(cache), CPU_CONTEXT if role == "expert" else shape.context)
        arguments[role] = {"kv_cache_memory_bytes": cache} | _context(role, shapes, given, fits)
    return arguments


class EnginePlan:
    """One engine's part of a card, in bytes: what it must have, and its cache, which stays open until `fill`."""

    def __init__(self, role: Role, shape: EngineShape, given: EngineArguments, card: int, sequences: int) -> None:
        self.role, self.shape, self.given, self.sequences = role, shape, given, sequences
        batched = max(SMALL_BATCHED_TOKENS if card < SMALL_CARD else BATCHED_TOKENS, self.sequences)
        if given.get("enable_chunked_prefill") is False:
            batched = max(batched, self.context)
        self.batched_tokens = int(_number(given, "max_num_batched_tokens") or batched)
        self.beside = shape.allowance(self.sequences, self.batched_tokens)
        self.must = shape.weights + self.beside
        share = _number(given, "gpu_memory_utilization")
        self.cache = int(_number(given, "kv_cache_memory_bytes") or (share * card - self.must if share else 0))
        self.shared = int(share * card)
        """Bytes that must be free when the engine starts, if the user has set its share of the card."""
        self.open = not share and not self.cache
        self._room = 0
        # If the user sets the cache, only the weights are certain: an allowance may be more than is needed.
        self.certain = shape.weights if self.cache and not share else self.must

    @property
    def taken(self) -> int:
        """Bytes that are not free for others once the engine has started."""
        return self.certain + self.room

    @property
    def room(self) -> int:
        """Bytes reserved for the cache, used or not."""
        return self._room or self.cache

    def fill(self, room: int) -> None:
        """Reserve room for the cache. The cache takes at most what all sequences can use at their longest."""
        self._room = room
        self.cache = min(room, self.shape.token_bytes * (self.sequences * (self.context + BLOCK) + BLOCK))

    @property
    def context(self) -> int:
        return _wanted_context(self.shape, self.given)

    def __str__(self) -> str:
        sizes = (self.shape.weights, self.beside, self.cache)
        return "{}: weights {:.1f} GiB, beside them {:.1f}, cache {:.1f}".format(
            self.role, *(size / GIB for size in sizes)
        )


def _share(plans: Sequence[EnginePlan], card: int) -> None:
    """Decide the caches that are open. Other engines on the card have theirs already."""
    undecided = [plan for plan in plans if plan.open]
    taken = sum(plan.must + plan.cache for plan in plans if not plan.open)
    rest = int(GPU_MEMORY_SHARE * card) - taken - sum(plan.must for plan in undecided)
    tokens = rest // max(1, sum(plan.shape.token_bytes for plan in undecided))
    for plan in undecided[1:]:  # the amateur beside the expert
        useful = plan.context + 2 * plan.batched_tokens + BLOCK
        plan.fill(plan.shape.token_bytes * min(tokens, useful))
        rest -= plan.room
    for plan in undecided[:1]:
        plan.fill(rest)
    free = card
    for plan in plans:  # in the order in which they start
        enough, free = plan.taken <= free and plan.shared <= free - CONTEXT, free - plan.taken
        if enough or not any(each.shared for each in plans):
            continue
        raise SettingsError(
            f"the engines' parts of a card of {card / GIB:.1f} GiB are more than the card ({_listed(plans)}): decrease"
            f" {_shares(plans)}, or leave it out"
        )
    for plan in plans:
        needed = min(SMALLEST_CONTEXT, plan.context)
        if not _number(plan.given, "kv_cache_memory_bytes") and plan.shape.tokens(plan.cache) < needed:
            remedy = f"Change {_shares(plans)}, take" if any(each.shared for each in plans) else "Take"
            raise SettingsError(
                f"the {plan.role} does not fit into a card of {card / GIB:.1f} GiB: a cache for {needed} tokens has no"
                f" room beside what the engines there take ({_listed(plans)}). {remedy} smaller or quantized models,"
                " give each engine its own card (device_ids), spread one over several (tensor_parallel_size), or set"
                " kv_cache_memory_bytes of both yourself"
            )


def _listed(plans: Sequence[EnginePlan]) -> str:
    return "; ".join(
        f"{plan.role} {plan.must / GIB:.1f} GiB, {plan.shape.weights / GIB:.1f} of it weights, and a cache of"
        f" {max(0, plan.room) / GIB:.1f}"
        for plan in plans
    )


def _shares(plans: Sequence[EnginePlan]) -> str:
    return " and ".join(f"{plan.role}.gpu_memory_utilization" for plan in plans if plan.shared)


def _number(given: EngineArguments, key: str) -> float:
    """An argument's value; 0 if it is missing, or is not a positive number, which vLLM then reports."""
    value = given.get(key)
    return value if isinstance(value, (int, float)) and value > 0 else 0


def slots_a_rank(role: Role, given: Mapping[Role, EngineArguments]) -> int:
    """Sequences that each data-parallel rank of an engine runs at a time."""
    if chosen := _number(given[role], "max_num_seqs"):
        return int(chosen)
    if role == "expert":
        return SLOTS
    slots = min(MOST_SLOTS, slots_a_rank("expert", given) * ranks_of(given["expert"]))
    return max(SLOTS, -(-slots // ranks_of(given["amateur"])))


def ranks_of(given: EngineArguments) -> int:
    """The number of an engine's data-parallel ranks."""
    return int(_number(given, "data_parallel_size") or 1)


def _wanted_context(shape: EngineShape, given: EngineArguments) -> int:
    """The context that the user sets, or the model's. vLLM's -1, for what fits, counts as not set."""
    return int(_number(given, "max_model_len") or shape.context)


def _context(
    role: Role, shapes: Mapping[Role, EngineShape], given: Mapping[Role, EngineArguments], fits: int
) -> EngineArguments:
    """The argument for the context that fits, if the model's does not and the user sets none; else empty."""
    wanted = {each: _wanted_context(shapes[each], given[each]) for each in shapes}
    if _number(given[role], "max_model_len") or fits >= wanted[role]:
        return {}
    context = max(BLOCK, fits)
    log.log(
        logging.WARNING if context < min(wanted.values()) else logging.INFO,  # a trajectory must fit into both
        "the %s's context is %d tokens, not its model's %d: more does not fit; to choose another, set %s.max_model_len",
        role, context, wanted[role], role,
    )  # fmt: skip
    return {"max_model_len": context}
