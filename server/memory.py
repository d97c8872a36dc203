"""How a pair's two engines share memory: what each needs of a card, what is left for its cache, which context fits.

In: the shape of each engine and the memory of the cards. Out: vLLM engine arguments that its own checks pass, or
SettingsError saying what does not fit. vLLM takes the numbers as they are: with `kv_cache_memory_bytes` it measures
nothing, and `gpu_memory_utilization` is only what must be free when an engine starts. Asks no device, and imports
neither torch nor vLLM.

A card's memory holds, for each engine on it: weights; an allowance for what vLLM allocates beside them; the cache of
keys and values. The cache is what remains, shared so that both engines hold as many tokens. The amateur's stops at what
it can use: it reads a trajectory in one or two steps and forgets it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.logs import log
from server.settings import GIB, ROLES, EngineArguments, Role, SettingsError

GPU_MEMORY_SHARE = 0.9
"""Of a card's memory, for all engines on it. The rest is for fragments, and for what an allowance gets wrong."""
SLOTS, MOST_SLOTS = 256, 1024
"""Sequences that an engine runs at a time on a GPU, unless told otherwise; the amateur as many as the expert, up to the
second: the pair works on as many trajectories as the smaller of the two takes."""
BATCHED_TOKENS, SMALL_BATCHED_TOKENS, SMALL_CARD = 8192, 4096, 36 * GIB
"""Tokens of one step on a GPU, unless told otherwise; on a small card, and what a small card is."""
CONTEXT = GIB // 2
"""A device context. An engine makes its own before vLLM looks whether its share of the card is free."""
RUNTIME = CONTEXT + GIB // 4
"""A device context, compiled kernels, and the workspaces of libraries."""
BETWEEN_CARDS = GIB // 2
"""Buffers of an engine whose parts on several cards talk to each other."""
GRAPHS, GRAPHS_A_LAYER = GIB // 4, 12 * 1024**2
"""CUDA graphs, as vLLM reports them for models of 28 to 80 layers."""
SCORED_ROWS = 1024
"""Rows whose logits vLLM computes at one time to score a prompt; its own memory profile does not count them."""
SAMPLED_VALUE = 16
"""Bytes of a logit of a sampled row: it is copied, sorted and normalized in float32."""
BLOCK = 128
"""Tokens of the largest block that a cache is made of. One block of a cache is never used."""
SMALLEST_CONTEXT = 1024
"""Tokens. An engine without room for as many does not fit, unless its model takes no more."""
KV_CACHE_SHARE = 0.1
"""Of the machine's memory, for each engine's cache on a CPU, between 0.5 and 4 GiB."""
CPU_CONTEXT = 32_768
"""On a CPU the expert's prompts are computed whole, so that a step must have room for its whole context."""


@dataclass(frozen=True)
class EngineShape:
    """What of an engine decides how much memory it needs. Bytes are those of one card, which holds a part of the model.

    `columns`: the most values that a layer holds for a token, beside what all layers hold.
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
        """What is allocated beside weights and cache."""
        activations = batched_tokens * self.columns * self.value_bytes
        logits = self.vocabulary * max(sequences * SAMPLED_VALUE, 2 * SCORED_ROWS * self.value_bytes)
        graphs = GRAPHS + self.layers * GRAPHS_A_LAYER if self.graphs else 0
        return RUNTIME + activations + logits + graphs + (BETWEEN_CARDS if len(self.devices) > 1 else 0)

    def tokens(self, cache: int) -> int:
        """How long a sequence may be that a cache of so many bytes holds."""
        return max(0, cache // (BLOCK * max(1, self.token_bytes)) - 1) * BLOCK


def gpu_arguments(
    shapes: Mapping[Role, EngineShape], given: Mapping[Role, EngineArguments], memory: Mapping[int, int]
) -> dict[Role, EngineArguments]:
    """The engine arguments that decide memory on a GPU, for each engine; what `given` holds stays as it is.

    `memory`: bytes of each card. Engines on disjoint cards do not share. Raises SettingsError where they do not fit.
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
    """The engine arguments that decide memory on a CPU, for each engine; what `given` holds stays as it is."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    usual = min(max(KV_CACHE_SHARE * machine, GIB // 2), 4 * GIB)
    arguments: dict[Role, EngineArguments] = {}
    for role, shape in shapes.items():
        cache = int(_number(given[role], "kv_cache_memory_bytes") or usual)
        fits = min(shape.tokens(cache), CPU_CONTEXT if role == "expert" else shape.context)
        arguments[role] = {"kv_cache_memory_bytes": cache} | _context(role, shapes, given, fits)
    return arguments


class EnginePlan:
    """One engine's part of a card, in bytes: what it must have, and its cache, which is open until it is decided."""

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
        """Bytes that must be free when it starts, where the user has set its share of the card."""
        self.open = not share and not self.cache
        self._room = 0
        # With a cache of the user's own, only what is certain: an allowance may be more than is needed.
        self.certain = shape.weights if self.cache and not share else self.must

    @property
    def taken(self) -> int:
        """What is gone for others when it has started."""
        return self.certain + self.room

    @property
    def room(self) -> int:
        """For the cache, whether it is used or not."""
        return self._room or self.cache

    def fill(self, room: int) -> None:
        """Give it room for a cache. It takes what all its sequences can use at their longest, and no more."""
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
    """Decide the caches that are open: whoever else is on the card has its own already."""
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
    """An argument's value; 0 where it is not given, or is nothing to reckon with, which vLLM then says."""
    value = given.get(key)
    return value if isinstance(value, (int, float)) and value > 0 else 0


def slots_a_rank(role: Role, given: Mapping[Role, EngineArguments]) -> int:
    """Of each of an engine's data-parallel ranks, at a time."""
    if chosen := _number(given[role], "max_num_seqs"):
        return int(chosen)
    if role == "expert":
        return SLOTS
    slots = min(MOST_SLOTS, slots_a_rank("expert", given) * ranks_of(given["expert"]))
    return max(SLOTS, -(-slots // ranks_of(given["amateur"])))


def ranks_of(given: EngineArguments) -> int:
    """How many data-parallel ranks an engine has."""
    return int(_number(given, "data_parallel_size") or 1)


def _wanted_context(shape: EngineShape, given: EngineArguments) -> int:
    """The context that the user asks for, or the model's; vLLM's -1 asks for what fits."""
    return int(_number(given, "max_model_len") or shape.context)


def _context(
    role: Role, shapes: Mapping[Role, EngineShape], given: Mapping[Role, EngineArguments], fits: int
) -> EngineArguments:
    """The context that fits, where the model's does not and the user asks for none."""
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
