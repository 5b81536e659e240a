"""What a search did, in sentences: from result.json, for the terminal and for reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def search_lines(found: Mapping[str, Any]) -> list[str]:
    """Where it began, what was chosen, what it cost; `found` is result.json or a part of it."""
    return [_began(found["start"]), _chose(found["final"]), _spent(found)]


def _began(start: Mapping[str, Any]) -> str:
    rungs = start["rungs"]
    if not rungs:
        return f"began at {start['label']}"
    return (
        f"began at {start['label']}, the best of {len(rungs[0])} merges that cost no search "
        f"({_score(start)})"
    )


def _chose(final: Mapping[str, Any]) -> str:
    rungs = final["rungs"]
    if not rungs:
        return f"reports the {final['chosen']}, without a choice among finalists"
    text = f"chose {final['chosen']} of {len(rungs[0])} finalists ({_score(final)}"
    if final["fresh_score"] is not None:
        text += f", {final['fresh_score']:.3f} on fresh seeds: optimism {final['optimism']:+.3f}"
    return text + ")"


def _score(winner: Mapping[str, Any]) -> str:
    if winner["score"] is None:
        return "not finite"
    return f"FID {winner['score']:.3f} at N = {winner['images_each']:,}"


def _spent(found: Mapping[str, Any]) -> str:
    start, final = found["start"]["images"], found["final"]["images"]
    rounds = found["search_images"] - start - final
    return (
        f"spent {found['search_images']:,} images: {start:,} to find the start, {rounds:,} in "
        f"{found['rounds']:,} rounds, {final:,} on the final choice"
    )
