"""Steps of a fine-tuning run, its milestones, and a resume point every few of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from merge_rl.errors import ParallelError, TrainingError
from merge_rl.interfaces import Tracker
from merge_rl.storage.files import below
from merge_rl.storage.runs import Boards, FinetuneRun, StopSignals, fitting
from merge_rl.workflows.finetune.learner import LoopState, pack_state, unpack_state
from merge_rl.workflows.finetune.rollouts import KeptRollouts
from merge_rl.workflows.finetune.scores import Curves, Point, write_grid
from merge_rl.workflows.finetune.snapshots import Snapshots
from merge_rl.workflows.finetune.step import (
    Credit,
    StepParts,
    memory_advice,
    peak_memory,
    require_pool,
)

MAX_FAILURES: Final = 3  # steps in a row without a finite reward and loss
SCORE: Final = "score"  # kind of the event of a point


class FinetuneLoop:
    """Owns the state and saves it; `StepParts` knows how to make a step.

    Until its update a step changes nothing: one that is interrupted, or whose rewards or losses
    are not finite, is given up whole.
    """

    def __init__(
        self, parts: StepParts, run: FinetuneRun, tracker: Tracker, boards: Boards,
        signals: StopSignals,
    ) -> None:  # fmt: skip
        self.parts, self.learner, self.signals = parts, parts.learner, signals
        self.job, self.config = parts.job, parts.job.config
        self.run_dir, self.tracker, self.boards = run, tracker, boards
        self.state, job = LoopState(), parts.job
        self.updating = False  # whether weights may be ahead of the state
        self.curves, self.snapshots = Curves(job, run), Snapshots(run, job.config, job.origin)

    def run(self) -> None:
        """From the present state to the last step, or to the end of the curve that was named.

        Ctrl-C and SIGTERM save the last finished step and raise KeyboardInterrupt.
        """
        with self.signals:
            try:
                if not self.snapshots.entries:
                    self.snapshots.write_start(self.job.network)
                self._steps()
            except KeyboardInterrupt:
                if not self.updating:  # it can be, where somebody else than a signal raises it
                    with self.signals.held():
                        self.save()
                raise
            except ParallelError:
                # Another process is lost: whole weights are here, shards of them are not.
                if self.config.parallel == "ddp" and not self.updating:
                    self.save()
                raise

    def _steps(self) -> None:
        while True:
            self._milestones()
            if self.state.step >= self.config.steps or self.curves.ended():
                break
            images = self.config.images_per_step + self.parts.pool_images(self.state)
            self.tracker.phase(f"step {self.state.step + 1} of {self.config.steps}", images)
            self.job.rollout.on_images = self.tracker.advance
            with memory_advice(self.config):
                self._step()
            if self.state.step % self.config.save_every == 0:
                self.save()
        self.save()

    def _milestones(self) -> None:
        """Snapshot, scores and samples where they are due and not there yet."""
        step, config = self.state.step, self.config
        scored = step % config.curves.every == 0 or step >= config.steps
        # What is scored is kept: the best point of a curve may become the result.
        if step and (scored or step % config.snapshot_every == 0) and not self.snapshots.has(step):
            with self.signals.held():  # files and their list change together
                self.snapshots.write(step, self.learner)
        if scored and step not in self.curves.points:
            self._score(step)

    def _score(self, step: int) -> None:
        self.tracker.phase(f"scores at step {step}", 4 * self.config.curves.num_images)
        with memory_advice(self.config), self.learner.averaged() as network:
            picture = write_grid(self.job, self.run_dir, step, network)
            point = self.curves.make_point(network, self.parts.features, step, self.tracker)
        event = _score_event(step, point)
        with self.signals.held():
            self.curves.add(step, point)
            self.run_dir.append_event(event)
        self.tracker.event({**event, "headline": self.curves.headline})
        named = {
            f"fid/{curve}/{name}": value
            for curve, scores in point.items() for name, value in scores.items()
        }  # fmt: skip
        self.boards.log(step, {k: v for k, v in named.items() if v is not None})
        if picture is not None:
            self.boards.picture(step, Path(picture))

    def _step(self) -> None:
        began, step = time.monotonic(), self.state.step
        self.job.rollout.window = self.parts.window(step)
        renewed = self.parts.renew_pool(self.state)
        if renewed is None:
            return self._skip("pool", began)
        self.state = renewed
        credit, kept = self.parts.collect(require_pool(renewed), step)
        if not credit.finite:
            return self._skip("reward", began)
        found = self.parts.gradients(kept, 0)
        if not found:
            return self._skip("loss", began)
        # From the first update to the state and the event after it no signal comes between.
        with self.signals.held():
            self.updating = True
            self._update(kept, found)
            self.state = self.state.advanced(self.config.images_per_step)
            self.updating = False
            self._report(credit, found, began)
        return None

    def _update(self, kept: KeptRollouts, found: dict[str, float]) -> None:
        """The epochs of a step, whose first gradients are there; `found` becomes the last one's."""
        self.parts.apply()
        for epoch in range(1, self.config.update.epochs):
            further = self.parts.gradients(kept, epoch)
            if not further:  # the epochs before it stand
                break
            found.update(further)
            self.parts.apply()

    def _report(self, credit: Credit, found: Mapping[str, float], began: float) -> None:
        seconds = time.monotonic() - began
        values = {
            **self.parts.describe(credit, require_pool(self.state)),
            **found,
            "images_per_second": self.config.images_per_step / seconds,
            "memory_bytes": peak_memory(self.config.device),
            "seconds": seconds,
        }
        step, images = self.state.step, self.state.images
        event = {"kind": "step", "step": step, "images": images, **values}
        self.run_dir.append_event(event)
        self.tracker.event(event)
        self.boards.log(step, values)

    def _skip(self, what: str, began: float) -> None:
        """Count a step without an update; after three in a row go back to before them and end."""
        event = {
            "kind": "step", "step": self.state.step + 1, "skipped": what,
            "images": self.state.images, "seconds": time.monotonic() - began,
        }  # fmt: skip
        with self.signals.held():
            self.state = self.state.passed_over()
            self.run_dir.append_event(event)
        self.tracker.event(event)
        self.boards.log(self.state.step, {"skipped_steps": float(self.state.skipped)})
        if self.state.failures >= MAX_FAILURES:
            self._give_up(what)

    def _give_up(self, what: str) -> None:
        last = self.state.step
        with self.signals.held():
            self.state = self.state.before_failures()
            self.save()
            step = self.state.step
            if step and not self.snapshots.has(step):
                self.snapshots.write(step, self.learner)
        advice = "no update was made before, so that a smaller --lr is no help"
        if step:  # its own rollouts or losses are the ones that fail
            earlier = self.snapshots.result_path(self.snapshots.newest_before(step))
            advice = f"start again with a smaller --lr from earlier weights ({earlier})"
        why = ""
        if what != "loss" and (failures := self.parts.failures):
            why = f": {failures.said(self.job.rollout.extractor.name)}"
            if failures.features:
                advice = "once the extractor is mended, go on with mergerl resume"
        raise TrainingError(
            f"{MAX_FAILURES} steps in a row ({step + 1}..{last}) had a {what} that is not finite"
            f"{why}; the state before them is saved in {self.run_dir.path}, its weights in "
            f"{self.snapshots.result_path(step)}; {advice}"
        )

    def save(self) -> None:
        """Write the resume point of the last finished step."""
        tensors, values = pack_state(self.state, self.learner, self.job.reward)
        self.run_dir.save_state(self.state.step, tensors, values, keep=self.config.keep_last)

    def restore(self) -> None:
        """Go on from the newest resume point that is whole, if there is one."""
        saved = self.run_dir.load_state(
            lambda text: self.tracker.event({"kind": "warning", "text": text})
        )
        if saved is not None:
            with fitting(self.run_dir.path, "resume point"):
                self.state = unpack_state(*saved, self.learner, self.job.reward)
            self.parts.send_state(below(saved[0], "learner."), self.learner.updates)
        step = self.state.step
        self.run_dir.keep_events_up_to(step)
        self.curves.forget_after(step)
        self.snapshots.forget_after(step)
        told = {event.get("step") for event in self.run_dir.events() if event.get("kind") == SCORE}
        for scored in sorted(self.curves.points.keys() - told):  # it was ended between the two
            self.run_dir.append_event(_score_event(scored, self.curves.points[scored]))


def _score_event(step: int, point: Point) -> dict[str, Any]:
    return {"kind": SCORE, "step": step, "scores": point}
