"""The adapter's model card: README.md, with the metadata that the Hugging Face Hub reads.

In: the content of lightreasoner.json. Out: text. It says only what was recorded.
"""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any

UNITS = {"trajectory": "trajectories", "step": "kept steps"}

MADE = {
    "contrast": "A LoRA adapter trained by [LightReasoner](https://arxiv.org/abs/2510.07962): the model learns from "
    "the contrast of its own\npredictions with a weaker model's, at the steps where the two disagree; no labels.",
    "sft": "A LoRA adapter trained on the model's own right solutions, as the baseline that "
    "[LightReasoner](https://arxiv.org/abs/2510.07962)\nis compared with.",
}


def card(provenance: dict[str, Any], base: str) -> str:
    """README.md of an adapter for `base`."""
    recipe, run = provenance["recipe"], provenance["run_identity"]
    lora = recipe["lora"]
    public = _on_the_hub(base)
    name = base if public else PurePath(base).name
    metadata = {
        **({"base_model": base} if public else {}),  # a path of this machine means nothing to others
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "unknown",
        "tags": [
            "lora",
            "transformers",
            "lightreasoner",
            *([f"base_model:adapter:{base}"] if public else []),
        ],
    }
    header = "\n".join(
        f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in metadata.items()
    )  # JSON is YAML
    rows = {
        "RUN": provenance["run"],
        "expert, weights": run["expert.model_fingerprint"],
        "amateur, weights": run["amateur.model_fingerprint"],
        "α, β, first step": f"{run['alpha']:g}, {run['beta']:g} nats, {run['first_step']}",
        "trained on": f"{provenance['trajectories']:,} trajectories with {provenance['kept_steps']:,} kept steps",
        "optimizer steps": f"{provenance['optimizer_steps']:,} of {recipe['batch_size']} {UNITS[recipe['unit']]}"
        + ("" if recipe["max_steps"] else f", {recipe['epochs']:g} epochs"),
        "learning rate": f"{recipe['learning_rate']:g}, AdamW",
        "LoRA": f"rank {lora['rank']}, alpha {lora['alpha']}, dropout {lora['dropout']:g}, "
        f"on {', '.join(lora['targets'])}",
        "loss of a step alone": f"{provenance['first_loss']:.4f} nats at the first, {provenance['last_loss']:.4f} at "
        "the last",
        "versions": ", ".join(f"{name} {version}" for name, version in provenance["versions"].items()),
    }
    if held_out := provenance.get("held_out"):
        step, last = provenance["adapter_step"], provenance["optimizer_steps"]
        rows["adapter"] = f"of step {step}" + (f", the best of {last} by the held-out trajectories" * (step != last))
        best = held_out["best"]["step"]
        rows["held out"] = (
            f"{provenance['held_out_trajectories']} trajectories; score, the lower the better: "
            f"{held_out['best']['score']:.4f} at step {best}"
            + f", {held_out['last']['score']:.4f} at step {last}"
            * (best != last)
        )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    overridden = "".join(f"\n- {difference}" for difference in provenance["mismatches"])
    warning = f"\n**Trained although the model is not the RUN's expert:**{overridden}\n" if overridden else ""
    if held_out and held_out["past_the_best"] and step == last:
        warning += _past_the_best(held_out["best"]["step"], held_out["measured_every"])
    if held_out and held_out.get("moved_little"):
        warning += _moved_little(held_out["first"], held_out["last"], recipe)
    return (
        f"---\n{header}\n---\n\n"
        f"# LightReasoner adapter for {name}\n\n"
        f"{MADE[recipe['objective']]}\n{warning}\n| | |\n| --- | --- |\n{table}\n\n"
        "`lightreasoner.json` beside this file has every setting. The licence of the base model applies to its "
        "weights.\n"
    )


def _past_the_best(best: int, every: int) -> str:
    """The warning that the training went past its best, and what to do. `best`: its best step; 0: before training."""
    there = f"If `checkpoints/checkpoint-{best}` is here, use that one.\nIf not, train" if best else "Train"
    remedy = f"`--max-steps {best}`, or with\n`--keep best` and as many steps" if best else "a lower `--learning-rate`"
    return (
        f"\n**Training went past its best, step {best}:** since then the model unlearns what it could do,\nby the "
        f"trajectories that were held out and measured every {every} steps (`loss.png`, `held_out.jsonl`).\n"
        "They are few, and they do not measure accuracy: check with `evaluate` first whether accuracy fell.\n"
        f"{there} again, into another folder, with {remedy}.\n"
    )


def _moved_little(first: dict[str, Any], last: dict[str, Any], recipe: dict[str, Any]) -> str:
    """The warning that the training hardly moved the model, and what to do. `first`: the figures before training."""
    longer = "--max-steps" if recipe["max_steps"] else "--epochs"
    return (
        f"\n**The model has hardly moved in {last['step']} optimizer steps:** the distance from the labels of the\n"
        f"trajectories that were held out was {first['distance']:.4f} before training and is {last['distance']:.4f} now"
        " (`held_out.jsonl`).\n"
        f"Continue with `--resume` and more `{longer}`, or train again, into another folder, with a higher "
        "`--learning-rate`.\n"
    )


def _on_the_hub(base: str) -> bool:
    return base.count("/") == 1 and not base.startswith((".", "~", "/"))
