"""Extractors: uint8 images to the features in which distances are measured."""

__all__: list[str] = []
