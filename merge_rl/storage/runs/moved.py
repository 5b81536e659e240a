"""Where the inputs of a run lie now: named anew, found again, or missing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from merge_rl.config import FinetuneConfig, OptimizeConfig
from merge_rl.errors import RunError
from merge_rl.storage.files import absolute
from merge_rl.storage.runs.places import find_set

_FILES: Final = ("reference", "heldout", "extractor_weights", "autoencoder_weights")
_NAMED: Final = ("extra_references", "extra_weights")
_NEAR: Final = 3  # folders above a run in which inputs that moved with it are looked for

Config = TypeVar("Config", OptimizeConfig, FinetuneConfig)


class Moved(NamedTuple):
    """A folder or file that had one place and has another."""

    before: Path
    now: Path

    def follow(self, path: Path) -> Path:
        """Where a path lies after the move; a path that stayed behind stays."""
        if not path.is_relative_to(self.before):
            return path
        followed = self.now / path.relative_to(self.before)
        return followed if _exists(followed) or not _exists(path) else path


def located(
    config: Config, run: Path, checkpoints: str | os.PathLike[str] | None = None,
    *, announce: Callable[[str], None] = lambda _text: None,
) -> Config:  # fmt: skip
    """The settings of a run with the places where its inputs lie now; no contents are compared.

    Args:
        config: resolved settings, as the run began.
        run: its folder.
        checkpoints: where the set is, or the model of a fine-tuning run (its file, or the folder of
            its set); None for where it was. What lay below follows.
        announce: hears of what was found elsewhere.

    A path that is gone is looked for under the same names in the run and in the three folders above
    it, so that a project may be moved as a whole. Raises RunError for one that is not there.
    """
    key = "model" if isinstance(config, FinetuneConfig) else "checkpoints"
    before = Path(getattr(config, key))
    if checkpoints is None:
        now = _present(before, run, key, announce)
        moved = Moved(before, now)
    else:
        whole = key == "checkpoints"
        now = absolute(find_set(checkpoints).told(announce) if whole else checkpoints)
        if not now.exists():
            raise RunError(f"{now}: no such folder; expected the {key} of {run}")
        moved = Moved(before, now) if whole else _moved_model(before, now)
        now = moved.follow(before)

    def place(path: str, name: str) -> str:
        # Names of public weights are no places.
        given = Path(path)
        if not given.is_absolute():
            return path
        return str(_present(moved.follow(given), run, name, announce))

    return dataclasses.replace(config, **{key: str(now), **_inputs(config, place)})


def _inputs(
    config: OptimizeConfig | FinetuneConfig, place: Callable[[str, str], str]
) -> dict[str, Any]:
    """The settings that name files beside the set, each put where `place` says."""
    found: dict[str, Any] = {}
    for name in _FILES:
        path = getattr(config, name)
        found[name] = path and place(path, name)
    for name in _NAMED:
        paths: Mapping[str, str] = getattr(config, name)
        found[name] = {k: place(path, f"{name}.{k}") for k, path in paths.items()}
    sampler = config.sampler
    if sampler is not None and sampler.guide is not None:
        guide = place(sampler.guide, "sampler.guide")
        found["sampler"] = dataclasses.replace(sampler, guide=guide)
    return found


def _exists(path: Path) -> bool:
    """Whether a file or folder is there; of FILE#ENTRY the file."""
    return path.exists() or ("#" in path.name and Path(str(path).rpartition("#")[0]).exists())


def _moved_model(before: Path, now: Path) -> Moved:
    """The widest move that a model's new place tells: of its set, or of all that is named alike."""
    if now.is_dir():
        for folder in before.parents:
            if (now / before.relative_to(folder)).exists():
                return Moved(folder, now)
        return Moved(before, now)
    while before.name == now.name and before.name:
        before, now = before.parent, now.parent
    return Moved(before, now)


def _present(path: Path, run: Path, name: str, announce: Callable[[str], None]) -> Path:
    """The path, or where it lies after it moved with the run."""
    if _exists(path):
        return path
    home = absolute(run)
    for folder in [home, *home.parents[:_NEAR]]:
        for above in reversed(path.parents):
            found = folder / path.relative_to(above)
            if _exists(found):
                announce(f"{name} is no longer {path}; taken from {found}")
                return found
    if name in ("checkpoints", "model"):
        way = f"say where it is now: mergerl resume {run} --checkpoints PATH"
    else:
        settings = "finetune.yaml" if (run / "finetune.yaml").is_file() else "config.yaml"
        way = f"put it back, or say in {run / settings} where it is now"
    raise RunError(
        f"{run}: cannot resume, {name} is missing: {path}: no such file or folder; {way}"
    )
