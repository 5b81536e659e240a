"""Several searchers, several seeds, one budget: which finds the best merge, at what cost.

DIR/settings.json          what all searches share
DIR/SEARCHER-seedN/        a run directory without final comparison and merged model
DIR/scores.json            scores on the shared fresh seeds, by what was scored
DIR/compare.json           the outcome; compare.md and compare.png show it
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from merge_rl.config import (
    COEFFICIENTS,
    FIRST_RULES,
    OptimizeConfig,
    from_mapping,
    to_mapping,
    without_nan,
)
from merge_rl.core.distances.intervals import summarize
from merge_rl.errors import BudgetError, ConfigError, RunError
from merge_rl.interfaces import Tracker
from merge_rl.progress import announcing, notes_of, tracker_of
from merge_rl.storage.checkpoints import CheckpointSet, open_checkpoints
from merge_rl.storage.files import is_vacant, locked
from merge_rl.storage.hub import local_set
from merge_rl.storage.runs import SETTINGS, RunDir, find_set, require_same
from merge_rl.version import __version__
from merge_rl.workflows.assembly import (
    Job,
    allow_named,
    open_targets,
    resolve_config,
    search_doubts,
    with_network,
)
from merge_rl.workflows.compare.scores import (
    FreshScores,
    ScoredTrial,
    add_ratios,
    curve_scores,
    fixed_merges,
    standing,
)  # fmt: skip
from merge_rl.workflows.compare.trials import (
    DEFAULT,
    Jobs,
    NamedTracker,
    SearcherSpec,
    check_seeds,
    parse_contenders,
    run_trial,
)  # fmt: skip
from merge_rl.workflows.optimize import check_names, make_searcher
from merge_rl.workflows.report import CompareResult
from merge_rl.workflows.rollout import calls_an_image, require_device

CURVE_IMAGES = 2000  # at most, where nothing is said


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
        searchers: "NAME [label=LABEL] [KEY=VALUE ...]" each, see `parse_contender`; by default
            `trials.DEFAULT`, without those that cannot work here.
        seeds: of the searches.
        curve_images: N of the scores along the searches, 0 for none; by default N of the result's,
            2,000 at most.
        tracker: hears of progress; by default it is printed, unless `progress` is off.

    Returns the ranking, and all that is written to compare.json. Raises ConfigError before anything
    runs for what cannot work, RunError for a folder of other settings.
    """
    heard = tracker_of(tracker, progress)
    announce = announcing(heard)
    seeds = check_seeds(seeds)
    contenders = parse_contenders(DEFAULT if searchers is None else searchers)
    if not contenders:
        raise ConfigError("expected at least one searcher, got none")
    curve_images = _curve_images(curve_images, config)
    base = _shared(
        config, str(find_set(local_set(config.checkpoints, notes_of(heard))).told(announce))
    )
    require_device(base.device)
    opened = open_checkpoints(base.checkpoints, track=base.track, select=base.select or None)
    allow_named(base)
    with_network(opened, base.network)
    for text in opened.notes:
        announce(text)
    folder = _require_ours(RunDir(out))
    base = dataclasses.replace(base, rules=_rules(folder, base.rules))
    jobs = Jobs(opened, announce)
    able, left_out = _check(contenders, base, seeds[0], opened, jobs, lenient=searchers is None)
    for text in left_out:
        announce(f"left out: {text}")
    match = _Match(
        base=base, opened=opened, jobs=jobs, folder=folder, tracker=heard,
        scores=FreshScores(folder, base.seed, heard), curve_images=curve_images,
    )  # fmt: skip
    with locked(folder.path):
        document = match.play(able, seeds)
        document = {key: without_nan(value) for key, value in document.items()}
        document["left_out"] = left_out
        folder.write("compare.json", document)
    return CompareResult(document)


def calls_of(config: OptimizeConfig, job: Job) -> int:
    """Network evaluations an image of a search takes; a function of the user's counts as one."""
    rollout = job.rollout.rollout
    return 1 if config.generate else calls_an_image(rollout.sampler, rollout.model)


def _shared(config: OptimizeConfig, checkpoints: str) -> OptimizeConfig:
    """What all searches have in common; the comparison is made once, and no search's to pay."""
    final = config.evaluation
    final = dataclasses.replace(final, num_images=final.images, selection_images=final.selection)
    search = dataclasses.replace(config.search, name="policy-gradient")
    return dataclasses.replace(config, search=search, evaluation=final, checkpoints=checkpoints)


def _check(
    contenders: Sequence[SearcherSpec],
    base: OptimizeConfig,
    seed: int,
    opened: CheckpointSet,
    jobs: Jobs,
    *,
    lenient: bool,
) -> tuple[list[SearcherSpec], list[str]]:
    """The contenders that can work, and a sentence for each that cannot, if that is allowed."""

    def fits(settings: OptimizeConfig) -> None:
        check_names(settings)
        if settings.search.tune != (COEFFICIENTS,):
            tuned = ",".join(settings.search.tune)
            raise ConfigError(f"expected tune {COEFFICIENTS}, all a comparison scores, got {tuned}")
        open_targets(settings)

    def works(settings: OptimizeConfig) -> None:
        make_searcher(settings, jobs.of(settings))

    able, left_out = list(contenders), list[str]()
    for check in (fits, works):  # what is fetched is fetched when all are known to fit
        for contender in tuple(able):
            try:
                check(resolve_config(contender.config(base, seed), opened))
            except ConfigError as error:
                text = f"searcher {contender.label}: {error}"
                if not lenient:
                    kind = BudgetError if isinstance(error, BudgetError) else ConfigError
                    raise kind(text) from None
                left_out.append(text)
                able.remove(contender)
    if not able:
        raise ConfigError(f"no searcher can work here: {left_out[0]}")
    return able, left_out


def _require_ours(folder: RunDir) -> RunDir:
    if not is_vacant(folder.path) and not (folder.path / SETTINGS).is_file():
        raise RunError(
            f"{folder.path} exists already and holds no comparison; choose another --out"
        )
    return folder


def _rules(folder: RunDir, own: int) -> int:
    """Those that a comparison was begun by; its own for one that begins."""
    before = folder.read(SETTINGS)
    return own if before is None else _begun_with(before).rules


def _begun_with(before: Mapping[str, Any]) -> OptimizeConfig:
    """The settings that a comparison began with, which an earlier release may have written."""
    known = {"rules": FIRST_RULES, **before["settings"]["config"]}
    return from_mapping(OptimizeConfig, known, SETTINGS)


def _begin(folder: RunDir, shared: OptimizeConfig, job: Job, curve_images: int) -> None:
    """Write what all searches share, or compare with what was written when this began."""
    values = {"config": to_mapping(shared), "curve_images": curve_images}
    now = {"settings": values, "inputs": job.hashes}
    before = folder.read(SETTINGS)
    if before is None:
        folder.write(SETTINGS, {"version": __version__, **now})
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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Match:
    """What the searches of a comparison share."""

    base: OptimizeConfig
    opened: CheckpointSet
    jobs: Jobs
    folder: RunDir
    tracker: Tracker
    scores: FreshScores
    curve_images: int

    def play(self, contenders: Sequence[SearcherSpec], seeds: Sequence[int]) -> dict[str, Any]:
        """All searches, one after the other, and what they come to."""
        shared = resolve_config(self.base, self.opened)
        job = self.jobs.of(shared)
        _begin(self.folder, shared, job, self.curve_images)
        for text in self._doubts(contenders, seeds[0], job):
            self.tracker.event({"kind": "note", "text": text})
        document = {**self._facts(shared, job, seeds), **self._fixed(shared, job)}
        lines = []
        for contender in contenders:
            scored = [self._search(contender, seed) for seed in seeds]
            lines.append(standing(contender, scored, list(job.references)))
        ratios = add_ratios(lines, document["fixed"], document["headline"])
        return {**document, **ratios, "searchers": lines}

    def _doubts(self, contenders: Sequence[SearcherSpec], seed: int, job: Job) -> list[str]:
        """What makes the scores of any of the searches doubtful, each once."""
        settings = (resolve_config(c.config(self.base, seed), self.opened) for c in contenders)
        rollout = job.final_rollout.rollout
        found = (search_doubts(each, job.references, rollout) for each in settings)
        return list(dict.fromkeys(itertools.chain.from_iterable(found)))

    def _search(self, contender: SearcherSpec, seed: int) -> ScoredTrial:
        settings = resolve_config(contender.config(self.base, seed), self.opened)
        name = f"{contender.label} seed {seed}"
        job = self.jobs.of(settings)
        path = self.folder.path / f"{contender.slug}-seed{seed}"
        trial = run_trial(path, settings, job, NamedTracker(self.tracker, name))
        return ScoredTrial(
            trial=trial,
            scores=self.scores.repeats(job, settings, trial.coefficients, name),
            calls=calls_of(settings, job),
            curve=curve_scores(self.scores, job, trial, self.curve_images, name),
        )

    def _fixed(self, config: OptimizeConfig, job: Job) -> dict[str, Any]:
        """The merges that cost no search, scored once for all."""
        best = self.scores.best_single(job, config)
        entries: dict[str, Any] = {}
        for name, rows in fixed_merges(job, best).items():
            found = summarize(self.scores.repeats(job, config, rows, name))
            fid = {reference: found.pop(reference) for reference in job.references}
            entries[name] = {"fid": fid, "others": found}
            if self.curve_images:
                along = self.scores.along(job, config, [rows], self.curve_images, name)
                entries[name]["curve"] = along[0]
        return {"best_single": job.checkpoints.names[best], "fixed": entries}

    def _facts(self, config: OptimizeConfig, job: Job, seeds: Sequence[int]) -> dict[str, Any]:
        return {
            "version": __version__,
            "metric": "fid",
            "checkpoints": list(job.checkpoints.names),
            "budget": config.budget,
            "seeds": list(seeds),
            "evaluation_seed": config.seed,
            "num_images": config.evaluation.images,
            "repeats": config.evaluation.repeats,
            "curve_images": self.curve_images,
            "floor": self.scores.floor(job, config),
            "headline": "heldout" if "heldout" in job.references else "reference",
            "device": config.device,
            "threads": torch.get_num_threads(),
        }
