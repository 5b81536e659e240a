"""Recipes: settings of the embedded runs that come with the package, found by name."""

from __future__ import annotations

from pathlib import Path

from merge_rl.errors import UnknownNameError

FOLDER = Path(__file__).parents[1] / "data" / "recipes"


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def find_settings(path: Path) -> Path:
    """The file that `path` stands for: itself, or the recipe of that name where there is no file.

    A bare name without an ending can only be a recipe: UnknownNameError lists them for any other.
    """
    if path.exists() or path.suffix or len(path.parts) != 1:
        return path
    if path.name not in recipe_names():
        raise UnknownNameError("file or recipe of settings", path.name, recipe_names())
    return FOLDER / f"{path.name}.yaml"
