"""What a comparison leaves to look at: compare.md and compare.png beside compare.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_rl.errors import ConfigError
from merge_rl.storage.atomic import write_text
from merge_rl.workflows.compare_picture import draw_comparison
from merge_rl.workflows.compare_text import markdown


def write_comparison(document: Mapping[str, Any], folder: Path) -> str | None:
    """Write table and plot; a sentence where the plot could not be drawn."""
    note = None
    picture: str | None = "compare.png"
    try:
        draw_comparison(document, folder / "compare.png")
    except ConfigError as error:
        picture, note = None, str(error)
    write_text(folder / "compare.md", markdown(document, picture))
    return note
