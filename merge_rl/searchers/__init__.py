"""Searchers: ask for candidates, tell rewards; state that resumes to the bit."""

from merge_rl.searchers.base import SearchSpace
from merge_rl.searchers.natural_gradient import SMALL_DIM, scaled_to
from merge_rl.searchers.own import OwnSearcher, Searcher
from merge_rl.searchers.pathwise import Pathwise, Slope

__all__ = ["SMALL_DIM", "OwnSearcher", "Pathwise", "SearchSpace", "Searcher", "Slope", "scaled_to"]
