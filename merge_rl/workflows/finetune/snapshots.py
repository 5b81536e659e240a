"""Snapshots of a fine-tuning run as a checkpoint set: fine-tune, then merge the trajectory."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from torch import Tensor, nn

from merge_rl import own_code
from merge_rl.config import FinetuneConfig, to_mapping
from merge_rl.errors import RunError
from merge_rl.models import plain_state_dict
from merge_rl.storage.checkpoints import (
    CheckpointEntry,
    Manifest,
    Origin,
    SetDefaults,
    has_manifest,
    read_manifest,
    save_checkpoint,
    write_manifest,
)
from merge_rl.storage.files import atomic_path, reference_file, sha256_file
from merge_rl.storage.runs import FinetuneRun
from merge_rl.workflows.assembly import is_public
from merge_rl.workflows.export import carried_metadata
from merge_rl.workflows.finetune.learner import Learner

RAW, AVERAGE, START = "raw", "ema", "start"
_EVALUATION: Final = "evaluation"
_STEP: Final = re.compile(r"-([0-9]{1,12})\.safetensors$")


class Snapshots:
    """Writes snapshots/TRACK-N.safetensors of step N and lists them in the run's manifest.

    Tracks "raw" and, where there is an average, "ema"; "start" has the network as it began. The
    progress of a snapshot is that of the model plus the images that fine-tuning learned from.
    """

    def __init__(self, run: FinetuneRun, config: FinetuneConfig, origin: Origin) -> None:
        self.run, self.config, self.origin = run, config, origin
        self.entries: list[CheckpointEntry] = []
        if has_manifest(run.path):
            self.entries = list(read_manifest(run.path).checkpoints)
        for entry in self.entries:
            if not _STEP.search(entry.file):
                raise RunError(f"{run.path}: damaged manifest: no step in the name {entry.file!r}")

    def has(self, step: int) -> bool:
        """Whether the snapshots of a step are there and listed."""
        return any(_step_of(entry) == step for entry in self.entries)

    def newest_before(self, step: int) -> int:
        """The last step before `step` that has a snapshot."""
        return max(found for entry in self.entries if (found := _step_of(entry)) < step)

    def write_start(self, network: nn.Module) -> None:
        """The network before the first step, and the files that score it."""
        self._write(START, 0, _on_cpu(plain_state_dict(network)))
        self._finish()

    def write(self, step: int, learner: Learner) -> None:
        """The weights of a step, and their average after them: it is the newest of the set."""
        self._write(RAW, step, learner.weights(average=False))
        if learner.averages:
            self._write(AVERAGE, step, learner.weights(average=True))
        self._finish()

    def forget_after(self, step: int) -> None:
        """Drop the snapshots of steps that will be done again."""
        self.entries = [entry for entry in self.entries if _step_of(entry) <= step]
        if self.entries:
            self._finish()

    def result_path(self, step: int) -> Path:
        """File of the weights that a step ended with: the average, where there is one."""
        track = START if step == 0 else AVERAGE if self.config.update.ema_decay else RAW
        return self.run.path / _file(track, step)

    def _write(self, track: str, step: int, weights: Mapping[str, Tensor]) -> None:
        file = _file(track, step)
        path = self.run.path / file
        metadata = {"config": dict(self.origin.config), **carried_metadata(self.origin.metadata)}
        save_checkpoint(path, weights, metadata)
        entry = CheckpointEntry(
            file=file, track=track, sha256=sha256_file(path), source=self.origin.source,
            nimg=(self.origin.nimg or 0) + step * self.config.images_per_step,
        )  # fmt: skip
        self.entries = [*(e for e in self.entries if e.file != file), entry]

    def _finish(self) -> None:
        config = self.config
        defaults = SetDefaults(
            extractor=_registered(config.extractor),
            extractor_weights=self._beside("extractor", config.extractor_weights),
            reference=self._beside("reference", config.reference),
            heldout=self._beside("heldout", config.heldout),
            autoencoder=_registered(config.autoencoder),
            autoencoder_weights=self._beside("autoencoder", config.autoencoder_weights),
            sampler=_sampler_mapping(config),
        )
        manifest = Manifest(
            name=f"{self.origin.name}-finetuned",
            licence=config.licence or self.origin.licence,
            model=dict(self.origin.config),
            defaults=defaults,
            checkpoints=tuple(self.entries),
        )
        write_manifest(self.run.path / "checkpoints_manifest.yaml", manifest)

    def _beside(self, name: str, source: str | None) -> Path | None:
        """A copy in the run's own folder: a manifest names no file outside of it."""
        if source is None or is_public(source) or Path(source).is_dir():
            return None
        file = reference_file(source)[0] if name in ("reference", "heldout") else Path(source)
        relative = Path(_EVALUATION) / f"{name}{file.suffix}"
        target = self.run.path / relative
        if not target.exists():
            with atomic_path(target) as temporary:
                shutil.copyfile(file, temporary)
        return relative


def _registered(name: str | None) -> str | None:
    """None for code of the user's, which a set does not name: it may go anywhere."""
    return None if name is None or own_code.is_own(name) else name


def _sampler_mapping(config: FinetuneConfig) -> dict[str, object]:
    """What differs from the defaults, with the SDE's steps of evaluation; no guide from outside."""
    if config.sampler is None:
        return {}
    own, plain = to_mapping(config.sampler), to_mapping(type(config.sampler)())
    found = {k: v for k, v in own.items() if v != plain[k] and k not in ("guide", "guidance")}
    return {**found, "sde_num_steps": config.curves.eval_steps}


def _file(track: str, step: int) -> str:
    return f"snapshots/{track}-{step:07d}.safetensors"


def _step_of(entry: CheckpointEntry) -> int:
    found = _STEP.search(entry.file)
    return int(found[1]) if found else 0


def _on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().float().cpu() for name, tensor in weights.items()}
