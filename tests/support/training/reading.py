"""Reads a RUN as a training set in one call."""

from client.runs.run import Run
from trainer.adapters.model_folder import ModelFolder
from trainer.data.dataset import Limits, TrainingSet, check_expert


def read_training_set(run: Run, model: ModelFolder, limits: Limits) -> TrainingSet:
    """Read all examples of a RUN, to train `model`.

    Raises RunError if the RUN is missing, empty, of another expert, or has ids that the model does not have.
    """
    check_expert(run, model)
    training_set = TrainingSet(run, limits)
    training_set.read()
    return training_set
