"""`mergerl report`: the page and the plot of a run, or of a comparison of searchers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_rl.errors import ConfigError, RunError
from merge_rl.storage.atomic import write_text
from merge_rl.storage.finetune_run import is_finetune_run
from merge_rl.storage.runs import RunDir
from merge_rl.workflows.compare import SETTINGS
from merge_rl.workflows.compare_report import write_comparison
from merge_rl.workflows.report_picture import draw_run
from merge_rl.workflows.report_text import run_markdown


@dataclass(frozen=True)
class Report:
    """What was written."""

    page: Path
    picture: Path | None
    note: str | None  # why there is no picture
    comparison: dict[str, Any] | None = None  # of searchers, where the folder holds one


def write_report(path: str | os.PathLike[str]) -> Report:
    """Write report.md and report.png of a run, or compare.md and compare.png of a comparison.

    A run that goes on is reported as far as it is. Raises RunError for a folder of something else,
    and for a comparison without a result yet.
    """
    folder = Path(path)
    if (folder / SETTINGS).is_file():
        return _of_comparison(folder)
    if is_finetune_run(folder):
        raise RunError(f"{folder} is a fine-tuning run; its page is {folder / 'report.md'}")
    run = RunDir.open(folder)
    config, events, result = run.config(), run.events(), run.read("result.json")
    picture, note = folder / "report.png", None
    try:
        draw_run(events, result, picture)
    except ConfigError as error:
        note = str(error)
    page = folder / "report.md"
    write_text(page, run_markdown(config, events, result, None if note else picture.name))
    return Report(page, None if note else picture, note)


def _of_comparison(folder: Path) -> Report:
    document = RunDir(folder).read("compare.json")
    if document is None:
        raise RunError(
            f"{folder}: the comparison is not finished; go on with the command that began it"
        )
    note = write_comparison(document, folder)
    picture = None if note else folder / "compare.png"
    return Report(folder / "compare.md", picture, note, document)
