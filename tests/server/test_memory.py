"""How two engines share cards, held against vLLM's own checks on pretended ones: real configurations, no weights.

vLLM checks twice: when an engine starts, whether as much memory is free as its utilisation asks for; when its weights
are loaded, whether its cache holds one sequence of the longest length.
"""

import json
import logging
import subprocess
from itertools import product

import pytest
from support.servers.real_server import DEMO, ROOT

from server.memory import CONTEXT, GPU_MEMORY_SHARE, SLOTS, EngineShape, cpu_arguments, gpu_arguments
from server.settings import GIB, SettingsError

QWEN = {  # layers, hidden, MLP, heads, key-value heads, columns of the head, billions of weights in the files
    "0.5B": (24, 896, 4864, 14, 2, 151_936, 0.494),
    "1.5B": (28, 1536, 8960, 12, 2, 151_936, 1.544),
    "7B": (28, 3584, 18_944, 28, 4, 152_064, 7.616),
    "14B": (48, 5120, 13_824, 40, 8, 152_064, 14.77),
    "32B": (64, 5120, 27_648, 40, 8, 152_064, 32.76),
}
CARDS = {16: 15.77, 24: 23.57, 40: 39.39, 48: 47.41, 80: 79.10, 141: 139.80}
"""GiB that CUDA counts on cards of so many GB: A4000, 4090, A100, A6000, H100, H200."""
FITS = {
    ("1.5B", "0.5B"): {16: 32_768, 24: 32_768, 40: 32_768, 48: 32_768, 80: 32_768, 141: 32_768},
    ("7B", "0.5B"): {24: 24_320, 40: 32_768, 48: 32_768, 80: 32_768, 141: 32_768},
    ("7B", "1.5B"): {40: 32_768, 48: 32_768, 80: 32_768, 141: 32_768},
    ("14B", "0.5B"): {40: 8_064, 48: 32_768, 80: 32_768, 141: 32_768},
    ("32B", "0.5B"): {80: 11_648, 141: 32_768},
    ("32B", "7B"): {141: 32_768},
}
"""The longest trajectory of a pair on one card, prompt included; where a card is left out, the pair is refused."""
PAIR = ("expert", "amateur")


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """An engine of a Qwen2.5 of some size, from its configuration. As a Llama, which the demo's models are too: vLLM
    takes seconds to look at another architecture."""
    from server.engines.start import engine_shape

    def made(size, **given):
        layers, hidden, wide, heads, kv_heads, vocabulary, billions = QWEN[size]
        folder = tmp_path_factory.mktemp("model")
        (folder / "config.json").write_text(json.dumps({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
            "max_position_embeddings": 32_768, "num_hidden_layers": layers, "hidden_size": hidden,
            "intermediate_size": wide, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary,
        }))  # fmt: skip
        return engine_shape("expert", {"model": str(folder), **given}, int(2e9 * billions))

    return made


@pytest.fixture(scope="module")
def start(shape):
    """Starts engines in order on one pretended card of so many GiB, as far as vLLM's checks go; what is left free.

    An engine that was started holds all that was planned for it.
    """
    import torch
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.mem_utils import MemorySnapshot
    from vllm.v1.core.kv_cache_utils import check_enough_kv_cache_memory
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.worker.utils import request_memory

    config = AsyncEngineArgs(str(DEMO / "expert"), enforce_eager=True).create_engine_config()
    config.cache_config.kv_cache_layout = "LBNHC"

    def started(sizes, planned, gib):
        total = int(gib * GIB)
        free = total
        for role, size in sizes.items():
            arguments, made = planned[role], shape(size)
            snapshot = MemorySnapshot(auto_measure=False, device="cpu")
            snapshot.total_memory, snapshot.free_memory = total, free - CONTEXT
            config.cache_config.gpu_memory_utilization = arguments["gpu_memory_utilization"]
            request_memory(snapshot, config.cache_config)
            layers, hidden, _, heads, kv_heads, _, _ = QWEN[size]
            layer = FullAttentionSpec(
                block_size=16, num_kv_heads=kv_heads, head_size=hidden // heads, dtype=torch.bfloat16
            )
            config.model_config.max_model_len = arguments.get("max_model_len", made.context)
            cache = arguments["kv_cache_memory_bytes"]
            check_enough_kv_cache_memory(config, {str(index): layer for index in range(layers)}, cache)
            free -= (
                made.weights + cache + made.allowance(arguments["max_num_seqs"], arguments["max_num_batched_tokens"])
            )
        return free

    return started


@pytest.mark.parametrize(("pair", "card"), list(product(FITS, CARDS)), ids=lambda value: str(value).replace("'", ""))
def test_a_pair_passes_vllms_checks_on_every_card_on_which_it_fits(shape, start, pair, card):
    sizes = dict(zip(PAIR, pair, strict=True))
    shapes, given = {role: shape(size) for role, size in sizes.items()}, {"expert": {}, "amateur": {}}
    total = int(CARDS[card] * GIB)
    if card not in FITS[pair]:
        with pytest.raises(SettingsError, match=r"does not fit into a card of .* GiB, .* of it weights"):
            gpu_arguments(shapes, given, {0: total})
        return
    planned = gpu_arguments(shapes, given, {0: total})
    assert start(sizes, planned, CARDS[card]) >= (1 - GPU_MEMORY_SHARE) * total
    context = min(planned[role].get("max_model_len", 32_768) for role in sizes)
    assert context == FITS[pair][card]
    assert all(arguments["max_num_seqs"] == SLOTS for arguments in planned.values())
    assert {arguments["max_num_batched_tokens"] for arguments in planned.values()} == {4096 if card < 40 else 8192}


def test_the_readme_shows_this_table():
    def shown(pair, card):
        context = FITS[pair].get(card)
        return "no" if context is None else "whole" if context == 32_768 else f"{context:,}"

    text = (ROOT / "server" / "README.md").read_text()
    for pair in FITS:
        assert f"| {' and '.join(pair)} | {' | '.join(shown(pair, card) for card in CARDS)} |" in text


def planned_for(shape, sizes=("7B", "0.5B"), memory=(80,), **given):
    """The memory arguments of a pair; `expert` and `amateur`: the user's own."""
    given = {role: given.get(role, {}) for role in PAIR}
    shapes = {role: shape(size, **given[role]) for role, size in zip(PAIR, sizes, strict=True)}
    planned = gpu_arguments(shapes, given, {index: int(CARDS[card] * GIB) for index, card in enumerate(memory)})
    return {role: planned[role] | given[role] for role in PAIR}


@pytest.mark.parametrize(
    "given",
    [
        {"expert": {"kv_cache_memory_bytes": 17 * GIB}, "amateur": {"kv_cache_memory_bytes": GIB}},
        {"expert": {"kv_cache_memory_bytes": 17 * GIB}},
        {"amateur": {"kv_cache_memory_bytes": 20 * GIB}},
        {"expert": {"kv_cache_memory_bytes": 50 * GIB}, "amateur": {"kv_cache_memory_bytes": 8 * GIB}},
        {
            "expert": {"kv_cache_memory_bytes": 51 * GIB},
            "amateur": {"kv_cache_memory_bytes": 8 * GIB},
        },  # all of the card
        {"expert": {"gpu_memory_utilization": 0.4}},
        {"amateur": {"gpu_memory_utilization": 0.3}},
        {"expert": {"gpu_memory_utilization": 0.6}, "amateur": {"gpu_memory_utilization": 0.2}},
        {"expert": {"gpu_memory_utilization": 0.9, "kv_cache_memory_bytes": 17 * GIB}},
        {"expert": {"kv_cache_memory_bytes": 17 * GIB}, "amateur": {"gpu_memory_utilization": 0.3}},
    ],
)
def test_whatever_the_user_sets_vllm_is_told_both_cache_and_utilisation_and_starts_both(shape, start, given):
    """A cache alone leaves vLLM's own 0.92 in force, which the second engine never finds free."""
    planned = planned_for(shape, **given)
    start(dict(zip(PAIR, ("7B", "0.5B"), strict=True)), planned, CARDS[80])
    for role in PAIR:
        assert planned[role]["kv_cache_memory_bytes"] > 0 and 0 < planned[role]["gpu_memory_utilization"] < 0.92
        assert given.get(role, {}).items() <= planned[role].items()


def test_shares_that_do_not_go_together_are_refused_by_name(shape):
    """vLLM would load the expert, and refuse the amateur then."""
    both = {"expert": {"gpu_memory_utilization": 0.6}, "amateur": {"gpu_memory_utilization": 0.6}}
    said = r"more than the card \(expert .*, and a cache of .*\): decrease expert\.gpu_memory_utilization and amateur\."
    with pytest.raises(SettingsError, match=said):
        planned_for(shape, **both)
    with pytest.raises(
        SettingsError, match=r"no room beside .* a cache of .*\. Change expert\.gpu_memory_utilization, "
    ):
        planned_for(shape, expert={"gpu_memory_utilization": 0.9})
    halves = {role: {"gpu_memory_utilization": 0.5} for role in PAIR}
    late = {"amateur": {"gpu_memory_utilization": 0.9, "kv_cache_memory_bytes": GIB}}
    for given in (halves, late):  # beside what the expert holds then, and the amateur's own context
        with pytest.raises(SettingsError, match=r"more than the card .*: decrease .*amateur\.gpu_memory_utilization"):
            planned_for(shape, **given)


def test_on_cards_of_their_own_each_engine_has_nine_tenths_of_its_card(shape):
    planned = planned_for(shape, memory=(80, 24), expert={"device_ids": [0]}, amateur={"device_ids": [1]})
    for arguments in planned.values():
        assert arguments["gpu_memory_utilization"] == pytest.approx(GPU_MEMORY_SHARE, abs=2e-4)
    assert [planned[role]["max_num_batched_tokens"] for role in PAIR] == [8192, 4096]
    assert planned["amateur"]["kv_cache_memory_bytes"] > 18 * GIB, "nobody else can use it"
    large = {"device_ids": [0], "kv_cache_memory_bytes": 64 * GIB}
    planned = planned_for(shape, memory=(80, 24), expert=large, amateur={"device_ids": [1]})["expert"]
    assert planned["gpu_memory_utilization"] <= GPU_MEMORY_SHARE, "all of a card is never free"


def test_a_card_in_both_lists_is_shared_by_what_lies_on_it(shape):
    """An expert of 14B on two cards of 40 GB, the amateur on the second of them."""
    pair = ("14B", "0.5B")
    two = {"device_ids": [0, 1], "tensor_parallel_size": 2}
    shared = planned_for(shape, pair, (40, 40), expert=two, amateur={"device_ids": [1]})
    alone = planned_for(shape, pair, (40, 40, 40), expert=two, amateur={"device_ids": [2]})
    assert sum(arguments["gpu_memory_utilization"] for arguments in shared.values()) == pytest.approx(0.9, abs=4e-4)
    assert alone["expert"]["gpu_memory_utilization"] == pytest.approx(0.9, abs=2e-4)
    assert "max_model_len" not in shared["expert"], "half of it lies on each card"


@pytest.mark.parametrize(
    ("given", "cards", "parts"),
    [
        ({}, (0,), 1),
        ({"device_ids": [3, 1]}, (3,), 1),
        ({"tensor_parallel_size": 4}, (0, 1, 2, 3), 4),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, (0, 1, 2, 3), 4),
        ({"data_parallel_size": 3, "device_ids": [1, 2, 3]}, (1, 2, 3), 1),
        ({"data_parallel_size": 2, "tensor_parallel_size": 2}, (0, 1, 2, 3), 2),
    ],
)
def test_an_engines_parts_lie_on_cards_of_their_own(shape, given, cards, parts):
    whole, made = shape("7B"), shape("7B", **given)
    assert made.devices == cards
    assert made.weights == whole.weights // parts and made.token_bytes == whole.token_bytes // parts


def test_more_parts_than_cards_are_refused_by_name(shape):
    with pytest.raises(SettingsError, match=r"expert\.device_ids \[0\] are too few: an engine of 2 parts"):
        shape("7B", device_ids=[0], tensor_parallel_size=2)


@pytest.mark.parametrize("given", [0, 1, "0", "0,1", [0, "1"], [True], [1.0], {"0": 1}])
def test_device_ids_that_are_no_list_of_cards_are_named(shape, given):
    """A variable without brackets gives a number."""
    said = r"expert\.device_ids must be a list of numbers, from 0, or of UUIDs in quotes, not "
    with pytest.raises(SettingsError, match=said):
        shape("0.5B", device_ids=given)


class Cards:
    """The cards of a pretended machine as vLLM tells of them: two that are seen of three, one of them a slice."""

    UUIDS = ("GPU-a", "GPU-b", "MIG-c")
    SEEN = (2, 0)

    def is_unspecified(self):
        return False

    def device_count(self):
        return len(self.SEEN)

    def device_id_to_physical_device_id(self, card):
        return self.SEEN[card]

    def device_control_id_to_physical_device_id(self, name):
        if name.isdecimal():
            return int(name)
        if name not in self.UUIDS:
            raise RuntimeError("Not Found")
        return self.UUIDS.index(name)

    def get_device_total_memory(self, card):
        raise RuntimeError("Insufficient Permissions")


@pytest.mark.parametrize(
    ("named", "cards"), [(["MIG-c"], (0,)), (["GPU-a"], (1,)), (["0"], (1,)), (["GPU-a", "MIG-c"], (1,))]
)
def test_cards_are_found_by_uuid_and_by_number_whatever_is_visible(shape, monkeypatch, named, cards):
    monkeypatch.setattr("server.engines.start.current_platform", Cards())
    assert shape("0.5B", device_ids=named).devices == cards


def test_a_card_that_is_not_there_or_not_visible_is_named(shape, monkeypatch):
    from server.engines.start import _card_memory

    monkeypatch.setattr("server.engines.start.current_platform", Cards())
    with pytest.raises(SettingsError, match=r"expert\.device_ids: 'GPU-d' names no GPU here: Not Found"):
        shape("0.5B", device_ids=["GPU-d"])
    with pytest.raises(SettingsError, match=r"GPU 'GPU-b' is not visible; CUDA_VISIBLE_DEVICES hides it"):
        shape("0.5B", device_ids=["GPU-b"])
    with pytest.raises(SettingsError, match="GPU 2 is asked for, and 2 are visible, from 0: see device_ids"):
        _card_memory(2)
    with pytest.raises(SettingsError, match="does not say how much memory GPU 0 has: Insufficient Permissions"):
        _card_memory(0)


def test_a_machine_without_a_gpu_is_told_so_by_the_build_for_gpus(shape, monkeypatch):
    from vllm.platforms.interface import UnspecifiedPlatform

    from server.engines.start import _card_memory

    monkeypatch.setattr("server.engines.start.current_platform", UnspecifiedPlatform())
    with pytest.raises(SettingsError, match=r"vLLM finds no GPU here, .* nvidia-smi .* install lightreasoner\[cpu\]"):
        _card_memory(0)


def test_a_card_has_as_much_memory_as_cudas_driver_counts(monkeypatch, tmp_path):
    """Of a slice (MIG) the library that vLLM asks tells the whole card, or nothing. This driver is a pretended one."""
    from server.engines import start

    source, library = tmp_path / "cuda.c", tmp_path / "libcuda.so.1"
    source.write_text("""
        #include <stddef.h>
        static int initialized;
        int cuInit(unsigned flags) { initialized = 1; return 0; }
        int cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return initialized ? 0 : 3; }
        int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)device << 30; return 0; }
    """)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setattr(start, "current_platform", Cards())
    monkeypatch.setattr(start, "CUDA_DRIVER", str(library))
    assert [start._card_memory(card) for card in (0, 1)] == [40 * GIB, 41 * GIB]


def test_a_context_that_the_user_sets_stays_and_one_that_does_not_fit_is_told(shape, caplog):
    planned = planned_for(shape, memory=(24,), expert={"max_model_len": 4096})
    assert planned["expert"]["max_model_len"] == 4096
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [text for text in warned if "context is" in text], "the amateur's limits no trajectory"
    planned_for(shape, memory=(24,))
    assert "the expert's context is 24320 tokens, not its model's 32768" in caplog.text


def test_the_users_sequences_and_tokens_stay_and_are_reckoned_with(shape):
    planned = planned_for(shape, expert={"max_num_seqs": 1024, "max_num_batched_tokens": 16_384})["expert"]
    assert (planned["max_num_seqs"], planned["max_num_batched_tokens"]) == (1024, 16_384)
    assert planned["kv_cache_memory_bytes"] < planned_for(shape)["expert"]["kv_cache_memory_bytes"] - GIB
    assert planned_for(shape, expert={"max_num_seqs": 10_000})["expert"]["max_num_batched_tokens"] == 10_000


@pytest.mark.parametrize(
    ("expert", "amateur", "slots"),
    [
        ({"data_parallel_size": 3, "device_ids": [0, 1, 2]}, {"device_ids": [3]}, 768),
        ({"data_parallel_size": 3, "device_ids": [0, 1, 2]}, {"device_ids": [3], "max_num_seqs": 300}, 300),
        ({"data_parallel_size": 2}, {"data_parallel_size": 2, "device_ids": [2, 3]}, 256),
        ({"max_num_seqs": 640}, {}, 640),
        ({"max_num_seqs": 4000}, {"device_ids": [1]}, 1024),
        ({"max_num_seqs": 8}, {}, 256),
    ],
)
def test_the_amateur_is_never_the_narrow_place_of_an_expert_that_runs_more(shape, expert, amateur, slots):
    """Clients and jobs give a pair as much as its smaller engine takes."""
    planned = planned_for(shape, memory=(80,) * 4, expert=expert, amateur=amateur)
    assert planned["amateur"]["max_num_seqs"] == slots
    assert planned["expert"]["max_num_seqs"] == expert.get("max_num_seqs", 256)


def test_a_cache_is_no_larger_than_all_sequences_can_use(shape):
    """vLLM makes an object of every block: a tiny model's would be millions."""
    small = {"max_model_len": 256, "device_ids": [0]}
    planned = planned_for(shape, ("0.5B", "0.5B"), (80, 80), expert=small, amateur={"device_ids": [1]})["expert"]
    used = SLOTS * 256 * shape("0.5B").token_bytes
    assert used < planned["kv_cache_memory_bytes"] < 2 * used
    assert planned["gpu_memory_utilization"] == pytest.approx(GPU_MEMORY_SHARE, abs=2e-4)


def test_weights_count_as_they_are_loaded(shape):
    """A model that is saved in bfloat16 takes twice as much in float32, a cache in 8 bits half."""
    assert shape("7B", dtype="float32").weights == 2 * shape("7B").weights
    assert shape("7B", kv_cache_dtype="fp8").token_bytes == shape("7B").token_bytes // 2
    assert shape("7B", cpu_offload_gb=4).weights == shape("7B").weights - 4 * GIB


@pytest.mark.parametrize("size", ["2", 0, True, None])
def test_a_number_of_parts_that_is_none_is_named(shape, size):
    with pytest.raises(SettingsError, match=r"expert\.tensor_parallel_size must be a whole number of at least 1"):
        shape("0.5B", tensor_parallel_size=size)


def test_an_encoder_decoder_that_its_file_does_not_call_one_is_refused(tmp_path):
    from server.engines.engine import EngineStartError
    from server.engines.start import engine_shape

    (tmp_path / "config.json").write_text('{"model_type": "bart", "architectures": ["BartForCausalLM"]}')
    with pytest.raises(EngineStartError, match="it is an encoder-decoder; the service needs a causal language model"):
        engine_shape("expert", {"model": str(tmp_path)}, 1)


@pytest.mark.parametrize(
    ("role", "model_context", "cache", "context"),
    [
        ("expert", 256, GIB // 4, None),
        ("expert", 32_768, 4 * GIB, None),
        ("expert", 131_072, 4 * GIB, 32_768),  # a step has room for the whole context: prompts are not cut
        ("amateur", 131_072, 4 * GIB, None),
        ("amateur", 131_072, GIB, 65_408),  # what the cache holds
        ("expert", 131_072, GIB // 4, 16_256),
    ],
)
def test_on_a_cpu_a_context_is_bounded_by_cache_and_step(role, model_context, cache, context):
    shapes = dict.fromkeys(PAIR, EngineShape((), GIB, 16, 20_000, 128_256, 4, 16_384, model_context))
    given = {"kv_cache_memory_bytes": cache}
    found = cpu_arguments(shapes, dict.fromkeys(PAIR, given))[role]
    assert found == given | ({"max_model_len": context} if context else {})
    assert cpu_arguments(shapes, dict.fromkeys(PAIR, given | {"max_model_len": 100_000}))[role] == given


def test_on_a_cpu_engines_are_given_what_they_always_were():
    from server.engines.preflight import inspect_pair
    from server.engines.start import sized_arguments
    from server.settings import ServerSettings

    settings = ServerSettings(expert={"model": "a", "kv_cache_memory_bytes": GIB}, amateur={"model": "b"})
    facts = inspect_pair(DEMO / "expert", DEMO / "amateur")
    found = sized_arguments(settings, {"expert": facts.expert, "amateur": facts.amateur}, on_cpu=True)
    both = {
        "max_logprobs": 128, "use_tqdm_on_load": False, "enforce_eager": True, "logprobs_mode": "raw_logprobs",
        "generation_config": "vllm", "scheduling_policy": "priority", "disable_log_stats": False,
    }  # fmt: skip
    own = {"model": str(DEMO / "expert"), "kv_cache_memory_bytes": GIB}
    assert found["expert"] == both | own
    cache = found["amateur"].pop("kv_cache_memory_bytes")
    assert GIB // 2 <= cache <= 4 * GIB
    assert found["amateur"] == both | {"model": str(DEMO / "amateur"), "enable_prefix_caching": False}
