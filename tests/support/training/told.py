"""Runs `lightreasoner-trainer` so that the second rank sends itself SIGTERM in its third optimizer step."""

import os
import signal

from trainer.__main__ import main as trainer_main
from trainer.training.loop import ContrastTrainer


def main():
    step = ContrastTrainer.training_step

    def told(self, *words):
        if os.environ["RANK"] == "1" and self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *words)

    ContrastTrainer.training_step = told
    trainer_main()
