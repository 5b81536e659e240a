"""How a budget of generated images is divided: start, rounds, a tournament of finalists."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merge_rl import registry
from merge_rl.config import OptimizeConfig, without_nan
from merge_rl.core.distances.intervals import mean_interval
from merge_rl.errors import BudgetError
from merge_rl.workflows.evaluate import Request, ScoreStore

LEAST = 100  # images that an entry is scored on: fewer say too little
FRESH = 3  # sets of seeds on which result and start are looked at once more
AGAIN = 2 * FRESH + 1  # such looks, with the start on the seeds of the last round
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
    look: int = 0  # images of an entry in it at most, where what comes after it is paid for too

    @property
    def rounds(self) -> int:
        """About how many rounds there will be: at least one, of a method that has any."""
        if not self.round:
            return 0
        return max(1, (self.limit - cost(self.start) - self.pool) // self.round)


def plan_budget(config: OptimizeConfig, starts: int = 1) -> BudgetPlan:
    """Divide the budget of a config whose search may begin at so many places.

    Start and final choice get their shares where these pay for `LEAST` images an entry, else
    nothing. Raises BudgetError unless the rest pays for the pool and one round.
    """
    reward, search = config.reward, config.search
    entries = FINALISTS + search.incumbents
    shared = not registry.chooses_itself(search.name)
    own = config.search_budget
    start = tournament_rounds(starts, int(own * search.start_share), LEAST) if shared else ()
    final = int(own * search.final_share) if shared else 0
    rungs = tournament_rounds(entries, final, LEAST)
    final = final if rungs else 0
    # What was paid on top of the budget before the comparison became part of it still is.
    look = rungs[-1].images if rungs and config.evaluation.reserved else 0
    again = AGAIN * look
    candidates = registry.population_of(search)
    pool = reward.pool_size if reward.pooled and candidates else 0
    plan = BudgetPlan(
        start=start,
        pool=pool,
        candidates=candidates,
        round=config.round_images(candidates, 0),
        limit=own - final - again,
        final=final,
        look=look,
    )
    least = candidates if registry.knows_population(search) else 1
    first = config.round_images(least, 0)
    needed = cost(start) + pool + first
    if plan.limit < needed:
        parts = [f"{least} candidates of {reward.images_per_candidate} images"]
        refresh = first - least * reward.images_per_candidate
        if search.takes_gradients:
            parts, refresh = [f"{reward.images_per_subset} images with their gradient"], 0
        parts += [f"the pool of {pool} (--pool)"] * bool(pool) + [f"a refresh of {refresh}"] * bool(
            refresh
        )
        kept, reserved = cost(start) + final + again, config.evaluation.reserved
        parts += [f"{kept} to choose start and result"] * bool(kept)
        parts += [f"{reserved} for the final comparison"] * bool(reserved)
        paid = math.ceil((needed + final + again) * config.budget / own)
        raise BudgetError(
            f"a budget of {config.budget} images does not pay for one round: "
            f"{', '.join(parts)}: expected at least {paid}"
        )
    return plan


def require_paid(config: OptimizeConfig, candidates: int, needed: int, limit: int) -> None:
    """Raise BudgetError unless images are left for the pool and what a searcher asks first."""
    needed += config.reward.pooled * config.reward.pool_size
    if needed > limit:
        raise BudgetError(
            f"{limit} images for the search do not pay for one round: {config.search.name} begins "
            f"with {candidates} candidates of {config.reward.images_per_candidate} images: "
            f"expected at least {needed}"
        )


@dataclass(frozen=True)
class Winner:
    """The outcome of a tournament."""

    label: str
    score: float | None  # FID to the reference in the last rung; None if nothing was compared
    images_each: int  # of the last rung
    images: int  # of all
    rungs: Sequence[Mapping[str, float]]  # label -> FID, a rung
    second_rungs: Sequence[Mapping[str, float]] = ()  # the same by the second metric, if asked for

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with None for what could not be scored."""
        found = {
            "chosen": self.label, "score": self.score, "images_each": self.images_each,
            "images": self.images, "rungs": without_nan([dict(rung) for rung in self.rungs]),
        }  # fmt: skip
        if self.second_rungs:
            found["second_rungs"] = without_nan([dict(rung) for rung in self.second_rungs])
        return found


def run_tournament(
    name: str,
    entries: Mapping[str, Tensor],
    rungs: tuple[Rung, ...],
    store: ScoreStore,
    *,
    second: bool = False,
) -> Winner:
    """Let entries, coefficients (G, K) by label, compete for the lowest FID to the reference.

    With `second`, for the lowest mean rank in FID and the store's second metric, then the lowest
    FID. All that are left see the same seeds in a rung, and every rung has seeds of its own. An
    entry whose images are not finite drops out first; ties go to the earlier one. Without rungs,
    the first entry wins.
    """
    left, played, also = list(entries), list[Mapping[str, float]](), list[Mapping[str, float]]()
    for index, rung in enumerate(rungs):
        asked = [
            Request(f"{name}/{index}/{label}", entries[label], rung.images, (name, index), second)
            for label in left
        ]
        found = store.get_all(asked)
        scores = {label: s["reference"] for label, s in zip(left, found, strict=True)}
        played.append(scores)
        if second:
            also.append({r.key.split("/", 2)[2]: store.second(r.key) for r in asked})
        order = ranked([scores, *also[-1:]])
        left = order[: rungs[index + 1].entries if index + 1 < len(rungs) else 1]
    best = left[0]
    last = played[-1][best] if played else math.nan
    return Winner(
        label=best,
        score=without_nan(last),
        images_each=rungs[-1].images if rungs else 0,
        images=cost(rungs),
        rungs=played,
        second_rungs=also,
    )


def ranked(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    """Labels from the lowest mean rank up; ties by the first metric, NaN in it last, then as given.

    An entry's rank in a metric is how many entries are below it; NaN is below none.
    """
    first = metrics[0]

    def rank(label: str) -> int:
        values = [(metric[label], metric.values()) for metric in metrics]
        return sum(sum(other < v or math.isnan(v) for other in all_) for v, all_ in values)

    return sorted(first, key=lambda label: (math.isnan(first[label]), rank(label), first[label]))


@dataclass(frozen=True)
class Optimism:
    """How much the seeds that the result was chosen by flattered it, in FID.

    The lead over the start on those seeds, score - score of the start, minus what it is on fresh
    ones, with the same number of images: below 0 it was flattered. Both are leads over the start on
    the same seeds, from which most of what seeds do to a score drops out. The interval is that of a
    single lead about the mean of the fresh ones, which the chance of either is in: one that holds 0
    tells of no optimism.
    """

    fresh_score: float  # of the result, mean over the fresh seeds
    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, chosen: float, fresh: Sequence[float], fresh_start: Sequence[float]) -> Optimism:
        """From the chosen lead, and fresh scores of result and start, R >= 2 of each."""
        leads = mean_interval([a - b for a, b in zip(fresh, fresh_start, strict=True)])
        mean, count = chosen - leads.mean, leads.count
        # t s / sqrt(R) is the half-width for the mean of R; a single one more has R + 1 times the
        # variance: s^2 (1 + 1 / R).
        half = (leads.high - leads.mean) * math.sqrt(count + 1)
        return cls(sum(fresh) / count, mean, mean - half, mean + half)


def optimism_fields(optimism: Optimism | None) -> dict[str, Any]:
    """For result.json."""
    if optimism is None:
        return {"fresh_score": None, "optimism": None, "optimism_interval": None}
    return {
        "fresh_score": optimism.fresh_score, "optimism": optimism.mean,
        "optimism_interval": [optimism.low, optimism.high],
    }  # fmt: skip


def look_again(choice: Winner, result: Tensor, start: Tensor, store: ScoreStore) -> Optimism | None:
    """Optimism of a final choice; None where nothing was compared, or the start was chosen."""
    if choice.score is None or torch.equal(result, start):
        return None
    last, count = len(choice.rungs) - 1, choice.images_each
    level = store.get(f"final/{last}/start", start, count, "final", last)["reference"]
    asked = [
        Request(f"optimism/{index}/{name}", rows, count, ("optimism", index))
        for name, rows in (("result", result), ("start", start))
        for index in range(FRESH)
    ]
    found = [score["reference"] for score in store.get_all(asked)]
    if not all(map(math.isfinite, [level, *found])):
        return None
    return Optimism.of(choice.score - level, found[:FRESH], found[FRESH:])


class Rung(NamedTuple):
    """A stage: how many entries are scored, and with how many images each."""

    entries: int
    images: int


def tournament_rounds(entries: int, images: int, least: int = 1) -> tuple[Rung, ...]:
    """The rungs of a tournament of so many entries that costs at most `images`.

    Every rung costs about the same: E entries and r rungs give images / (r E) to each entry of the
    first, and as much more to those of a later one as they are fewer. () where one entry is left
    without a look, and where an entry of the first rung would have fewer than `least` images.
    """
    counts, left = [], entries
    while left > 1:
        counts.append(left)
        left = math.ceil(left / 2)
    if not counts:
        return ()
    share = images // len(counts)
    rungs = tuple(Rung(count, share // count) for count in counts)
    return rungs if rungs[0].images >= max(least, 1) else ()


def most_entries(images: int, least: int) -> int:
    """How many entries a tournament of so many images can hold, with `least` for each at first.

    The largest E with E * ceil(log2 E) * least <= images; 1 where not even two can be compared.
    """
    entries = 1
    while tournament_rounds(entries + 1, images, least):
        entries += 1
    return entries


def cost(rungs: tuple[Rung, ...]) -> int:
    """Images of all rungs."""
    return sum(rung.entries * rung.images for rung in rungs)
