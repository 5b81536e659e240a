"""Use cases: from settings to results, one package a task."""
