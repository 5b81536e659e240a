"""Where a fine-tuning run goes: a new folder, or that of the same launch before a restart."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from merge_rl.config.finetune import FREE_ON_RESUME, FinetuneConfig, differing_keys
from merge_rl.errors import RunError
from merge_rl.parallel import Place
from merge_rl.storage.finetune_run import FinetuneRun
from merge_rl.workflows.launch import begin


def begin_finetune(
    out: str | os.PathLike[str], config: FinetuneConfig, inputs: Mapping[str, Any], place: Place
) -> FinetuneRun:
    """The run directory: new, or that of the same launch before it was restarted.

    Raises RunError for a directory of other settings or inputs, or of anything else.
    """

    def reopen() -> FinetuneRun:
        run = FinetuneRun.open(out)
        continued(run, config)
        return run

    return begin(
        out, inputs["hashes"], place, reopen=reopen,
        create=lambda: FinetuneRun.create(out, config, inputs), files=lambda run: run.files,
    )  # fmt: skip


def continued(run: FinetuneRun, config: FinetuneConfig | None) -> FinetuneConfig:
    """The settings of a run that goes on; with what of them a config may change.

    Raises RunError with the names of other settings that differ.
    """
    own = run.config()
    if config is None:
        return own
    differing = differing_keys(own, config)
    if differing:
        raise RunError(
            f"{run.path}: cannot resume with another configuration, these settings differ: "
            f"{', '.join(differing)}; expected those of {run.path / 'finetune.yaml'}"
        )
    return dataclasses.replace(own, **{k: getattr(config, k) for k in FREE_ON_RESUME})
