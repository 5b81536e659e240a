"""Several searchers, several seeds, one budget: which finds the best merge, at what cost.

DIR/settings.json          what all searches share
DIR/SEARCHER-seedN/        a run directory without final comparison and merged model
DIR/scores.json            scores on the shared fresh seeds, by what was scored
DIR/compare.json           the outcome; compare.md and compare.png show it
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_rl.config import (
    AUTO_BATCH,
    COEFFICIENTS,
    FIRST_RULES,
    MOST_FINAL,
    OptimizeConfig,
    finite,
    from_mapping,
    or_defaults,
    to_mapping,
    without_nan,
)
from merge_rl.errors import BudgetError, ConfigError, RunError
from merge_rl.interfaces import NullTracker, Tracker
from merge_rl.parallel import joined
from merge_rl.parallel.group import Group
from merge_rl.progress import announcing, notes_of, tracker_of
from merge_rl.storage.checkpoints import CheckpointSet, open_checkpoints
from merge_rl.storage.files import is_vacant, locked
from merge_rl.storage.hub import local_set
from merge_rl.storage.runs import SETTINGS, RunDir, find_set, require_same
from merge_rl.version import __version__
from merge_rl.workflows.assembly import (
    Announce,
    allow_named,
    fit_batch,
    open_targets,
    resolve_config,
    with_network,
)
from merge_rl.workflows.compare.match import Match, take_scores
from merge_rl.workflows.compare.scores import FreshScores
from merge_rl.workflows.compare.trials import (
    DEFAULT,
    Jobs,
    SearcherSpec,
    check_seeds,
    parse_specs,
)  # fmt: skip
from merge_rl.workflows.optimize import check_names, require_first_round
from merge_rl.workflows.report import CompareResult, with_page
from merge_rl.workflows.rollout import on_device

CURVE_IMAGES = 2000  # at most, where nothing is said
LEAST_SCORED = 10  # images of a score


def compare_searchers(
    config: OptimizeConfig,
    *,
    out: str | os.PathLike[str],
    searchers: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    curve_images: int | None = None,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> CompareResult:
    """Search with every searcher and seed, score all results on the same fresh seeds.

    Args:
        config: what all share: checkpoints, budget, evaluation, ...; its `seed` fixes the fresh
            seeds, and `search.name` is not looked at.
        out: folder of the comparison. One that was cut short goes on, and what is done is not
            done again; searchers and seeds may be added to a finished one.
        searchers: "NAME [label=LABEL] [KEY=VALUE ...]" each; by default those of `mergerl
            compare`, without those that cannot work here.
        seeds: of the searches.
        curve_images: N of the scores along the searches, 0 for none; by default N of the result's,
            2,000 at most.
        tracker: hears of progress; by default it is printed, unless `progress` is off.

    Returns the ranking, and all that is written to compare.json. Raises ConfigError before anything
    runs for what cannot work, RunError for a folder of other settings.
    """
    config, heard = or_defaults(OptimizeConfig, config), tracker_of(tracker, progress)
    seeds = check_seeds(seeds)
    specs = parse_specs(DEFAULT if searchers is None else searchers)
    if not specs:
        raise ConfigError("expected at least one searcher, got none")
    asked = Asked(specs, seeds, curve_images, lenient=searchers is None)
    with joined() as group:
        return compare_on(group, config, RunDir(out), asked, heard)


@dataclass(frozen=True)
class Asked:
    """What is to be compared; `lenient`: without the searchers that cannot work here."""

    specs: Sequence[SearcherSpec]
    seeds: Sequence[int]
    curve_images: int | None
    lenient: bool


def compare_on(
    group: Group, config: OptimizeConfig, folder: RunDir, asked: Asked, tracker: Tracker
) -> CompareResult:
    """The comparison on every rank of a group, each of which searches; rank 0 talks and writes."""
    tracker = tracker if group.leads else NullTracker()
    announce = announcing(tracker)
    base = _shared(
        config, str(find_set(local_set(config.checkpoints, notes_of(tracker))).told(announce))
    )
    on_device(base, group)
    along = _curve_images(asked.curve_images, base)
    opened = open_checkpoints(base.checkpoints, track=base.track, select=base.select or None)
    allow_named(base)
    with_network(opened, base.network)
    for text in opened.notes:
        announce(text)
    begun = _as_begun(_require_ours(folder), base, opened, announce) if group.leads else None
    base = dataclasses.replace(base, **group.broadcast(begun, phase="begin"))
    jobs = Jobs(opened, announce, group)
    able, left_out = _check(asked, base, opened, jobs)
    for text in left_out:
        announce(f"left out: {text}")
    place = folder.path if group.leads else None
    with locked(place), with_page(place, tracker) as watched:
        match = Match(
            base=base, opened=opened, jobs=jobs, folder=folder, tracker=watched,
            scores=FreshScores(folder, base.seed, watched), curve_images=along,
        )  # fmt: skip
        match.require_same(group, [[c.label for c in able], list(asked.seeds), along])
        if group.leads:
            _begin(folder, resolve_config(base, opened), jobs, along)
            take_scores(folder)
            announce(match.cost(len(able) * len(asked.seeds), group.size))
            for text in match.doubts(able, asked.seeds[0]):
                announce(text)
        document = match.share(group, able, asked.seeds)
        document = {key: without_nan(value) for key, value in document.items()}
        document["left_out"] = left_out
        if group.leads:
            folder.write("compare.json", document)
    return CompareResult(document)


def _shared(config: OptimizeConfig, checkpoints: str) -> OptimizeConfig:
    """What all searches have in common; the comparison is made once, and no search's to pay.

    Where its N is not said, a result is scored on what its share of a search's budget would pay.
    """
    final = config.evaluation
    if final.num_images is None:
        paid = int(final.share * config.budget) // final.repeats
        final = dataclasses.replace(final, num_images=max(LEAST_SCORED, min(MOST_FINAL, paid)))
    search = dataclasses.replace(config.search, name="policy-gradient")
    return dataclasses.replace(config, search=search, evaluation=final, checkpoints=checkpoints)


def _check(
    asked: Asked, base: OptimizeConfig, opened: CheckpointSet, jobs: Jobs
) -> tuple[list[SearcherSpec], list[str]]:
    """The searchers that can work, and a sentence for each that cannot, if that is allowed."""

    def fits(settings: OptimizeConfig) -> None:
        check_names(settings)
        if settings.search.tune != (COEFFICIENTS,):
            tuned = ",".join(settings.search.tune)
            raise ConfigError(f"expected tune {COEFFICIENTS}, all a comparison scores, got {tuned}")
        open_targets(settings)

    def works(settings: OptimizeConfig) -> None:
        require_first_round(settings, jobs.of(settings))

    able, left_out = list(asked.specs), list[str]()
    for check in (fits, works):  # what is fetched is fetched when all are known to fit
        for spec in tuple(able):
            try:
                check(resolve_config(spec.config(base, asked.seeds[0]), opened))
            except ConfigError as error:
                text = f"searcher {spec.label}: {error}"
                if not asked.lenient:
                    kind = BudgetError if isinstance(error, BudgetError) else ConfigError
                    raise kind(text) from None
                left_out.append(text)
                able.remove(spec)
    if not able:
        raise ConfigError(f"no searcher can work here: {left_out[0]}")
    return able, left_out


def _require_ours(folder: RunDir) -> RunDir:
    if not is_vacant(folder.path) and not (folder.path / SETTINGS).is_file():
        raise RunError(
            f"{folder.path} exists already and holds no comparison; choose another --out"
        )
    return folder


def _as_begun(
    folder: RunDir, base: OptimizeConfig, opened: CheckpointSet, announce: Announce
) -> dict[str, int]:
    """Rules and batch that a comparison was begun by; its own for one that begins."""
    before = folder.read(SETTINGS)
    begun = base if before is None else _begun_with(before)
    batch = base.batch
    if batch == AUTO_BATCH and before is not None:
        batch = begun.batch
    elif batch == AUTO_BATCH:
        batch = fit_batch(resolve_config(base, opened), opened, announce=announce).batch
    return {"rules": begun.rules, "batch": batch}


def _begun_with(before: Mapping[str, Any]) -> OptimizeConfig:
    """The settings that a comparison began with, which an earlier release may have written."""
    known = {"rules": FIRST_RULES, **before["settings"]["config"]}
    return from_mapping(OptimizeConfig, known, SETTINGS)


def _begin(folder: RunDir, shared: OptimizeConfig, jobs: Jobs, curve_images: int) -> None:
    """Write what all searches share, or compare with what was written when this began."""
    values = {"config": to_mapping(shared), "curve_images": curve_images}
    now = {"settings": values, "inputs": jobs.of(shared).hashes}
    before = folder.read(SETTINGS)
    if before is None:
        folder.write(SETTINGS, finite({"version": __version__, **now}))
        return
    before["settings"]["config"] = to_mapping(_begun_with(before))
    for what, found in now.items():
        require_same(folder.path, before.get(what) or {}, found, what=what)


def _curve_images(asked: int | None, config: OptimizeConfig) -> int:
    if asked is None:
        return min(CURVE_IMAGES, config.evaluation.images)
    if asked < 0 or asked == 1:
        raise ConfigError(f"expected 0 or at least 2 images along the search, got {asked}")
    return asked
