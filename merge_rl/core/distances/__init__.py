"""Distances between sets of features: Frechet, kernels, neighbours, and their intervals."""
