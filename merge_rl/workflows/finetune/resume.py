"""Going on with a run, whatever kind it is of."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import nn

from merge_rl import own_code
from merge_rl.errors import ConfigError
from merge_rl.interfaces import Tracker
from merge_rl.progress import announcing, tracker_of
from merge_rl.storage.files import as_path
from merge_rl.storage.runs import find_run, is_finetune_run
from merge_rl.workflows.finetune.run import FinetuneResult, resume_finetune
from merge_rl.workflows.optimize import OptimizeResult
from merge_rl.workflows.optimize import resume as resume_search
from merge_rl.workflows.rollout import Generate

Code = str | Callable[..., Any]


def resume(
    run_dir: str | os.PathLike[str],
    *,
    checkpoints: str | os.PathLike[str] | None = None,
    generate: Generate | None = None,
    model: nn.Module | None = None,
    code: Code | tuple[Code, ...] = (),
    tracker: Tracker | None = None,
    progress: bool = True,
) -> OptimizeResult | FinetuneResult:
    """Go on with an interrupted search or fine-tuning run; it ends as if never interrupted.

    Args:
        run_dir: the run, or a folder that holds one.
        checkpoints: where its set (or the model that it fine-tunes) lies now, if it was moved; the
            run keeps its new place.
        generate, model: those that `search` was given, of a run that it began.
        code: factories of one's own that the run uses (network, searcher, ...), or their names
            "package.module:factory": a run's word alone imports nothing.
        tracker: hears of progress; by default it is printed, unless `progress` is off.

    Raises RunError if the folder is no run or its inputs have changed since, by SHA-256, or are
    missing, and ConfigError for code or a function of a run that is not handed over.
    """
    for item in code if isinstance(code, tuple) else (code,):
        own_code.allow(item)
    heard = tracker_of(tracker, progress)
    folder = find_run(as_path(run_dir, "run_dir")).told(announcing(heard))
    if not is_finetune_run(folder):
        return resume_search(
            folder, checkpoints=checkpoints, generate=generate, model=model, tracker=heard
        )
    if generate is not None:
        raise ConfigError(f"{folder} fine-tunes a network of its own, got a function to generate")
    return resume_finetune(folder, checkpoints=checkpoints, tracker=heard)
