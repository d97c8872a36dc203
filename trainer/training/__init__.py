"""Fine-tuning: the loss, LoRA, the loop, checkpoints, and the files of a finished training."""
