"""The folder of a fine-tuning run, which is a checkpoint set of its snapshots too.

finetune.yaml               the resolved settings
inputs.json                 hashes of everything the run read
events.jsonl                one line a step, and one a score
state/step-N.safetensors    the last resume points: weights, average, optimizer, pool
curves.json                 scores along the run, under four samplers
samples/step-N.png          images of fixed seeds
checkpoints_manifest.yaml   the snapshots in snapshots/, with extractor and references beside them
scores.json, result.json    the comparison at the end; result.json means finished
report.md, final/           the page, and the model
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from merge_rl.config import dump_config, load_config
from merge_rl.config.finetune import FinetuneConfig
from merge_rl.errors import RunError
from merge_rl.storage.atomic import write_text
from merge_rl.storage.runs import RunDir
from merge_rl.storage.state_file import State, read_state, write_state

CONFIG_NAME: Final = "finetune.yaml"


def is_finetune_run(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a fine-tuning run."""
    return (Path(path) / CONFIG_NAME).is_file()


class FinetuneRun:
    """Files of one run; every write is atomic or, for events, a whole appended line."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files = RunDir(path)  # events and JSON files are kept as those of a search
        self.final_path = self.path / "final"
        self.state_folder = self.path / "state"

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], config: FinetuneConfig, inputs: Mapping[str, Any]
    ) -> FinetuneRun:
        """Start a run; an existing path is refused, never written into."""
        run = cls(path)
        if run.path.exists() or run.path.is_symlink():
            raise RunError(
                f"{run.path} exists already; choose another --out, or go on with --resume"
            )
        try:
            run.path.mkdir(parents=True)
        except OSError as error:
            raise RunError(f"{run.path}: cannot be made: {error.strerror}") from None
        run.files.write("inputs.json", inputs)
        write_text(run.path / CONFIG_NAME, dump_config(config))
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> FinetuneRun:
        """An existing run; RunError if the folder is missing or is not one."""
        run = cls(path)
        if not run.path.is_dir():
            raise RunError(f"{run.path}: no such run directory")
        if not is_finetune_run(run.path):
            raise RunError(f"{run.path}: not a fine-tuning run, {CONFIG_NAME} is missing")
        return run

    def config(self) -> FinetuneConfig:
        """The resolved settings of the run."""
        return load_config(FinetuneConfig, self.path / CONFIG_NAME)

    def write_config(self, config: FinetuneConfig) -> None:
        """Settings that the run goes on with."""
        write_text(self.path / CONFIG_NAME, dump_config(config))

    def state_paths(self) -> list[Path]:
        """The resume points, the newest first."""
        return sorted(self.state_folder.glob("step-*.safetensors"), reverse=True)

    def save_state(
        self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], *, keep: int
    ) -> None:
        """Write the resume point of a step, then remove all but the last `keep`.

        Until it is whole the earlier ones are all there; those of later steps, which are being done
        anew, go.
        """
        path = self.state_folder / f"step-{step:07d}.safetensors"
        write_state(path, tensors, values)
        paths = self.state_paths()
        for other in [p for p in paths if p > path] + [p for p in paths if p <= path][keep:]:
            other.unlink(missing_ok=True)

    def load_state(self, warn: Callable[[str], None] = lambda _text: None) -> State | None:
        """The newest resume point that can be read; None if none was written yet.

        `warn` hears of damaged ones that are passed over. RunError if all of them are.
        """
        paths = self.state_paths()
        for path in paths:
            try:
                return read_state(path)
            except RunError as error:
                if path == paths[-1]:
                    raise RunError(f"{error}; none of {len(paths)} can be used") from None
                warn(f"{error}; the one before it is used")
        return None

    def keep_events_up_to(self, step: int) -> None:
        """Drop events of later steps, which will be done again."""
        kept = [event for event in self.files.events() if event.get("step", 0) <= step]
        lines = "".join(json.dumps(event) + "\n" for event in kept)
        write_text(self.files.events_path, lines)
