"""Fine-tunes the expert on its contrast samples by LoRA: one forward a trajectory, many in one sequence.

In: a RUN, the model that sampled it, a recipe. Out: a folder or bucket prefix with the adapter in PEFT format, where it
came from (lightreasoner.json, README.md) and how it went (metrics.jsonl, loss.png), which the RUN gets too. The base
model's files are never touched. Started by torchrun or accelerate, each process is a rank of one training.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from rich.console import Console
from transformers import TrainingArguments

from client.bucket import BucketError
from client.errors import ModelError
from client.fingerprints import model_fingerprint, model_folder
from client.run import Run
from trainer.adapter import PROVENANCE, versions
from trainer.base import config_of, load, weights_dtype
from trainer.card import card
from trainer.checkpoints import KEPT, Output, state_of
from trainer.dataset import Limits, TrainingSet, check_expert, mismatches, read_training_set
from trainer.follow import Arrivals, WriterStalled
from trainer.journal import CURVE, METRICS, Journal, draw_curve
from trainer.loop import ContrastTrainer
from trainer.lora import with_lora
from trainer.preflight import check_packing
from trainer.settings import TOKEN_BUDGET, Recipe, Running, Unit
from trainer.steps import Steps


@dataclass(frozen=True)
class TrainReport:
    """What was done."""

    optimizer_steps: int
    trajectories: int
    without_kept_steps: int
    kept_steps: int
    first_loss: float
    last_loss: float
    seconds: float
    already_done: bool = False  # by a training before; the others are its figures, and seconds are 0


def train(
    run_url: str, model: str, output: str, recipe: Recipe, running: Running, console: Console
) -> TrainReport | None:
    """Train an adapter for `model` on the RUN and write it to `output`; None on ranks other than the first.

    Raises RunError where the RUN cannot teach this model, ModelError where `model` or `output` will not do.
    """
    began = time.monotonic()
    if running.follow and recipe.unit == Unit.STEP:
        raise ModelError("--follow takes trajectories as they come; --preset paper draws from the whole RUN: give one")
    run, base = Run(run_url), model_folder(model)
    args = arguments(recipe, running)
    leads = args.process_index == 0
    console.quiet = not leads
    if not running.allow_mismatch:
        check_expert(run, base)
    training_set = None
    if not running.resume and not running.follow:
        training_set = read(run, base, running)  # before anything is written
    out, checkpoint, done = prepare(output, run, recipe, running.resume, leads)
    if done:
        return report_of(done, 0.0, already_done=True)
    args.output_dir = str(out.checkpoints)
    if training_set is None:
        parts = state_of(checkpoint)["parts"] if checkpoint else ([] if running.follow else None)
        training_set = read(run, base, running, parts)
    if not running.follow:
        announce(run, training_set, console)
    name = str(base.absolute()) if base == Path(model) else model
    transformers.set_seed(recipe.seed)
    adapted = with_lora(load(base, weights_dtype(recipe.dtype, base), running.attention), name, recipe.lora)
    transformers.set_seed(recipe.seed + args.process_index)  # ranks drop out different things
    budget = running.token_budget or TOKEN_BUDGET[args.device.type]
    steps = Steps(training_set, recipe, budget, args.process_index, args.world_size)
    units = None
    if running.follow:
        steps.source = Arrivals(training_set, running.follow_timeout, from_the_first_rank, leads, console)
        manifest = run.manifest()
        units = manifest.problems.count * manifest.decoding.n  # at most
    args.max_steps = steps.total(units)
    journal = Journal(out.folder / METRICS, console)
    state = {"recipe": asdict(recipe), "run": str(run), "run_identity": run.manifest().identity()}
    trainer = ContrastTrainer(
        model=adapted,
        args=args,
        steps=steps,
        seal=lambda number: out.seal(number, {**state, "parts": training_set.parts}),
        callbacks=[journal] if leads else [],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    check_packing(adapted, name)
    if checkpoint:
        steps.first = int(checkpoint.name.rpartition("-")[2])
        console.print(f"resuming after step {steps.first}")
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except WriterStalled:
        if trainer.state.global_step > steps.first:
            trainer.save_now()
        raise
    finally:
        if leads:
            journal.close()
    training_set.check_not_empty()
    save_adapter(trainer, out.folder)
    if not leads:
        return None
    provenance = {
        **state,
        "base_model_fingerprint": model_fingerprint(base),
        "mismatches": mismatches(run, base) if running.allow_mismatch else [],
        "running": asdict(running),
        "ranks": args.world_size,
        "versions": versions(),
        "optimizer_steps": trainer.state.global_step,
        "trajectories": len(training_set.examples),
        "without_kept_steps": training_set.without_kept_steps,
        "kept_steps": training_set.kept_steps,
        "first_loss": journal.losses[0],
        "last_loss": journal.losses[-1],
    }
    finish(out, run, provenance, name, journal, console)
    return report_of(provenance, time.monotonic() - began)


def read(run: Run, base: Path, running: Running, parts: list[str] | None = None) -> TrainingSet:
    """What is to be trained on: all that the RUN holds, or `parts`."""
    config = config_of(base).get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    limits = Limits(config.vocab_size, context, running.token_budget)
    if parts is None:
        return read_training_set(run, base, limits, allow_mismatch=True)  # it was asked before
    training_set = TrainingSet(run, limits)
    training_set.sealed = run.completion() is not None
    for part in parts:
        training_set.add(part)
    return training_set


def prepare(
    output: str, run: Run, recipe: Recipe, resume: bool, leads: bool
) -> tuple[Output, Path | None, dict[str, Any] | None]:
    """OUT, the checkpoint to go on from, and the state of a training that is already done; agreed by all ranks.

    Raises ModelError where OUT is taken, or was made by another recipe or from another RUN.
    """
    out, checkpoint, done = None, None, None
    if leads:
        out = Output(output)
        if not resume:
            out.claim()
        else:
            done = out.finished()
            checkpoint = out.newest()
            made = done or (state_of(checkpoint) if checkpoint else None)
            if made:
                check_same(out, made, run, recipe)
            if done and done["recipe"] != plain(asdict(recipe)):
                done = None  # longer than it was
    found = (str(out.folder) if out else None, str(checkpoint) if checkpoint else None, done)
    folder, newest, done = from_the_first_rank(found)
    if out is None:
        out = Output(output, Path(folder))
    return out, Path(newest) if newest else None, done


def check_same(out: Output, made: dict[str, Any], run: Run, recipe: Recipe) -> None:
    """Raises ModelError naming every setting in which a training that is to go on differs; its length may."""
    mine, theirs = plain(asdict(recipe)), made["recipe"]
    pairs = {name: (theirs.get(name), mine[name]) for name in mine if name not in ("epochs", "max_steps")}
    identity = plain(run.manifest().identity())
    pairs |= {f"RUN, {name}": (made["run_identity"].get(name), identity[name]) for name in identity}
    if different := [f"{name}: {was!r} against {now!r}" for name, (was, now) in pairs.items() if was != now]:
        listed = "\n  ".join(different)
        raise ModelError(f"{out} was trained with other settings; use the same or name a new folder:\n  {listed}")


def plain(value: Any) -> Any:
    """A value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def from_the_first_rank(value: Any) -> Any:
    """What the first rank says, told to all."""
    box = [value]
    broadcast_object_list(box)
    return box[0]


def arguments(recipe: Recipe, running: Running) -> TrainingArguments:
    """transformers' settings for a recipe; where to write and how long are told later."""
    on_gpu = torch.cuda.is_available()
    try:
        args = TrainingArguments(
            output_dir="unused",
            max_steps=1,
            learning_rate=recipe.learning_rate,
            seed=recipe.seed,
            gradient_checkpointing=running.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_cpu=not on_gpu,
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            ignore_data_skip=True,  # the steps are told where to begin
            label_names=["label_ids"],
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=running.save_steps,
            save_total_limit=KEPT,
            report_to=list(running.report_to) or "none",
            disable_tqdm=True,
        )
    except ImportError as error:
        raise ModelError(f"{error}") from error
    args._n_gpu = min(args.n_gpu, 1)  # DataParallel would cut the packed sequence
    return args


def save_adapter(trainer: ContrastTrainer, folder: Path) -> None:
    """The adapter in PEFT format; where its weights are sharded, every rank brings its own."""
    sharded = trainer.is_fsdp_enabled
    weights = trainer.accelerator.get_state_dict(trainer.model) if sharded else None
    if trainer.is_world_process_zero():
        adapted: PeftModel = trainer.accelerator.unwrap_model(trainer.model)
        adapted.save_pretrained(str(folder), save_embedding_layers=False, state_dict=weights)


def finish(out: Output, run: Run, provenance: dict[str, Any], base: str, journal: Journal, console: Console) -> None:
    """Write what goes beside the weights, and put metrics and picture into the RUN, where its report finds them."""
    draw_curve(journal.losses, out.folder / CURVE)
    (out.folder / "README.md").write_text(card(provenance, base))
    (out.folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
    for name in (METRICS, CURVE):
        try:
            run.bucket.put(f"training/{name}", (out.folder / name).read_bytes())
        except BucketError as error:
            console.print(f"warning: the RUN gets no {name}: {error}", style="yellow", soft_wrap=True)
    out.publish()


def report_of(provenance: dict[str, Any], seconds: float, already_done: bool = False) -> TrainReport:
    names = "optimizer_steps", "trajectories", "without_kept_steps", "kept_steps", "first_loss", "last_loss"
    figures = {name: provenance[name] for name in names}
    return TrainReport(**figures, seconds=seconds, already_done=already_done)


def announce(run: Run, training_set: TrainingSet, console: Console) -> None:
    """Say what is about to be trained on, and what is odd about it."""
    if not training_set.sealed:
        console.print(f"warning: {run} is not sealed; training on what it holds now", style="yellow", soft_wrap=True)
    left_out = training_set.without_kept_steps
    console.print(
        f"{len(training_set.examples)} trajectories with {training_set.kept_steps} kept steps"
        + (f"; {left_out} without any are left out" if left_out else ""),
        soft_wrap=True,
    )
