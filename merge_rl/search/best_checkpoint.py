"""The best single checkpoint: what one would pick without merging, with the whole budget to pick.

All K checkpoints are tried, the worse half is dropped, and so on (`merge_rl.search.halving`).
"""

from __future__ import annotations

from merge_rl.config import SearchConfig
from merge_rl.core.search_space import SearchSpace
from merge_rl.search.candidates import singles
from merge_rl.search.halving import HalvingSearch


class BestCheckpoint(HalvingSearch):
    """Successive halving over the checkpoints."""

    def __init__(self, config: SearchConfig, space: SearchSpace, seed: int) -> None:
        super().__init__(config, space, seed, singles(space, config.name))
