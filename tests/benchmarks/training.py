"""Training speed, memory, and what two recipes reach: prints figures of one run.

    .venv/bin/python tests/benchmarks/training.py RUN MODEL [--paper-steps 1000] [--part 20]
    .venv/bin/python tests/benchmarks/training.py --sample PROBLEMS.jsonl RUN     (makes a RUN of 64 with SmolLM2)
    python tests/benchmarks/training.py --shape qwen2.5-1.5b|qwen2.5-7b|tiny
        [--kind mamba --targets in_proj,x_proj --tokens 40 80] [--token-budget N]

On a RUN: seconds an epoch with packed trajectories and with the published recipe (a forward pass per kept step, padded
to the longest of 8; only every PART-th batch is run, and its time multiplied), each in a process of its own for its
peak memory; then the loss on held-out trajectories against seconds and tokens, for both presets. With --shape: only the
first of these, on random weights and 1,000 random trajectories of 128 + 100 tokens with 20 kept steps each, the
published recipe on 1/50 of its batches. That mode needs torch, transformers and peft, but no files. With --kind, for a
model type that cannot be packed, as wide and deep as the shape: padded rows against one trajectory a pass, in CPU
seconds if there is no GPU. --tokens: trajectories have lengths between two numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "deploy" / "demo")]

from support.models.qwen_shapes import QWEN_SHAPES  # noqa: E402

from trainer.data.example import Example  # noqa: E402
from trainer.data.packing import Layout, Sharing, micro_batches  # noqa: E402
from trainer.settings import PRESETS, TOKEN_BUDGET, Lora, Preset, Recipe, Running  # noqa: E402
from trainer.training.lora import with_lora  # noqa: E402
from trainer.training.packing_check import choose  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PUBLISHED_BATCH = 8
BATCH = Recipe.batch_size
HELD_OUT_SHARE = 4
"""One in so many trajectories is held out."""
SHAPES = {name if name == "tiny" else f"qwen2.5-{name}": shape for name, shape in QWEN_SHAPES.items()}
SHAPE_TRAJECTORIES, PROMPT, COMPLETION, KEPT, LABEL = 1000, 128, 100, 20, 3
SHAPE_PART = 50
NAMES = {"published": "a forward per kept step", "alone": "one trajectory a pass"}
ATTENTION_KERNELS = "attention", "flash", "fmha", "flex"
"""Words in the names of kernels that compute attention."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?")
    parser.add_argument("model", nargs="?")
    parser.add_argument("--sample", metavar="PROBLEMS")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--kind")
    parser.add_argument("--tokens", type=int, nargs=2)
    parser.add_argument("--targets", default=",".join(Lora.targets))
    parser.add_argument("--token-budget", type=int, default=TOKEN_BUDGET[DEVICE])
    parser.add_argument("--attention")
    parser.add_argument("--part", type=int, default=20)
    parser.add_argument("--paper-steps", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, action="append", default=[], help="others for our recipe")
    parser.add_argument("--only", choices=[*Sharing, "published"], help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.only:
        measure_one(words)
    elif words.shape:
        speed(words, SHAPE_PART)
    elif words.sample and words.run:
        sample(words.sample, words.run)
    elif words.run and words.model:
        speed(words, words.part)
        recipes(words)
    else:
        sys.exit(__doc__)


def speed(words: argparse.Namespace, part: int) -> None:
    """Measure two ways, each in a process of its own, and print their figures."""
    found = {}
    ours, other = ("padded", "alone") if words.kind else ("packed", "published")
    for which in (ours, other):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", which, "--part", str(part)]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path.cwd())
        found[which] = json.loads(said.stdout.splitlines()[-1])
    print(f"\n{'':40}{ours:>12}{NAMES[other]:>26}")
    for name in found[ours]:
        mine, others = (
            said if isinstance(said := found[which][name], str) else f"{said:.4g}" for which in (ours, other)
        )
        print(f"{name:40}{mine:>12}{others:>26}")
    ratio = found[other]["seconds an epoch"] / found[ours]["seconds an epoch"]
    of = "" if words.kind else f" (the published recipe by 1/{part} of its batches)"
    print(f"times faster: {ratio:.2g}{of}")
    if (filled := found[ours][FILLED]) < 1:
        print(f"{BATCH} trajectories fill {filled:.0%} of a pass; a larger --batch-size would, as another recipe")
    print(flush=True)


def measure_one(words: argparse.Namespace) -> None:
    """Measure an epoch over the examples in one way. Prints its figures as JSON."""
    device = DEVICE
    if words.shape:
        model = shaped(words.shape, words.attention, words.kind).to(device)
        examples = random_examples(words.shape, words.tokens)
    else:
        model, examples = real(words).to(device), examples_of(words)
    adapted = with_lora(model, "benchmark", Lora(targets=tuple(words.targets.split(","))))
    if words.only == Sharing.PACKED:  # sets the attention that `train` would choose
        lengths = [len(example.input_ids) for example in examples]
        choose(adapted, "benchmark", lengths, words.token_budget, True, words.attention, padding=False)
    adapted.train()
    kept = sum(len(example.positions) for example in examples)
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-5, fused=True)
    loaded = memory(device)

    def epoch(limit: int | None = None) -> tuple[int, int]:
        tokens = done = 0
        published = words.only == "published"
        passes = (published_passes if published else our_passes)(adapted, examples, words)
        for count, (loss, size, steps) in enumerate(passes):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tokens, done = tokens + size, done + steps
            if limit and count + 1 == limit:
                break
        if device == "cuda":
            torch.cuda.synchronize()
        return tokens, done

    epoch(limit=2)  # kernels are chosen, memory is claimed
    clock = time.process_time if words.kind and device == "cpu" else time.perf_counter
    began = clock()
    tokens, done = epoch()
    seconds = clock() - began
    rate = matmul_rate(device, next(model.parameters()).dtype)
    body = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n and "lm_head" not in n)
    head = model.get_output_embeddings().weight.numel()
    flops = 4 * body * tokens + 6 * head * done  # forward and the gradient of activations; the head forward twice
    batch = sum(len(example.input_ids) for example in examples) * BATCH / len(examples)
    figures: dict[str, float | str] = {
        FILLED: batch / words.token_budget,
        "seconds an epoch": seconds * kept / done,
        "tokens through the model per kept step": tokens / done,
        "tokens/s": tokens / seconds,
        "peak memory, GiB": memory(device) / 2**30,
        "of which with the model loaded, GiB": loaded / 2**30,
        "matrix products measured, TFLOP/s": rate / 1e12,
        "share of that reached": flops / seconds / rate,
        "attention": model.config._attn_implementation,
    }
    if not words.kind:  # a profile of a scan, an operation a token, takes minutes
        figures["share of the time in attention"] = attention_share(lambda: epoch(limit=2), device)
    print(json.dumps(figures))


FILLED = f"{BATCH} trajectories, of the token budget"
"""The name of a figure: the share of a pass that a batch fills."""
Pass = tuple[torch.Tensor, int, int]
"""Loss, tokens through the model, kept steps."""


def our_passes(adapted: Any, examples: list[Example], words: argparse.Namespace) -> Iterator[Pass]:
    """Our passes. Yields once per batch, after which comes an optimizer step."""
    device, layout = adapted.device, Layout(Sharing(words.only))
    for begin in range(0, len(examples), BATCH):
        batch = examples[begin : begin + BATCH]
        steps = sum(len(example.positions) for example in batch)
        micro = micro_batches(batch, words.token_budget, layout=layout)[0]
        for index, packed in enumerate(micro):
            loss = adapted(**{name: tensor.to(device) for name, tensor in packed.items()}).loss / steps
            if index < len(micro) - 1:
                loss.backward()
        yield loss, sum(packed["input_ids"].numel() for packed in micro), steps


def published_passes(adapted: Any, examples: list[Example], words: argparse.Namespace) -> Iterator[Pass]:
    """A forward pass per kept step, 8 at a time, padded on the left. It computes logits at the last position only, and
    so is faster than the published code, which computes them at all positions."""
    device, part = adapted.device, words.part
    units = [example.only(index) for example in examples for index in range(len(example.positions))]
    units = [units[index] for index in np.random.default_rng(0).permutation(len(units))]
    batches = [units[begin : begin + PUBLISHED_BATCH] for begin in range(0, len(units), PUBLISHED_BATCH)]
    base = adapted.get_base_model()
    for batch in batches[::part]:
        longest = max(len(unit.input_ids) for unit in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, unit in enumerate(batch):
            ids[row, longest - len(unit.input_ids) :] = torch.from_numpy(unit.input_ids)
            mask[row, longest - len(unit.input_ids) :] = 1
        logits = (
            type(base)
            .forward(base, input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, logits_to_keep=1)
            .logits[:, -1]
        )
        labels = torch.zeros_like(logits, dtype=torch.float32)
        for row, unit in enumerate(batch):
            labels[row, torch.from_numpy(unit.label_ids).long().to(device)] = torch.from_numpy(unit.label_weights).to(
                device
            )
        log_model = logits.float().log_softmax(-1)
        yield (torch.xlogy(labels, labels) - labels * log_model).sum(-1).mean(), ids.numel(), len(batch)


def memory(device: str) -> int:
    """Peak memory so far in bytes, of the GPU or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product, the best of several."""
    size = 8192 if device == "cuda" else 1536
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(8):
        began = time.perf_counter()
        one @ other
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def attention_share(steps: Callable[[], object], device: str) -> float:
    """The share of the time of `steps` that attention kernels take, forward and backward."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        steps()
    kind = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    times = {event.key.lower(): getattr(event, kind) for event in profile.key_averages()}
    mine = sum(time for key, time in times.items() if any(word in key for word in ATTENTION_KERNELS))
    return mine / sum(times.values())


def shaped(shape: str, attention: str | None, kind: str | None) -> Any:
    """A Qwen2 with random weights, or a model of type `kind` of that width and depth; bfloat16 on a GPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    own = SHAPES[shape]
    if kind:
        own = {name: own[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    config = AutoConfig.for_model(kind or "qwen2", **own, max_position_embeddings=4096)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    options = {"attn_implementation": attention} if attention else {}
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


def random_examples(shape: str, tokens: Sequence[int] | None) -> list[Example]:
    """Random trajectories. `tokens`: their lengths lie between two numbers, and half of each is the prompt."""
    rng = np.random.default_rng(0)
    count, vocabulary = (SHAPE_TRAJECTORIES, SHAPES[shape]["vocab_size"])
    if shape == "tiny":
        count //= 10
    lengths = rng.integers(*tokens, count) if tokens else [PROMPT + COMPLETION] * count
    parts = [(length // 2, length - length // 2) if tokens else (PROMPT, COMPLETION) for length in lengths]
    return [
        Example(
            input_ids=rng.integers(0, vocabulary, prompt + completion),
            positions=prompt - 1 + np.sort(np.append(rng.choice(completion - 1, KEPT - 1, replace=False), completion)),
            label_ids=rng.integers(0, vocabulary, KEPT * LABEL),
            label_weights=np.full(KEPT * LABEL, 1 / LABEL, np.float32),
            label_offsets=np.arange(KEPT + 1) * LABEL,
        )
        for prompt, completion in parts
    ]


def real(words: argparse.Namespace) -> Any:
    from trainer.adapters.model_folder import ModelFolder, load

    return load(
        ModelFolder.find(words.model), torch.bfloat16 if torch.cuda.is_available() else torch.float32, words.attention
    )


def training_set_of(words: argparse.Namespace) -> Any:
    from support.training.reading import read_training_set

    from client.runs.run import Run
    from trainer.adapters.model_folder import ModelFolder
    from trainer.data.dataset import Limits

    base = ModelFolder.find(words.model)
    return read_training_set(Run(words.run), base, Limits(base.vocab_size))


def examples_of(words: argparse.Namespace) -> list[Example]:
    return training_set_of(words).examples


def recipes(words: argparse.Namespace) -> None:
    """Held-out loss against seconds and tokens: the published recipe, then ours until its loss is as low."""
    examples = examples_of(words)
    held_out = examples[::HELD_OUT_SHARE]
    print(f"held-out loss on {len(held_out)} trajectories; the others, {len(examples) - len(held_out)}, are trained on")
    paper = replace(PRESETS[Preset.PAPER], max_steps=words.paper_steps)
    final = course(words, "paper", paper, max(1, words.paper_steps // 10), None)
    for rate in (Recipe.learning_rate, *words.learning_rate):
        # An upper limit: in every RUN so far, twice the optimizer steps take more tokens than the published recipe.
        recipe = replace(Recipe(), learning_rate=rate, max_steps=2 * words.paper_steps)
        course(words, f"default, lr {rate:g}", recipe, max(1, words.paper_steps // 50), final)


def course(
    words: argparse.Namespace, name: str, recipe: Recipe, every: int, target: tuple[float, float, int] | None
) -> tuple[float, float, int]:
    """Train, and print held-out loss, seconds and tokens as it goes. With a target, stop when its loss is reached or
    twice its seconds are spent. Seconds count training alone."""
    from transformers import PrinterCallback, TrainerCallback

    from trainer.data.steps import Steps
    from trainer.interruption import Interruption
    from trainer.training.loop import ContrastTrainer, arguments

    training_set = training_set_of(words)
    held_out = training_set.examples[::HELD_OUT_SHARE]
    training_set.examples = [e for i, e in enumerate(training_set.examples) if i % HELD_OUT_SHARE]
    args = arguments(recipe, Running(save_steps=10**9))
    device = args.device.type
    torch.manual_seed(recipe.seed)
    adapted = with_lora(real(words), "benchmark", recipe.lora)
    reached: list[tuple[float, float, int]] = []
    spent = [0.0, 0]

    class HeldOut(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.look(0)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not logs or "loss" not in logs:
                return
            spent[0] += time.perf_counter() - self.began
            spent[1] += logs["tokens"]
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                self.look(state.global_step)
                loss, seconds, _ = reached[-1]
                if target and (loss <= target[0] or seconds > 2 * target[1]):
                    control.should_training_stop = True
            self.began = time.perf_counter()

        def look(self, step: int) -> None:
            loss = held_out_loss(adapted, held_out, device)
            reached.append((loss, spent[0], spent[1]))
            print(f"{name:22} step {step:5} {spent[0]:8.1f} s {spent[1]:9} tokens  loss {loss:.4f}", flush=True)
            self.began = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        args.output_dir, args.max_steps, args.save_strategy = folder, recipe.max_steps, "no"
        steps = Steps(training_set, recipe, TOKEN_BUDGET[device])
        trainer = ContrastTrainer(
            share=lambda number: None,
            model=adapted, args=args, steps=steps, seal=lambda _: None, callbacks=[HeldOut()],
            interruption=Interruption(),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if target:
        loss, seconds, tokens = reached[-1]
        if loss <= target[0]:
            print(f"{name}: reaches the other's {target[0]:.4f} with 1/{target[1] / seconds:.1f} of its seconds "
                  f"and 1/{target[2] / tokens:.1f} of its tokens\n")  # fmt: skip
        else:
            print(f"{name}: does not reach the other's {target[0]:.4f} in {seconds:.0f} s\n")
    return reached[-1]


def held_out_loss(adapted: Any, held_out: list[Example], device: str) -> float:
    """The mean loss over kept steps, without dropout."""
    adapted.eval()
    with torch.no_grad():
        losses = [
            adapted(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            for batch in micro_batches(held_out, TOKEN_BUDGET[device])[0]
        ]
    adapted.train()
    return float(sum(losses)) / sum(len(example.positions) for example in held_out)


def sample(problems: str, run: str) -> None:
    """Sample a RUN of 64 problems with the SmolLM2 pair, through a real server."""
    from smollm2 import make_pair
    from support.servers.real_server import running_server

    pair = make_pair(ROOT / ".cache" / "smollm2")
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(*pair, Path(folder), dtype="float32", max_model_len=1024, cache_bytes=2**31) as server,
    ):
        command = [sys.executable, "-m", "client", "sample", problems, run, "--server", server.url, "--limit", "64"]
        subprocess.run(command, check=True, cwd=ROOT)
    print(f"train on it with {pair[0]}")


if __name__ == "__main__":
    main()
