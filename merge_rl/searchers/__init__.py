"""Searchers: ask for candidates, tell rewards; state that resumes to the bit."""

from merge_rl.searchers.base import SearchSpace
from merge_rl.searchers.own import OwnSearcher, Searcher
from merge_rl.searchers.pathwise import Pathwise

__all__ = ["OwnSearcher", "Pathwise", "SearchSpace", "Searcher"]
