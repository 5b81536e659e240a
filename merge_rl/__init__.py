"""Find the best way to merge the checkpoints of a diffusion training run."""
