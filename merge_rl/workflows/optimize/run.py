"""The main job: search the merging coefficients, compare on fresh seeds, write the merge."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from merge_rl import own_code
from merge_rl.config import (
    OptimizeConfig,
    SamplerConfig,
    from_mapping,
    said_by,
    with_settings,
    without_nan,
)
from merge_rl.core.merging.tuned_map import merge_map
from merge_rl.errors import ConfigError
from merge_rl.interfaces import Tracker
from merge_rl.parallel import joined
from merge_rl.parallel.group import Group
from merge_rl.progress import announcing, notes_of, tracker_of
from merge_rl.storage.checkpoints import CheckpointSet, merged_licence, open_checkpoints
from merge_rl.storage.files import absolute, as_path, locked, require_new
from merge_rl.storage.hub import local_set
from merge_rl.storage.runs import (
    RunDir,
    begin_run,
    find_run,
    find_set,
    goes_on,
    gone_unless,
    located,
    require_resumable,
    require_same_set,
)
from merge_rl.version import __version__
from merge_rl.workflows.assembly import (
    Given,
    Job,
    allow_named,
    build_job,
    require_all_allowed,
    resolve_config,
    search_doubts,
    with_network,
)
from merge_rl.workflows.evaluate import ScoreStore, compare
from merge_rl.workflows.optimize.budget import plan_budget, require_paid
from merge_rl.workflows.optimize.prepare import (
    check_names,
    common_batch,
    distribute,
    opening_notes,
)
from merge_rl.workflows.optimize.result import (
    OptimizeResult,
    from_plain,
    to_plain,
    write_merged,
    write_samples,
)
from merge_rl.workflows.optimize.search import make_searcher, run_search, starts_of
from merge_rl.workflows.optimize.trial import try_function
from merge_rl.workflows.report import with_page
from merge_rl.workflows.rollout import DistributedRollout, Generate, on_device


def optimize(
    checkpoints: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    reward: str | None = None,
    searcher: str | Callable[..., Any] | None = None,
    budget: int | None = None,
    seed: int | None = None,
    config: OptimizeConfig | None = None,
    tracker: Tracker | None = None,
    progress: bool = True,
    **settings: Any,
) -> OptimizeResult:
    """Find merging coefficients for a folder of checkpoints and write the merged model.

    Args:
        checkpoints: folder of safetensors, with or without a manifest.
        out: run directory; must not exist.
        reward: name of the reward, or a weighted sum: "fid-subset + 0.2 * kid-subset".
        searcher: name of the searcher; "policy-gradient", "pathwise", "auto", ...; or a class of
            one's own, see `merge_rl.Searcher`.
        budget: images that may be generated in all, the final comparison included.
        seed: fixes every draw of the run.
        config: other settings; it may leave out what the call says, and must not say otherwise.
        tracker: hears of progress; by default it is printed, unless `progress` is off.
        settings: any setting by its name: `track="raw"`, `device="cuda"`, `num_steps=8`,
            `pool_size=1000`, `network=make_network`, `search={"std": 0.5}`, ...

    Raises MergeRLError subclasses for input that cannot work, before anything is written; and
    KeyboardInterrupt with the resume point saved.
    """
    tracker = tracker_of(tracker, progress)
    folder = find_set(local_set(checkpoints, notes_of(tracker))).told(announcing(tracker))
    named = {"reward": reward, "searcher": searcher, "budget": budget, "seed": seed}
    settings |= {name: value for name, value in named.items() if value is not None}
    base = with_settings(OptimizeConfig, config, **settings)
    _require_place(base.checkpoints, checkpoints, folder)
    base = dataclasses.replace(base, checkpoints=str(folder))
    opened = open_checkpoints(folder, track=base.track, select=base.select or None)
    said = said_by(OptimizeConfig, **settings).get("sampler")
    if isinstance(said, dict) and (config is None or config.sampler is None):
        sampler = from_mapping(SamplerConfig, {**opened.defaults.sampler, **said}, "sampler")
        base = dataclasses.replace(base, sampler=sampler)
    return optimize_set(base, opened, as_path(out, "out"), tracker)


def optimize_set(
    settings: OptimizeConfig, opened: CheckpointSet, out: Path, tracker: Tracker
) -> OptimizeResult:
    """`optimize` of an open set, with settings that name it and stand over its own sampler."""
    with joined() as group:
        if group.leads and not goes_on(out, group.place):
            require_new(out)
        return begin(group, settings, opened, out, tracker)


def _require_place(said: str, given: str | os.PathLike[str], found: Path) -> None:
    """Raise ConfigError for settings that name another set than the call does."""
    if said and absolute(said) not in (absolute(given), absolute(found)):
        raise ConfigError(
            f"checkpoints is {os.fspath(given)!r} in the call and {said!r} in its config; expected "
            "one of the two"
        )


def begin(
    group: Group,
    base: OptimizeConfig,
    opened: CheckpointSet,
    out: Path,
    tracker: Tracker,
    given: Given | None = None,
    note: str | None = None,
) -> OptimizeResult:
    """The search of an open set, from settings that leave open what the set says, to its end.

    `note` is told with those that open it.
    """
    allow_named(base)
    with_network(opened, base.network)
    resolved = resolve_config(base, opened)
    check_names(resolved)
    merged_licence(opened, resolved.licence)  # refused before the search, not after it
    resolved = common_batch(resolved, opened, group, out, announcing(tracker))
    ranks, job = _gather(group, resolved, opened, tracker, given)
    if not group.leads:
        return from_plain(ranks.follow())
    require_first_round(resolved, job)  # refuses before anything is written
    timed = given is None and resolved.generate is None
    for text in [*opening_notes(base, resolved, job, group.size, timed=timed), note]:
        if text is not None:
            announcing(tracker)(text)
    with locked(out):
        inputs = {"hashes": job.hashes, "version": __version__}
        run = begin_run(out, resolved, inputs, group.place)
        with gone_unless(run.state_path.exists, run.path):
            result = _drive(run, resolved, job, tracker)
    ranks.end(to_plain(result))
    return result


def resume(
    run_dir: str | os.PathLike[str],
    *,
    checkpoints: str | os.PathLike[str] | None = None,
    generate: Generate | None = None,
    model: nn.Module | None = None,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> OptimizeResult:
    """Go on with an interrupted run; it ends as if it had never been interrupted.

    Args:
        run_dir: the run.
        checkpoints: where the set lies now, if it was moved; the run keeps its new place.
        generate, model: those that `search` was given, of a run that it began.
        tracker: hears of progress; by default it is printed, unless `progress` is off.

    Raises RunError if the folder is no run or its inputs have changed since, by SHA-256, or are
    missing, and ConfigError without the function that a run generates with.
    """
    tracker = tracker_of(tracker, progress)
    run = RunDir.open(find_run(run_dir).told(announcing(tracker)))
    with joined() as group, locked(run.path if group.leads else None):
        moved = None if checkpoints is None else local_set(checkpoints, notes_of(tracker))
        config = located(run.config(), run.path, moved, announce=announcing(tracker))
        given = _given(config, run, generate, model)
        if given is not None and (name := own_code.name_of(generate)) != config.generate:
            announcing(tracker)(f"{run.path} began with {config.generate}, goes on with {name}")
        select = config.select or None
        require_all_allowed(config, str(run.path))
        opened = open_checkpoints(config.checkpoints, track=config.track, select=select)
        require_same_set(run, opened.names)
        with_network(opened, config.network)
        if given is not None and group.leads:
            try_function(config, given, opened)
        group.broadcast(phase="trying the function")
        ranks, job = _gather(group, config, opened, tracker, given)
        if not group.leads:
            return from_plain(ranks.follow())
        require_resumable(run, job.hashes, tracker)
        if config != run.config():
            run.write_config(config)
        result = _drive(run, config, job, tracker)
        ranks.end(to_plain(result))
        return result


def _given(
    config: OptimizeConfig, run: RunDir, generate: Generate | None, model: nn.Module | None
) -> Given | None:
    """The function of a run that has one; ConfigError where it is not there, or one too many."""
    if (config.generate is None) == (generate is None):
        return None if generate is None else Given(generate, model)
    if generate is not None:
        raise ConfigError(f"{run.path} generates with a network of its own, got a function too")
    raise ConfigError(
        f"{run.path} generates with the function {config.generate!r}; hand it over to go on: "
        f"merge_rl.resume({str(run.path)!r}, generate=...)"
    )


def _gather(
    group: Group,
    config: OptimizeConfig,
    opened: CheckpointSet,
    tracker: Tracker,
    given: Given | None,
) -> tuple[DistributedRollout, Job]:
    """The job of this process, and all processes that help with it."""
    placed, announce = on_device(config, group), announcing(tracker)
    job = build_job(placed, opened, announce, given)
    return distribute(group, config, job, placed.device, announce), job


def _drive(run: RunDir, config: OptimizeConfig, job: Job, tracker: Tracker) -> OptimizeResult:
    with with_page(run.path, tracker) as heard:
        return _search(run, config, job, heard)


def _search(run: RunDir, config: OptimizeConfig, job: Job, tracker: Tracker) -> OptimizeResult:
    began = time.monotonic()
    for text in search_doubts(config, job.references, job.final_rollout.rollout):
        announcing(tracker)(text)
    store = ScoreStore(job, run, config.seed, config.rules)
    found = run_search(config, job, run, tracker, store)
    comparison = compare(config, job, found.start, found.rows, store, tracker)
    write_samples(run, job, found.ends, comparison, tracker)
    written = found.ends[comparison.written]
    write_merged(run.merged_path, job, config, written, comparison)
    result = {
        "version": __version__,
        "checkpoints": list(job.checkpoints.names),
        "groups": list(job.group_names),
        **found.as_dict(),
        "comparison": comparison.as_dict(),
        "warnings": comparison.warnings,
    }
    run.write("result.json", without_nan(result))
    tracker.event({"kind": "finished", "seconds": time.monotonic() - began})
    return OptimizeResult(run.path, found, comparison)


def require_first_round(config: OptimizeConfig, job: Job) -> None:
    """Raise ConfigError where the searcher cannot work, or its first round is not paid for."""
    searcher = make_searcher(config, job)
    if searcher.done or config.search.takes_gradients:  # these know it from the settings alone
        return
    plan = plan_budget(config, len(starts_of(config, job.checkpoints, merge_map(job.map))))
    asked, reward = len(searcher.ask()), config.reward
    needed = sum(rung.entries * rung.images for rung in plan.start)
    needed += asked * reward.images_per_candidate
    needed += reward.refresh_images(0) if reward.pooled else 0
    require_paid(config, asked, needed, plan.limit)
