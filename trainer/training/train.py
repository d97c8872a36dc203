"""Fine-tunes the expert on its contrast samples with LoRA: one forward pass per trajectory, several in one sequence.

In: a RUN, the model that sampled it, a recipe. Out: a folder or bucket prefix with the adapter in PEFT format, its
origin (lightreasoner.json, README.md), and its metrics (metrics.jsonl, loss.png), which also go to the RUN. The
model's files are never changed. With torchrun or accelerate, each process is a rank of one training.
"""

from __future__ import annotations

import json
import signal
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from rich.console import Console
from safetensors import SafetensorError
from transformers import TrainingArguments

from client.errors import ModelError, RunError
from client.runs.run import Run
from trainer.adapters.adapter import PROVENANCE, package_versions
from trainer.adapters.matching import idle_layers
from trainer.adapters.model_folder import ModelFolder, load
from trainer.data.dataset import NOT_COMPLETE, Limits, TrainingSet, check_expert, mismatches
from trainer.data.example import Example
from trainer.data.follow import Arrivals, WaitEnded, WriterStalled
from trainer.data.identity import differences, identity_of, with_dtype
from trainer.data.packing import Layout
from trainer.data.steps import Steps
from trainer.interruption import GO_ON, Interrupted, Interruption
from trainer.settings import TOKEN_BUDGET, Keep, Objective, Recipe, Running, check_together
from trainer.training.checkpoints import Output, number_of, state_of, write_whole
from trainer.training.held_out import HELD_OUT, HeldOutWatch, measured_every, tell_of, tell_unmeasured
from trainer.training.loop import ContrastTrainer, arguments
from trainer.training.lora import own_dropout, switch_off, with_lora
from trainer.training.model_card import card
from trainer.training.packing_check import choose, lengths_to_come
from trainer.training.progress import CURVE, METRICS, Journal, TrainingError, draw_curve, memory_named, show_in_run


@dataclass(frozen=True)
class TrainReport:
    """The figures of a training."""

    optimizer_steps: int
    trajectories: int
    without_kept_steps: int
    kept_steps: int
    first_loss: float
    last_loss: float
    adapter_step: int  # the step whose adapter was kept
    seconds: float
    already_done: bool = False  # OUT already held the adapter: the figures are of its training, seconds are 0


def train(
    run_url: str, base: ModelFolder, output: str, recipe: Recipe, running: Running, console: Console
) -> TrainReport | None:
    """Train an adapter for the model in `base` on the RUN, and write it to `output`. None on all ranks but the first.

    Raises RunError if the RUN cannot train this model, ModelError if the model or `output` cannot be used,
    TrainingError if the training fails, Interrupted if a signal stops it.
    """
    check_together(recipe, running)
    run = Run(run_url)
    recipe = with_dtype(recipe)
    args = arguments(recipe, running)
    console.quiet = args.process_index != 0
    if not running.allow_mismatch:
        check_expert(run, base)
    base.check_trainable()
    base.check_whole()
    # Errors of the RUN are found before anything is written.
    training_set = None if running.resume or running.follow else read(run, base, recipe, running)
    identity = identity_of(run, base, recipe, running)
    out, checkpoint, done = prepare(output, identity, running.resume, args)
    with out:
        if done:
            return report_of(done, 0.0, already_done=True)
        state = state_of(checkpoint) if checkpoint else {}
        training_id = from_the_first_rank(state.get("training_id") or uuid.uuid4().hex)
        if training_set is None:
            parts = state.get("parts", [] if running.follow else None)
            training_set = read(run, base, recipe, running, parts, sort=state.get("sorted", not state))
        held_out = training_set.hold_out(recipe.held_out)
        if recipe.keep == Keep.BEST and not held_out:
            raise RunError(
                f"{run} has too few trajectories to hold out {recipe.held_out:g} of them: increase --held-out"
            )
        if recipe.held_out and training_set.examples and not held_out:
            console.print(training_set.held_out_none(recipe.held_out), soft_wrap=True)
        rounded, padding = (state.get(name, not state) for name in ("rounded", "padding"))
        training = Training(
            run, base, recipe, running, args, training_set, held_out, out, checkpoint, identity, training_id, rounded,
            padding,
        )  # fmt: skip
        try:
            report = carry_out(training, console)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"{out} cannot be written ({error}); make room there, and continue with --resume"
            ) from error
        ranks = PartialState()  # ranks end together: if one ends early, the others can fail
        ranks.wait_for_everyone()
        ranks.destroy_process_group()
        return report


@dataclass(frozen=True)
class Training:
    """Everything that a training needs, after all checks."""

    run: Run
    base: ModelFolder
    recipe: Recipe
    running: Running
    args: TrainingArguments
    training_set: TrainingSet
    held_out: list[Example]
    out: Output
    checkpoint: Path | None
    identity: dict[str, Any]
    training_id: str  # stays when it resumes
    rounded: bool  # whether the adapter's update is computed in the model's type; False if an early version began
    padding: bool  # whether trajectories that cannot be packed may share a pass; False if an early version began

    @property
    def leads(self) -> bool:
        return self.args.process_index == 0

    def state(self) -> dict[str, Any]:
        """The content of a checkpoint's state: settings that a resumed training must share, or takes from there."""
        ranks = self.args.world_size
        parts, in_order = self.training_set.parts, self.training_set.sorted
        mine = {"run": str(self.run), "ranks": ranks, "parts": parts, "sorted": in_order}
        how = {"rounded": self.rounded, "padding": self.padding, "training_id": self.training_id}
        return {**self.identity, **mine, **how}


def carry_out(training: Training, console: Console) -> TrainReport | None:
    """Load the model, add the adapter, train it, and write it."""
    began, recipe, running, args = time.monotonic(), training.recipe, training.running, training.args
    if not running.follow:
        announce(training.run, training.training_set, console)
    transformers.set_seed(recipe.seed)
    loaded = load(training.base, training.base.dtype_for(recipe.dtype), running.attention)
    if own := own_dropout(loaded):
        if not recipe.lora.dropout:
            switch_off(own)
        else:
            rates = ", ".join(sorted({f"{getattr(module, name):g}" for module, name in own}))
            console.print(f"the model has dropout of its own ({rates}), which is on; --dropout 0 switches it off")
    adapted = with_lora(loaded, training.base.name, recipe.lora, training.rounded)
    transformers.set_seed(recipe.seed + args.process_index)  # dropout differs between ranks
    interruption = Interruption()
    steps, most = steps_of(training, interruption, console)
    args.output_dir, args.max_steps = str(training.out.checkpoints), most
    journal = Journal(training.out.folder / METRICS, console)
    watch: HeldOutWatch | None = None

    def seal(number: int) -> None:
        if watch:
            watch.write_best(training.out.checkpoints / f"checkpoint-{number}")
        training.out.seal(number, training.state(), running.keep_checkpoints)

    trainer = ContrastTrainer(
        model=adapted,
        args=args,
        steps=steps,
        share=lambda number: training.out.share(number, args.process_index),
        seal=seal,
        interruption=interruption,
        callbacks=[journal] if training.leads else [],
    )
    with memory_named(lambda: "before the first step", steps.token_budget):
        steps.layout = layout_of(training, adapted, steps, console)
    if training.held_out and trainer.is_fsdp_enabled:
        tell_unmeasured(recipe.keep, console)
    elif training.held_out and training.leads:
        trainer.add_callback(watch := watch_of(training, adapted, steps, most, console))
    trainer.remove_callback(transformers.PrinterCallback)
    if training.checkpoint:
        say_where(training, steps.first, most, console)
    if training.leads:
        training.out.withdraw()
    try:
        fit(trainer, steps, most, training.checkpoint, interruption)
    finally:
        if training.leads:
            journal.close()
    training.training_set.check_not_empty()
    if watch:
        tell_of(watch, recipe, console)
    if watch and recipe.keep == Keep.BEST:
        watch.restore_best()
    trainer.save_adapter(training.out.folder)
    if not training.leads:
        return None
    provenance = provenance_of(training, trainer.state.global_step, journal.losses, watch)
    finish(training, provenance, journal.losses, watch, console)
    return report_of(provenance, time.monotonic() - began)


def fit(trainer: ContrastTrainer, steps: Steps, most: int, checkpoint: Path | None, interruption: Interruption) -> None:
    """Run the optimizer steps. If a signal ends them early, writes a checkpoint and raises Interrupted."""
    try:
        with interruption, memory_named(lambda: f"in step {trainer.state.global_step + 1}", steps.token_budget):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (WriterStalled, WaitEnded) as error:
        if trainer.state.global_step > steps.first:
            trainer.save_now()
        if isinstance(error, WriterStalled):
            raise
        trainer.told_to_stop = True
    if trainer.told_to_stop and (done := trainer.state.global_step) < most:
        reached = f"after optimizer step {done} of {most}" if done else "before the first optimizer step"
        raise Interrupted(interruption.number or signal.SIGTERM, f"stopped {reached}: {GO_ON}")


def layout_of(training: Training, adapted: PeftModel, steps: Steps, console: Console) -> Layout:
    """How trajectories share passes, checked against one trajectory a pass. Prints what the user should know."""
    budget, running = steps.token_budget, training.running
    if running.follow:
        longest = training.run.manifest().decoding.max_tokens
        lengths = lengths_to_come(min(longest, training.base.context or longest), budget)
    else:
        lengths = [*map(int, steps.lengths()), *(len(example.input_ids) for example in training.held_out)]
    choice = choose(adapted, training.base.name, lengths, budget, running.packing, running.attention, training.padding)
    for line in choice.said(budget, lengths, training.args.device.type):
        console.print(line, soft_wrap=True)
    layout: Layout = from_the_first_rank(choice.layout)
    return layout


def watch_of(training: Training, adapted: PeftModel, steps: Steps, total: int, console: Console) -> HeldOutWatch:
    """The watch over the held-out trajectories of a training of `total` optimizer steps."""
    file, keep_best = training.out.folder / HELD_OUT, training.recipe.keep == Keep.BEST
    watch = HeldOutWatch(
        adapted, training.held_out, steps.token_budget, measured_every(total), file, keep_best, steps.layout,
        console,
    )  # fmt: skip
    if training.checkpoint:
        watch.read_best(training.checkpoint)
    return watch


def say_where(training: Training, first: int, most: int, console: Console) -> None:
    """Print the step from which the training resumes. Raises ModelError if that is after the last step."""
    if first > most:
        raise ModelError(
            f"{training.out} stands at optimizer step {first}, and {most} were asked for: "
            "give more --epochs or --max-steps, or name a new folder"
        )
    console.print(f"resuming after step {first}")
    assert training.checkpoint
    before, now = state_of(training.checkpoint)["ranks"], training.args.world_size
    if before != now:
        console.print(
            f"warning: {before} processes trained before and {now} train now, so dropout differs from that of a "
            "training without interruption",
            style="yellow",
            soft_wrap=True,
        )


def steps_of(training: Training, interruption: Interruption, console: Console) -> tuple[Steps, int]:
    """The optimizer steps of this rank, and their number; with --follow, the largest possible number."""
    args, running = training.args, training.running
    budget = running.token_budget or TOKEN_BUDGET[args.device.type]
    steps = Steps(training.training_set, training.recipe, budget, args.process_index, args.world_size)
    if training.checkpoint:
        steps.first = number_of(training.checkpoint.name)
    if not running.follow:
        return steps, steps.total()
    steps.source = Arrivals(
        training.training_set, running.follow_timeout, from_the_first_rank, training.leads, console,
        stopping=lambda: interruption.number > 0,
    )  # fmt: skip
    manifest = training.run.manifest()
    return steps, steps.total(manifest.problems.count * manifest.decoding.n)


def provenance_of(
    training: Training, optimizer_steps: int, losses: list[float], watch: HeldOutWatch | None
) -> dict[str, Any]:
    """lightreasoner.json of the adapter: what made it, and the figures of the training."""
    allowed = mismatches(training.run, training.base) if training.running.allow_mismatch else []
    best = watch.best.step if watch else None
    return {
        **training.state(),
        "mismatches": allowed,
        "running": asdict(training.running),
        "versions": package_versions(),
        "optimizer_steps": optimizer_steps,
        "trajectories": len(training.training_set.examples),
        "without_kept_steps": training.training_set.without_kept_steps,
        "kept_steps": training.training_set.kept_steps,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "held_out_trajectories": len(training.held_out),
        "held_out": watch.outcome() if watch else None,
        "best_step": best,
        "adapter_step": best if best is not None and training.recipe.keep == Keep.BEST else optimizer_steps,
    }


def read(
    run: Run, base: ModelFolder, recipe: Recipe, running: Running, parts: list[str] | None = None, sort: bool = True
) -> TrainingSet:
    """The training set: all parts of the RUN, or `parts`.

    `sort`: in the order of keys, unless it follows a RUN. A checkpoint of an early version has the order of the parts.
    """
    limits = Limits(base.vocab_size, base.context, running.token_budget)
    if recipe.objective == Objective.SFT:
        from trainer.data.solutions import SolutionSet, read_answers  # loads the grader

        assert recipe.answers is not None
        ends = run.manifest().end_token_ids or base.end_token_ids  # early versions sampled beyond the end of turn
        training_set: TrainingSet = SolutionSet(run, limits, read_answers(recipe.answers), ends)
    else:
        training_set = TrainingSet(run, limits)
    training_set.read(parts)
    if sort and not running.follow:
        training_set.sort()
    return training_set


def is_complete(run_url: str, base: ModelFolder, output: str, recipe: Recipe, running: Running) -> bool:
    """Whether `output` holds the adapter that `train` would make, so that with --resume nothing is left to do.

    Raises RunError or ModelError where `train` would.
    """
    run = Run(run_url)
    if not running.allow_mismatch:
        check_expert(run, base)
    with Output(output) as out:
        done = out.finished()
    identity = identity_of(run, base, recipe, running)
    return done is not None and done["recipe"] == identity["recipe"] and not differences(done, identity)


def prepare(
    output: str, identity: dict[str, Any], resume: bool, args: TrainingArguments
) -> tuple[Output, Path | None, dict[str, Any] | None]:
    """OUT, the checkpoint to resume from, and the state of a training that is already complete.

    All ranks get the same. Ranks on one machine share a folder, which the first of them creates. Raises ModelError if
    OUT is not empty, holds a training with another recipe, RUN or model, or if a machine does not see its checkpoint.
    """
    out, checkpoint, done = None, None, None
    if args.process_index == 0:
        out = Output(output)
        try:
            checkpoint, done = own(out, identity, resume)
        except BaseException:
            out.close()
            raise
    newest, done = from_the_first_rank((checkpoint and checkpoint.name, done))
    if out is None and args.local_process_index == 0:
        out = Output(output)
        if newest and not done:
            out.check_seen(out.fetched(number_of(newest)))
    folders = gather_object([str(out.folder) if out else None])  # by rank; the ranks of a machine are neighbours
    if out is None:
        out = Output(output, Path(next(filter(None, folders[args.process_index :: -1]))))
    out.apart = any(folders[1 : args.process_index + 1])
    return out, out.checkpoints / newest if newest else None, done


def own(out: Output, identity: dict[str, Any], resume: bool) -> tuple[Path | None, dict[str, Any] | None]:
    """Make this training the owner of OUT. Returns the checkpoint to resume from, and the state if it is complete."""
    if not resume:
        out.claim()
        return None, None
    done = out.finished()
    whole = done is not None and done["recipe"] == identity["recipe"]
    if not whole:
        out.own()
    checkpoint = out.newest()
    if made := done or (state_of(checkpoint) if checkpoint else None):
        check_same(out, made, identity)
    return checkpoint, done if whole else None


def check_same(out: Output, made: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raises ModelError, naming every difference, if a resumed training has other settings. Its length may differ."""
    if different := differences(made, identity):
        listed = "\n  ".join(different)
        raise ModelError(f"{out} was trained with other settings; use the same or name a new folder:\n  {listed}")


def from_the_first_rank(value: Any) -> Any:
    """The value of the first rank, on all ranks."""
    box = [value]
    broadcast_object_list(box)
    return box[0]


def finish(
    training: Training, provenance: dict[str, Any], losses: list[float], watch: HeldOutWatch | None, console: Console
) -> None:
    """Write the files beside the weights, and copy the metrics and the picture to the RUN for its report."""
    folder, recipe = training.out.folder, training.recipe
    draw_curve(losses, *((watch.figures, watch.best.step) if watch else ([], 0)), folder / CURVE)
    (folder / "README.md").write_text(card(provenance, training.base.name))
    write_whole(folder / PROVENANCE, json.dumps(provenance, indent=2) + "\n")
    files = {name: folder / name for name in (METRICS, CURVE)}
    kept = "training_id", "optimizer_steps", "adapter_step"
    about = {name: provenance[name] for name in kept} | {"adapter": str(training.out), "objective": recipe.objective}
    show_in_run(training.run, {**files, HELD_OUT: folder / HELD_OUT if watch else None}, about, console)
    training.out.publish()
    if idle := idle_layers(folder):
        console.print(
            f"warning: {len(idle)} adapted layers got no gradient and do nothing, such as {idle[0]}: name others with"
            " --targets",
            style="yellow",
            soft_wrap=True,
        )


def report_of(provenance: dict[str, Any], seconds: float, already_done: bool = False) -> TrainReport:
    names = "optimizer_steps", "trajectories", "without_kept_steps", "kept_steps", "first_loss", "last_loss"
    figures = {name: provenance[name] for name in names}
    figures["adapter_step"] = provenance.get("adapter_step", figures["optimizer_steps"])  # early versions kept the last
    return TrainReport(**figures, seconds=seconds, already_done=already_done)


def announce(run: Run, training_set: TrainingSet, console: Console) -> None:
    """Print what the training set holds, and warn if the RUN is not complete."""
    if not training_set.sealed:
        console.print(f"warning: {run} {NOT_COMPLETE}", style="yellow", soft_wrap=True)
    console.print(str(training_set), soft_wrap=True)
