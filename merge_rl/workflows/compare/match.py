"""All searches of a comparison, by one process or shared out among many, and what they come to."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from merge_rl.config import OptimizeConfig, to_mapping
from merge_rl.core.distances.intervals import summarize
from merge_rl.errors import MergeRLError, ParallelError
from merge_rl.interfaces import NullTracker, Tracker
from merge_rl.parallel.group import Group
from merge_rl.parallel.tasks import TaskQueue
from merge_rl.progress import duration
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.storage.runs import SETTINGS, RunDir
from merge_rl.version import __version__
from merge_rl.workflows.assembly import Job, resolve_config, search_doubts
from merge_rl.workflows.compare.scores import (
    FIXED,
    FreshScores,
    ScoredTrial,
    add_ratios,
    curve_scores,
    fixed_merges,
    ranking_line,
)  # fmt: skip
from merge_rl.workflows.compare.trials import (
    FRACTIONS,
    Jobs,
    NamedTracker,
    SearcherSpec,
    run_trial,
)
from merge_rl.workflows.rollout import (
    calls_an_image,
    image_seconds,
    own_device,
    require_same_everywhere,
)

OTHERS: Final = "ranks"  # folder of what the other ranks have scored, until rank 0 takes it
SCORES: Final = "scores.json"


def calls_of(config: OptimizeConfig, job: Job) -> int:
    """Network evaluations an image of a search takes; a function of the user's counts as one."""
    rollout = job.rollout.rollout
    return 1 if config.generate else calls_an_image(rollout.sampler, rollout.model)


@dataclass(frozen=True, kw_only=True, eq=False)
class Match:
    """What the searches of a comparison share."""

    base: OptimizeConfig
    opened: CheckpointSet
    jobs: Jobs
    folder: RunDir
    tracker: Tracker
    scores: FreshScores
    curve_images: int

    def play(self, specs: Sequence[SearcherSpec], seeds: Sequence[int]) -> dict[str, Any]:
        """Run all searches in order, reading finished ones from their files; the outcome."""
        shared = resolve_config(self.base, self.opened)
        job = self.jobs.of(shared)
        document = {**self._facts(shared, job, seeds), **self._fixed(shared, job)}
        lines = []
        for spec in specs:
            scored = [self._search(spec, seed) for seed in seeds]
            lines.append(ranking_line(spec, scored, list(job.references)))
        ratios = add_ratios(lines, document["fixed"], document["headline"])
        return {**document, **ratios, "searchers": lines}

    def share(
        self, group: Group, specs: Sequence[SearcherSpec], seeds: Sequence[int]
    ) -> dict[str, Any]:
        """As `play`, with all ranks: each takes a search at a time. Every rank calls it.

        Rank 0 then reads what there is as a process does that goes on with a comparison, so that
        nothing follows from who made it.
        """
        if group.size == 1:
            return self.play(specs, seeds)
        self._require_seen(group)
        trials = list(itertools.product(specs, seeds))
        queue = TaskQueue(group, "searches", 1 + len(trials))
        tracker = RankTracker(self.tracker, group, queue, ["fixed merges", *map(_name, trials)])
        own = dataclasses.replace(
            self,
            tracker=tracker,
            scores=FreshScores(self._own_files(group), self.base.seed, tracker),
        )
        for task in queue:
            if task == 0:
                shared = resolve_config(self.base, self.opened)
                own._fixed(shared, self.jobs.of(shared))
            else:
                own._search(*trials[task - 1])
        for _ in queue.wait():
            tracker.tell_news()
        document = self._read(specs, seeds) if group.leads else None
        found: dict[str, Any] = group.broadcast(document, phase="the outcome")
        return found

    def require_same(self, group: Group, trials: Any) -> None:
        """Raise ParallelError unless all ranks compare the same searches of the same inputs."""
        shared = resolve_config(self.base, self.opened)
        job = self.jobs.of(shared)
        settings = {**to_mapping(shared), "searches": trials}
        require_same_everywhere(group, settings, job.hashes, own_device(shared.device, group.place))

    def _require_seen(self, group: Group) -> None:
        """Raise ParallelError where a rank does not see what rank 0 has written."""
        written = self.folder.read(SETTINGS) if group.leads else None
        if group.broadcast(written, phase="begin") != self.folder.read(SETTINGS):
            raise ParallelError(
                f"rank {group.rank} does not see the {SETTINGS} that rank 0 has written to "
                f"{self.folder.path}; expected a folder that all ranks share"
            )

    def _own_files(self, group: Group) -> RunDir:
        """Where this rank keeps scores: what is known already, and what it adds."""
        if group.leads:
            return self.folder
        own = RunDir(self.folder.path / OTHERS / str(group.rank))
        own.write(SCORES, self.folder.scores())
        return own

    def _read(self, specs: Sequence[SearcherSpec], seeds: Sequence[int]) -> dict[str, Any]:
        take_scores(self.folder)
        silent = NullTracker()
        scores = FreshScores(self.folder, self.base.seed, silent)
        return dataclasses.replace(self, tracker=silent, scores=scores).play(specs, seeds)

    def cost(self, searches: int, ranks: int) -> str:
        """All that so many searches and their scores will generate at most, and about how long."""
        config = resolve_config(self.base, self.opened)
        final, job = config.evaluation, self.jobs.of(config)
        parts = {
            "searches": searches * config.budget,
            "fresh scores": (searches + len(FIXED)) * final.repeats * final.images,
            "along the searches": (searches * len(FRACTIONS) + len(FIXED)) * self.curve_images,
            "best single": len(self.opened) * final.selection,
        }
        total, time = sum(parts.values()), ""
        if config.generate is None:  # a function of the user's is called for what is needed alone
            count = config.reward.images_per_subset
            each = image_seconds(job.rollout.rollout, job.num_classes, count) / ranks
            time = f", about {duration(each * total)}"
        listed = ", ".join(f"{name} {count:,}" for name, count in parts.items() if count)
        return f"{total:,} images in all at most{time} ({listed})"

    def doubts(self, specs: Sequence[SearcherSpec], seed: int) -> list[str]:
        """What makes the scores of any of the searches doubtful, each once."""
        job = self.jobs.of(resolve_config(self.base, self.opened))
        settings = (resolve_config(c.config(self.base, seed), self.opened) for c in specs)
        rollout = job.final_rollout.rollout
        found = (search_doubts(each, job.references, rollout) for each in settings)
        return list(dict.fromkeys(itertools.chain.from_iterable(found)))

    def _search(self, spec: SearcherSpec, seed: int) -> ScoredTrial:
        name = _name((spec, seed))
        try:
            return self._scored(spec, seed, name)
        except MergeRLError as error:  # which of many failed is not in what failed
            error.args = (f"{name}: {error}",)
            raise

    def _scored(self, spec: SearcherSpec, seed: int, name: str) -> ScoredTrial:
        settings = resolve_config(spec.config(self.base, seed), self.opened)
        job = self.jobs.of(settings)
        path = self.folder.path / f"{spec.slug}-seed{seed}"
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


def take_scores(folder: RunDir) -> None:
    """Put what other ranks have scored into the comparison's own file."""
    others = folder.path / OTHERS
    found = [RunDir(path).scores() for path in sorted(others.glob("*"))]
    if found:
        known = folder.scores()
        for scores in found:
            known |= scores
        folder.write(SCORES, known)
        shutil.rmtree(others, ignore_errors=True)


class RankTracker:
    """A tracker of one rank: its phases reach the others, and what they have done is told here."""

    def __init__(
        self, tracker: Tracker, group: Group, queue: TaskQueue, names: Sequence[str]
    ) -> None:
        self._tracker: Tracker = tracker if group.leads else NullTracker()
        self._group, self._queue, self._names = group, queue, names
        self._phase, self._images = "", 0

    def tell_news(self) -> None:
        """On rank 0: which tasks the others have finished since."""
        if self._group.leads:
            for task, rank in self._queue.news():
                text = f"rank {rank} has finished {self._names[task]}"
                self._tracker.event({"kind": "note", "text": text})

    def phase(self, name: str, total: int) -> None:
        """Begin a phase, once the others' news are told."""
        self.tell_news()
        self._phase, self._images = name, 0
        self._group.note(name)
        self._tracker.phase(name, total)

    def advance(self, count: int) -> None:
        """Hand on, and record that this rank makes progress."""
        self._images += count
        self._group.note(f"{self._phase}, {self._images:,} images")
        self._tracker.advance(count)

    def event(self, event: Any) -> None:
        """As it is."""
        self._tracker.event(event)


def _name(trial: tuple[SearcherSpec, int]) -> str:
    spec, seed = trial
    return f"{spec.label} seed {seed}"
