"""Training: the loop, the trainer, fine-tuning, checkpoints, profiles."""
