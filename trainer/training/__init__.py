"""Fine-tuning: the loss, LoRA, the loop, checkpoints and what a training leaves behind."""
