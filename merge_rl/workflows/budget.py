"""How a budget of generated images is divided: start, rounds, final choice."""

from __future__ import annotations

from dataclasses import dataclass

from merge_rl import registry
from merge_rl.config import OptimizeConfig
from merge_rl.core.tournament import Rung, cost, halving_plan
from merge_rl.errors import BudgetError

LEAST = 100  # images that an entry is scored on: fewer say too little
FINALISTS = 3  # beside the incumbents: start, policy mean, running average


@dataclass(frozen=True, kw_only=True)
class BudgetPlan:
    """What a search may spend where; all in images."""

    start: tuple[Rung, ...]  # to find where it begins
    pool: int  # 0 where the reward needs none
    candidates: int  # P of a round
    round: int  # candidates and refresh of the first round
    limit: int  # images after which no round begins that would exceed it
    final: int  # kept for the choice among the finalists

    @property
    def rounds(self) -> int:
        """About how many rounds there will be; at least one."""
        return max(1, (self.limit - cost(self.start) - self.pool) // self.round)


def plan_budget(config: OptimizeConfig, starts: int = 1) -> BudgetPlan:
    """Divide the budget of a config whose search may begin at so many places.

    Start and final choice get their shares where these pay for `LEAST` images an entry, else
    nothing. Raises BudgetError unless the rest pays for the pool and one round.
    """
    reward, search = config.reward, config.search
    entries = FINALISTS + search.incumbents
    shared = not registry.chooses_itself(search.name)
    start = halving_plan(starts, int(config.budget * search.start_share), LEAST) if shared else ()
    final = int(config.budget * search.final_share) if shared else 0
    final = final if halving_plan(entries, final, LEAST) else 0
    pool = reward.pool_size if reward.pooled else 0
    refresh = reward.refresh_images(0) if reward.pooled else 0
    candidates = registry.population_of(search)
    plan = BudgetPlan(
        start=start,
        pool=pool,
        candidates=candidates,
        round=candidates * reward.images_per_candidate + refresh,
        limit=config.budget - final,
        final=final,
    )
    needed = cost(start) + pool + plan.round
    if plan.limit < needed:
        parts = [f"{candidates} candidates of {reward.images_per_candidate} images"]
        parts += [f"the pool of {pool}"] * bool(pool) + [f"a refresh of {refresh}"] * bool(refresh)
        kept = cost(start) + final
        parts += [f"{kept} to choose start and result"] * bool(kept)
        raise BudgetError(
            f"a budget of {config.budget} images does not pay for one round: "
            f"{', '.join(parts)}: expected at least {needed + final}"
        )
    return plan
