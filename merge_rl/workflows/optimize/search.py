"""The search as a whole: where it begins, its rounds, and the choice among the finalists."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from merge_rl import own_code, registry
from merge_rl.config import FIXED_STEP_RULES, OptimizeConfig
from merge_rl.core.merging.ema_profiles import Profiles, as_float64, exponent_from_std
from merge_rl.core.merging.maps import CoefficientMap
from merge_rl.core.merging.tuned_map import anchored, before_and_after, merge_map, setup_of
from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.interfaces import Searcher, Tracker
from merge_rl.searchers import OwnSearcher, Pathwise, SearchSpace
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.storage.runs import RunDir
from merge_rl.workflows.assembly import Job
from merge_rl.workflows.evaluate import ScoreStore
from merge_rl.workflows.optimize.budget import (
    AGAIN,
    LEAST,
    BudgetPlan,
    Optimism,
    Rung,
    Winner,
    look_again,
    most_entries,
    optimism_fields,
    plan_budget,
    run_tournament,
    tournament_rounds,
)
from merge_rl.workflows.optimize.pathwise import PathwiseLoop, require_gradients
from merge_rl.workflows.optimize.rounds import SearchLoop

_TENSORS = ("coefficients", "start", "rows")


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search."""

    coefficients: Tensor  # (G, K) float64
    start: Tensor  # (G, K), where it began
    rows: Tensor  # what is scored: the coefficients, and what was searched beside them
    start_label: str
    images: int  # all that it generated
    rounds: int
    beginning: Winner
    choice: Winner
    optimism: Optimism | None  # None where nothing was compared, or the start was chosen
    tuned: Mapping[str, Any]  # "start", "result": what was searched beside coefficients, if any

    @property
    def ends(self) -> dict[str, Tensor]:
        """Where it began and what it came to, (G, K) each."""
        return {"start": self.start, "result": self.rows}

    @property
    def spent(self) -> dict[str, int]:
        """Images of the search by what they went to; they sum to `images`."""
        start, final = self.beginning.images, self.choice.images
        return {"start": start, "rounds": self.images - start - final, "final": final}

    @property
    def again(self) -> int:
        """Images that the optimism was measured by, beside those of the search."""
        if self.optimism is None:
            return 0
        return (AGAIN - ("start" in self.choice.rungs[-1])) * self.choice.images_each

    def as_dict(self) -> dict[str, Any]:
        """For result.json."""
        return {
            "coefficients": self.coefficients.tolist(),
            "start": {"label": self.start_label, "coefficients": self.start.tolist(),
                      **self.beginning.as_dict()},
            "search_images": self.images,
            "images": self.spent,
            "rounds": self.rounds,
            "final": {**self.choice.as_dict(), **optimism_fields(self.optimism),
                      "again_images": self.again},
            **({"tuned": self.tuned} if self.tuned else {}),
        }  # fmt: skip

    def to_plain(self) -> dict[str, Any]:
        """All fields as plain data."""
        tensors = {name: getattr(self, name).tolist() for name in _TENSORS}
        return {**dataclasses.asdict(self), **tensors}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> SearchResult:
        """What `to_plain` gave."""
        tensors = {name: torch.tensor(values[name], dtype=torch.float64) for name in _TENSORS}
        winners = {name: Winner(**values[name]) for name in ("beginning", "choice")}
        found = values["optimism"]
        optimism = None if found is None else Optimism(**found)
        return cls(**{**values, **tensors, **winners, "optimism": optimism})


def run_search(
    config: OptimizeConfig, job: Job, run: RunDir, tracker: Tracker, store: ScoreStore
) -> SearchResult:
    """From the resume point, or the beginning, to the coefficients that are reported."""
    job.final_rollout.rollout.on_images = tracker.advance
    starts = starts_of(config, job.checkpoints, merge_map(job.map))
    plan = plan_budget(config, len(starts))
    if plan.start:
        tracker.phase("start", sum(rung.entries * rung.images for rung in plan.start))
    beginning = run_tournament("start", starts, plan.start, store)
    start = starts[beginning.label]
    job = replace(job, map=anchored(job.map, start))
    theta = job.map.theta_of(start) if len(starts) > 1 else None
    searcher = make_searcher(config, job)
    loop = (PathwiseLoop if isinstance(searcher, Pathwise) else SearchLoop)(
        config, job, searcher, run, tracker,
        start=theta, spent=beginning.images, limit=plan.limit,
    )  # fmt: skip
    loop.run()
    entries = finalists(loop, start)
    choice = _choose(entries, plan, store, tracker)
    result = entries[choice.label]
    return SearchResult(
        coefficients=setup_of(job.map, result).coefficients,
        start=start,
        rows=result,
        start_label=beginning.label,
        images=loop.images + choice.images,
        rounds=loop.round_index,
        beginning=beginning,
        choice=choice,
        optimism=look_again(choice, result, start, store),
        tuned=before_and_after(job.map, result),
    )


def make_searcher(config: OptimizeConfig, job: Job) -> Searcher:
    """The searcher a config names, for the job's space."""
    plan = plan_budget(config, len(starts_of(config, job.checkpoints, merge_map(job.map))))
    space = SearchSpace(
        map=job.map,
        names=tuple(job.checkpoints.names),
        nimg=tuple(job.checkpoints.nimg),
        ema_std=tuple(job.checkpoints.ema_std),
        profiles=job.checkpoints.profiles() if config.search.name == "ema-grid" else None,
        evaluations=max(1, plan.rounds * plan.candidates),
        renewed=min(1.0, config.reward.images_per_subset / config.reward.pool_size),
    )
    search, name = config.search, config.search.name
    if search.takes_gradients and config.rules <= FIXED_STEP_RULES and search.learning_rate is None:
        search = dataclasses.replace(search, learning_rate=1.0)
    given = (search, space, config.seed)
    if registry.own_searcher(name):
        made = own_code.call(name, "searcher", given, "settings, space and seed")
        return OwnSearcher(made, name, space.dim)
    searcher: Searcher = registry.resolve_searcher(name)(*given)
    if isinstance(searcher, Pathwise):
        require_gradients(config, job)
    return searcher


def finalists(loop: SearchLoop, start: Tensor) -> dict[str, Tensor]:
    """What competes at the end, coefficients (G, K) by what they are; the policy mean first.

    The mean is that of the last round whose samples were finite.
    """
    named = {**loop.searcher.finalists, "mean": loop.result_theta}
    entries = {label: loop.job.map(theta) for label, theta in named.items()}
    entries = {"mean": entries.pop("mean"), **entries, "start": start}
    for index, theta in enumerate(loop.incumbents.thetas):
        entries[f"incumbent {index + 1}"] = loop.job.map(theta)
    distinct: dict[str, Tensor] = {}
    for label, rows in entries.items():
        if not any(torch.equal(rows, other) for other in distinct.values()):
            distinct[label] = rows
    return distinct


def _choose(
    entries: Mapping[str, Tensor], plan: BudgetPlan, store: ScoreStore, tracker: Tracker
) -> Winner:
    rungs = tournament_rounds(len(entries), plan.final, LEAST) if plan.final else ()
    if plan.look:  # fewer finalists than planned get no more images than are kept for them
        rungs = tuple(Rung(rung.entries, min(rung.images, plan.look)) for rung in rungs)
    if rungs:
        tracker.phase("finalists", sum(rung.entries * rung.images for rung in rungs))
    return run_tournament("final", entries, rungs, store, second=True)


AUTO = "auto"
MOST = 16  # starts: further images are better spent on looking twice
WIDTHS = (0.5, 0.75, 1.5)  # of EMA profiles, times the widths at hand


def starts_of(
    config: OptimizeConfig, checkpoints: CheckpointSet, coefficients: CoefficientMap
) -> dict[str, Tensor]:
    """Where the search of a config may begin, coefficients (G, K) by what they are."""
    own = registry.chooses_itself(config.search.name)
    if config.merge.start == AUTO and config.search.start_share > 0 and not own:
        images = int(config.search_budget * config.search.start_share)
        return free_starts(checkpoints, coefficients, min(MOST, most_entries(images, LEAST)))
    label = "newest" if config.merge.start == AUTO else config.merge.start
    return {label: coefficients(torch.zeros(coefficients.dim, dtype=torch.float64))}


def free_starts(
    checkpoints: CheckpointSet, coefficients: CoefficientMap, most: int = MOST
) -> dict[str, Tensor]:
    """The first `most` of them, coefficients (G, K) by what they are; the map's own start first.

    What the map cannot reach is left out, and so is what another entry is already.
    """
    origin = coefficients(torch.zeros(coefficients.dim, dtype=torch.float64))
    found = {"newest": origin}
    rows = {**_averages(checkpoints), **_profiles(checkpoints), **_singles(checkpoints)}
    for label, row in rows.items():
        if len(found) >= most:
            break
        wide = row.expand(coefficients.num_groups, -1)
        try:
            coefficients.theta_of(wide)
        except ConfigError:
            continue
        if not any(torch.allclose(wide, other) for other in found.values()):
            found[label] = wide
    return found


def _averages(checkpoints: CheckpointSet) -> dict[str, Tensor]:
    """Averages of the newest 1, 2, 4, 8, ... checkpoints, alternating between the tracks."""
    tracks, rows, size = _tracks(checkpoints), dict[str, Tensor](), 1
    while any(size // 2 < len(members) for members in tracks.values()):
        for track, members in tracks.items():
            if size // 2 >= len(members):
                continue
            of = f" of {track}" if track else ""
            chosen = members[-min(size, len(members)) :]
            row = torch.zeros(len(checkpoints), dtype=torch.float64)
            row[chosen] = 1 / len(chosen)
            rows[f"newest{of}" if size == 1 else f"average of {len(chosen)} newest{of}"] = row
        size *= 2
    return rows


def _tracks(checkpoints: CheckpointSet) -> dict[str, list[int]]:
    """Indices of each track's checkpoints, oldest first; "" where there is one track at most."""
    names = [entry.track or "" for entry in checkpoints.entries]
    tracks: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        tracks.setdefault(name, []).append(index)
    nimg = checkpoints.nimg
    if all(n is not None for n in nimg):
        for members in tracks.values():
            members.sort(key=lambda i: (nimg[i] or 0, i))
    return tracks if len(tracks) > 1 else {"": next(iter(tracks.values()))}


def _profiles(checkpoints: CheckpointSet) -> dict[str, Tensor]:
    nimg, gamma = checkpoints.nimg, checkpoints.ema_gamma
    known = [i for i in range(len(checkpoints)) if nimg[i] and gamma[i] is not None]
    if len(known) < 2:
        return {}
    widths = [width for i in known if (width := checkpoints.ema_std[i]) is not None]
    rows = {}
    for width in _widths(widths or [0.1]):
        try:
            profiles = Profiles(
                as_float64([float(nimg[i] or 0) for i in known]),
                as_float64([float(gamma[i] or 0) for i in known]), checkpoints.ema_start,
            )  # fmt: skip
            fitted = profiles.row(profiles.nimg.max(), exponent_from_std(width))
        except (ConfigError, CheckpointError):  # profiles that cannot be told apart
            continue
        row = torch.zeros(len(checkpoints), dtype=torch.float64)
        row[known] = fitted
        rows[f"EMA {width:.3f}"] = row
    return rows


def _singles(checkpoints: CheckpointSet) -> dict[str, Tensor]:
    """Single checkpoints from new to old, alternating between the tracks."""
    tracks = [members[::-1] for members in _tracks(checkpoints).values()]
    turns = [i for place in zip_longest(*tracks) for i in place if i is not None]
    rows = torch.eye(len(checkpoints), dtype=torch.float64)
    return {checkpoints.names[i]: rows[i] for i in turns}


def _widths(at_hand: Sequence[float]) -> list[float]:
    low, high = min(at_hand), max(at_hand)
    widths = [low * WIDTHS[0], low * WIDTHS[1], (low * high) ** 0.5, high * WIDTHS[2]]
    return sorted({round(width, 3) for width in widths if 0 < width < 0.28})
