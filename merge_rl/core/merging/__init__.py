"""Weighted sums of checkpoints, and the maps from theta to their coefficients."""
