"""What identifies a training, so that it is resumed only with the same recipe, RUN and model.

In: recipe, RUN, model. Out: a plain value that lightreasoner.json and checkpoints hold, and how two of them differ.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from client.runs.manifest import EARLY
from client.runs.run import Run
from trainer.adapters.model_folder import ModelFolder, default_precision
from trainer.settings import Keep, Recipe, Running


def identity_of(run: Run, base: ModelFolder, recipe: Recipe, running: Running) -> dict[str, Any]:
    """What identifies a training: recipe, RUN and model, as JSON returns it."""
    return plain(
        {
            "recipe": asdict(with_dtype(recipe)),
            "follow": running.follow,
            "run_identity": run.manifest().identity(),
            "base_model_fingerprint": base.fingerprint,
        }
    )


def with_dtype(recipe: Recipe) -> Recipe:
    """A recipe that says in which type the frozen weights are held."""
    return replace(recipe, dtype=recipe.dtype or default_precision())


def differences(made: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """The settings in which two trainings differ, a line each. Their length does not count."""
    mine, theirs = _with_lora_apart(identity["recipe"]), _with_lora_apart(made["recipe"])
    theirs = {"held_out": 0.0, "keep": Keep.LAST} | theirs  # early versions held nothing out
    pairs = {name: (theirs.get(name), mine[name]) for name in mine if name not in ("epochs", "max_steps")}
    of_run = identity["run_identity"]
    pairs |= {f"RUN, {name}": (made["run_identity"].get(name, EARLY.get(name)), of_run[name]) for name in of_run}
    pairs |= {"--follow": (made["follow"], identity["follow"])}
    pairs |= {"model, weights": (made["base_model_fingerprint"], identity["base_model_fingerprint"])}
    pairs["--preset, unit of a batch"] = pairs.pop("unit")
    return [f"{name}: {was!r} against {now!r}" for name, (was, now) in pairs.items() if was != now]


def _with_lora_apart(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with a name for each setting of LoRA."""
    return {**recipe, **{f"lora.{name}": value for name, value in recipe["lora"].items()}, "lora": None}


def plain(value: Any) -> Any:
    """A value as JSON returns it."""
    return json.loads(json.dumps(value))
