"""The trainer's commands: they check options, call the other folders of the trainer, and print results."""
