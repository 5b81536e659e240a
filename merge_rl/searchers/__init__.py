"""Searchers: ask for candidates, tell rewards; state that resumes to the bit."""

from merge_rl.searchers.base import SearchSpace

__all__ = ["SearchSpace"]
