"""Trains one optimizer step with the real trainer, and writes the gradient before clipping to a file.

It runs in the test's process or in a rank. B is randomised: while B is 0, as at the start, A gets no gradient.
`main` reads RUN MODEL OUT GRADIENTS.safetensors [OPTION=VALUE …] from the arguments: options of
`Recipe`, `Lora` and `Running`.
"""

import json
import sys
from dataclasses import fields, replace

import torch
from rich.console import Console
from safetensors.torch import save_file

import trainer.training.train
from support.models.tiny_pair import randomised
from trainer.adapters.model_folder import ModelFolder
from trainer.settings import Lora, Recipe, Running
from trainer.training.loop import ContrastTrainer


def one_step(run, model, out, gradients, **options):
    def of(kind):
        return {field.name: options[field.name] for field in fields(kind) if field.name in options}

    with_lora = trainer.training.train.with_lora
    recipe = replace(Recipe(max_steps=1), **of(Recipe), lora=Lora(dropout=0.0, **of(Lora)))

    def keep(self, model):
        if self.is_world_process_zero():
            named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            save_file({name: p.grad.clone() for name, p in named.items()}, gradients)
        return torch.zeros(())

    trainer.training.train.with_lora = lambda *words: randomised(with_lora(*words))
    clip, ContrastTrainer._clip_grad_norm = ContrastTrainer._clip_grad_norm, keep
    try:
        base, running = ModelFolder.find(str(model)), Running(**of(Running))
        return trainer.training.train.train(str(run), base, str(out), recipe, running, Console())
    finally:
        trainer.training.train.with_lora, ContrastTrainer._clip_grad_norm = with_lora, clip


def main():
    torch.set_num_threads(1)
    one_step(*sys.argv[1:5], **{name: json.loads(value) for name, value in (o.split("=") for o in sys.argv[5:])})
