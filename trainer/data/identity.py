"""The identity of a training. A training is resumed only with the same recipe, RUN and model.

In: recipe, RUN, model. Out: the identity as a plain value, for lightreasoner.json and checkpoints; how two of them
differ.
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
    """The identity of a training: recipe, RUN and model, in JSON types."""
    return plain(
        {
            "recipe": asdict(with_dtype(recipe)),
            "follow": running.follow,
            "run_identity": run.manifest().identity(),
            "base_model_fingerprint": base.fingerprint,
        }
    )


def with_dtype(recipe: Recipe) -> Recipe:
    """The recipe with the type of the frozen weights filled in."""
    return replace(recipe, dtype=recipe.dtype or default_precision())


def differences(made: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """The settings in which two trainings differ, a line each. Ignores their length (epochs, max_steps)."""
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
    """The recipe with each setting of LoRA under a name of its own."""
    return {**recipe, **{f"lora.{name}": value for name, value in recipe["lora"].items()}, "lora": None}


def plain(value: Any) -> Any:
    """A value after a round trip through JSON, as it is read from a file."""
    return json.loads(json.dumps(value))
