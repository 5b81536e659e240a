"""Fine-tune a network with the distribution-wise reward, compare, write the model."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_rl.config import FinetuneConfig, to_mapping, with_settings
from merge_rl.errors import ConfigError
from merge_rl.interfaces import Tracker
from merge_rl.parallel import joined
from merge_rl.parallel.group import Group
from merge_rl.progress import announcing, notes_of, tracker_of
from merge_rl.storage.checkpoints import open_model_file
from merge_rl.storage.files import locked, require_new
from merge_rl.storage.hub import local_place
from merge_rl.storage.runs import (
    Boards,
    FinetuneRun,
    StopSignals,
    begin_finetune,
    continued,
    find_run,
    goes_on,
    gone_unless,
    located,
    require_extras,
    require_resumable,
)
from merge_rl.version import __version__
from merge_rl.workflows.assembly import (
    allow_named,
    find_model,
    load_network,
    require_all_allowed,
    resolve_finetune,
    search_doubts,
)
from merge_rl.workflows.export import carried_metadata, save_model
from merge_rl.workflows.finetune.job import (
    FinetuneJob,
    build_finetune,
    check_finetune,
    check_names,
)
from merge_rl.workflows.finetune.learner import Learner, Wrap
from merge_rl.workflows.finetune.loop import FinetuneLoop
from merge_rl.workflows.finetune.page import finetune_card, write_report
from merge_rl.workflows.finetune.scores import final_scores
from merge_rl.workflows.finetune.step import StepParts
from merge_rl.workflows.report import with_page
from merge_rl.workflows.rollout import on_device, require_same_everywhere


@dataclass(frozen=True)
class FinetuneResult:
    """What a finished fine-tuning run came to.

    Attributes:
        run_dir: the run directory.
        step: the step whose weights are the result.
        images: number of images that were generated for training.
        skipped: steps without an update, as their reward or loss was not finite.
        curves: scores along the run, step -> curve -> reference.
        comparison: start and result on fresh seeds, see `final_scores`.
    """

    run_dir: Path
    step: int
    images: int
    skipped: int
    curves: Mapping[int, Mapping[str, Mapping[str, float | None]]]
    comparison: Mapping[str, Any]

    @property
    def model_path(self) -> Path:
        """Folder of the fine-tuned model."""
        return self.run_dir / "final"


def finetune(
    model: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    algorithm: str | None = None,
    reward: str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    config: FinetuneConfig | None = None,
    resume: bool = False,
    wrap: Wrap | None = None,
    tracker: Tracker | None = None,
    progress: bool = True,
    **settings: Any,
) -> FinetuneResult:
    """Fine-tune a model and write RUN/final, with snapshots that can be merged.

    Args:
        model: model folder, one .safetensors of a set, the folder of a set (its newest checkpoint
            is taken), or "user/repo" on the Hub.
        out: run directory; must not exist, or with `resume` be an interrupted run.
        algorithm: "pg", policy gradient on SDE rollouts; "rs", rejection sampling; or "pathwise",
            the reward's gradient through ODE rollouts.
        reward: as in `optimize`.
        steps: at most.
        seed: fixes every draw.
        config: other settings; it may leave out what the call says, and must not say otherwise.
        resume: go on with the run in `out`; it ends as if it had never been interrupted.
        wrap: what losses are computed through, see `Learner`; in one process.
        tracker: hears of progress; by default it is printed, unless `progress` is off.
        settings: any setting by its name, as in `optimize`; of a network of one's own
            `network=make_network`.

    Raises MergeRLError subclasses for input that cannot work, before anything is written;
    KeyboardInterrupt, on SIGTERM too, with the last finished step saved; TrainingError when three
    steps in a row have rewards or losses that are not finite.
    """
    named = {"algorithm": algorithm, "reward": reward, "steps": steps, "seed": seed}
    settings |= {name: value for name, value in named.items() if value is not None}
    chosen = with_settings(FinetuneConfig, config, **settings)
    allow_named(chosen)
    check_names(chosen)  # before a model is fetched from the Hub
    tracker = tracker_of(tracker, progress)
    source = find_model(model, tracker=notes_of(tracker)).told(announcing(tracker))
    resolved = resolve_finetune(dataclasses.replace(chosen, model=str(source)))
    if resume:
        return resume_finetune(out, config=resolved, wrap=wrap, tracker=tracker)
    with joined() as group:
        if group.leads and not goes_on(out, group.place):
            require_new(out)
        check_finetune(resolved)
        require_extras(resolved.track)
        job = _gather(group, resolved, wrap, tracker)

        def begin() -> FinetuneRun:
            inputs = {"hashes": dict(job.hashes), "version": __version__}
            return begin_finetune(out, resolved, inputs, group.place)

        with locked(out if group.leads else None):
            return _work(group, job, begin, wrap, tracker)


def resume_finetune(
    run_dir: str | os.PathLike[str],
    *,
    config: FinetuneConfig | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    wrap: Wrap | None = None,
    tracker: Tracker | None = None,
) -> FinetuneResult:
    """Go on with an interrupted run, from its newest resume point that is whole.

    A config, if given, may differ from the run's in how far it goes and in what is kept and told;
    RunError names the keys of any other difference, and inputs that have changed or are missing.
    `checkpoints` is where the model lies now, if it was moved: its file, or the folder of its set.
    """
    tracker = tracker_of(tracker, progress=True)
    run = FinetuneRun.open(find_run(run_dir).told(announcing(tracker)))
    with joined() as group, locked(run.path if group.leads else None):
        own = continued(run, config)
        require_all_allowed(own, str(run.path))
        moved = None if checkpoints is None else local_place(checkpoints, tracker=notes_of(tracker))
        own = located(own, run.path, moved, announce=announcing(tracker))
        require_extras(own.track)
        job = _gather(group, own, wrap, tracker)
        require_resumable(run, job.hashes, tracker)

        def begin() -> FinetuneRun:
            run.write_config(own)
            return run

        return _work(group, job, begin, wrap, tracker)


def _gather(
    group: Group, config: FinetuneConfig, wrap: Wrap | None, tracker: Tracker
) -> FinetuneJob:
    """The job of this process, after all of the launch were seen to have the same of everything."""
    if wrap is not None and group.size > 1:
        raise ConfigError("several processes wrap the network themselves; expected no wrap=")
    placed = on_device(config, group)
    job = build_finetune(placed, announcing(tracker), group.size)
    require_same_everywhere(group, to_mapping(config), job.hashes, placed.device)
    return job


def _work(
    group: Group,
    job: FinetuneJob,
    begin: Callable[[], FinetuneRun],
    wrap: Wrap | None,
    tracker: Tracker,
) -> FinetuneResult:
    """Make the run that `begin` opens, on the first process; help with it on the others."""
    signals = StopSignals()
    if group.size == 1:
        learner = Learner(job.network, job.config.update, wrap or (lambda network: network))
        return _lead(begin(), StepParts(job, learner), signals, tracker)
    # What shards need takes longer to import than all else, and a process alone has none.
    from merge_rl.workflows.finetune.distributed import DistributedStep
    from merge_rl.workflows.finetune.sharded import process_group

    with process_group(job.config.device, group):
        parts = DistributedStep(job, group, signals, announcing(tracker))
        if not group.leads:
            return _from_plain(parts.follow())
        result = _lead(begin(), parts, signals, tracker)
        parts.end(_to_plain(result))
        return result


def _lead(
    run: FinetuneRun, parts: StepParts, signals: StopSignals, tracker: Tracker
) -> FinetuneResult:
    def begun() -> bool:
        return bool(run.state_paths())

    with gone_unless(begun, run.path), with_page(run.path, tracker) as heard:
        return _drive(run, parts, signals, heard)


def _drive(
    run: FinetuneRun, parts: StepParts, signals: StopSignals, tracker: Tracker
) -> FinetuneResult:
    began, job, config = time.monotonic(), parts.job, parts.job.config
    unopened = Boards({}, lambda _text: None)
    loop = FinetuneLoop(parts, run, tracker, unopened, signals)
    loop.restore()
    for text in search_doubts(job.parts.settings, job.references, job.scored):
        announcing(tracker)(text)
    loop.boards = Boards.open(
        config.track, run.path, dataclasses.asdict(config), loop.state.step,
        lambda text: tracker.event({"kind": "warning", "text": text}),
    )  # fmt: skip
    try:
        loop.run()
        step = loop.curves.best_step()
        step = loop.state.step if step is None else step
        weights = loop.snapshots.result_path(step)
        networks = {
            "start": load_network(config.model, config.network).to(config.device),
            "result": load_network(weights, config.network).to(config.device),
        }
        with signals:  # SIGTERM interrupts it too; finished scores are kept
            parts.send_networks(networks)
            comparison = final_scores(job, run, networks, step, tracker, parts.features)
        loop.boards.log(loop.state.step, _flat(comparison))
    finally:
        loop.boards.close()
    result = FinetuneResult(
        run.path, step, loop.state.images, loop.state.skipped, loop.curves.points, comparison
    )
    _write(run, job, result, weights)
    tracker.event({"kind": "finished", "seconds": time.monotonic() - began})
    return result


def _to_plain(result: FinetuneResult) -> dict[str, Any]:
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return {**fields, "run_dir": str(result.run_dir)}


def _from_plain(values: Mapping[str, Any]) -> FinetuneResult:
    curves = {int(step): point for step, point in values["curves"].items()}
    return FinetuneResult(**{**values, "run_dir": Path(values["run_dir"]), "curves": curves})


def _flat(comparison: Mapping[str, Any]) -> dict[str, float]:
    head = comparison["headline"]
    found = {
        f"final/{curve}/{entry}": summary[head]["mean"]
        for curve, section in comparison["curves"].items()
        for entry, summary in section["entries"].items()
    }
    return {name: value for name, value in found.items() if value is not None}


def _write(run: FinetuneRun, job: FinetuneJob, result: FinetuneResult, weights: Path) -> None:
    """The model, the page and the end of the run."""
    card = finetune_card(job.config, job.origin, result.step, result.images, result.comparison)
    tensors = open_model_file(weights).weights
    save_model(
        run.final_path, tensors, job.origin.config, card=card, replace=True,
        metadata=carried_metadata(job.origin.metadata),
    )  # fmt: skip
    write_report(run, job.config, result.curves, result.comparison, result.step)
    document = {
        "version": __version__,
        "step": result.step,
        "images": result.images,
        "skipped": result.skipped,
        "comparison": result.comparison,
    }
    run.write("result.json", document)
