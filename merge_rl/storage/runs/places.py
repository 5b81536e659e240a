"""What a folder is, and what is meant by one: decided here, and said."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, NamedTuple

from merge_rl.errors import CheckpointError, RunError
from merge_rl.storage.checkpoints import CONFIG_NAME, has_manifest
from merge_rl.storage.files import absolute, is_image_name, read_header, weights_in
from merge_rl.storage.runs.run_dir import SETTINGS, FinetuneRun, RunDir, is_finetune_run
from merge_rl.untrusted import is_there

FolderKind = Literal["run", "fine-tuning run", "comparison", "set", "model", "images", "nothing"]
_DATA: Final = frozenset({"features", "reps", "images"})  # tensors that no network has
_MOMENTS: Final = frozenset({"mu", "sigma"})


def folder_kind(folder: Path) -> FolderKind:
    """What a folder is, by the files in it.

    Weights go before pictures, which a model may come with; a `.safetensors` of statistics,
    features or pictures is none of weights. A config.json alone makes a model of a folder only
    where there are no pictures: "model", whose weights are missing.
    """
    if is_there(folder / SETTINGS):
        return "comparison"
    if is_there(folder / "config.yaml") and is_there(folder / "inputs.json"):
        return "run"
    if is_finetune_run(folder):
        return "fine-tuning run"
    if has_manifest(folder):
        return "set"
    weights = [file for file in weights_in(folder) if holds_weights(file)]
    if len(weights) > 1:
        return "set"
    if weights and (len(weights_in(folder)) == 1 or (folder / CONFIG_NAME).is_file()):
        return "model"
    if _has_pictures(folder):
        return "images"
    return "model" if (folder / CONFIG_NAME).is_file() else "nothing"


def only_inside(folder: Path) -> Path:
    """The folder itself, or where it is nothing by itself the one run, set or model right in it.

    Raises CheckpointError, naming them, where there are several.
    """
    kind = folder_kind(folder)
    if kind not in ("nothing", "images") or any(is_image_name(i.name) for i in folder.iterdir()):
        return folder
    known = {inner: folder_kind(inner) for inner in sorted(folder.iterdir()) if inner.is_dir()}
    found = [inner for inner, kind in known.items() if kind not in ("nothing", "images")]
    if len(found) > 1:
        listed = ", ".join(f"{inner.name} ({known[inner]})" for inner in found)
        raise CheckpointError(f"{folder}: holds several, name one of them: {listed}")
    return found[0] if found else folder


class Meant(NamedTuple):
    """What was meant, and a sentence that says so where it is not what was named."""

    path: Path
    note: str | None

    def told(self, announce: Callable[[str], None]) -> Path:
        """The path, once `announce` has heard the sentence, if there is one."""
        if self.note:
            announce(self.note)
        return self.path


def find_set(path: str | os.PathLike[str]) -> Meant:
    """The folder of checkpoints that `path` means: itself, or the only set in it.

    A fine-tuning run is the set of its snapshots, a model a set of one. Raises CheckpointError for
    a folder that holds several, and for a run, with the set that it searched. A path of anything
    else is left to whoever opens it.
    """
    given = Path(path)
    folder = only_inside(given) if given.is_dir() else given
    kind = folder_kind(folder) if folder.is_dir() else "nothing"
    if kind in ("run", "comparison"):
        of = f", of the set {RunDir(folder).config().checkpoints}" if kind == "run" else ""
        raise CheckpointError(f"{folder}: expected a set of checkpoints, found a {kind}{of}")
    if kind == "images" or (kind == "nothing" and folder.is_dir() and weights_in(folder)):
        raise CheckpointError(f"{folder}: expected a set of checkpoints, found {described(folder)}")
    return Meant(folder, None if folder == given else f"{path}: took the {kind} {folder}")


def find_run(path: str | os.PathLike[str]) -> Meant:
    """The run or comparison that `path` means: itself, the only one in it, or that of a result.

    Raises RunError for a set, a model or pictures; a path of anything else is left to whoever opens
    it.
    """
    given = Path(path)
    folder = only_inside(given) if given.is_dir() else given
    near = [folder, *absolute(folder).parents[:2]] if folder.exists() else []
    for place in filter(Path.is_dir, near):
        kind = folder_kind(place)
        if kind in ("run", "fine-tuning run", "comparison"):
            shown = place if given.is_absolute() else Path(os.path.relpath(place))
            same = absolute(place) == absolute(given)
            return Meant(shown, None if same else f"{path}: took the {kind} {shown}")
    if folder.is_dir() and folder_kind(folder) != "nothing":
        raise RunError(f"{folder}: expected a run, found {described(folder)}")
    return Meant(given, None)


def result_of(run: Path) -> Path:
    """The model that a finished run, or fine-tuning run, has written; else RunError."""
    if RunDir(run).read("result.json") is None:
        raise RunError(f"{run}: the run is not finished; go on with: mergerl resume {run}")
    tuned = is_finetune_run(run)
    result = FinetuneRun(run).final_path if tuned else RunDir(run).merged_path
    if not result.is_dir():
        raise RunError(f"{run}: the run has no model, expected the folder {result.name}/")
    return result


def described(folder: Path) -> str:
    """What a folder is, in a few words with what lies in it: for refusals."""
    kind = folder_kind(folder)
    items = list(folder.iterdir())
    counts = Counter("folders" if item.is_dir() else item.suffix or "files" for item in items)
    inside = ", ".join(f"{count} {name}" for name, count in counts.most_common(4)) or "nothing"
    return inside if kind == "nothing" else f"{kind} ({inside})"


def holds_weights(file: Path) -> bool:
    """Whether a `.safetensors`, or an index, is one of weights, not of statistics or features."""
    if file.suffix != ".safetensors":
        return True  # the index of a model's shards
    try:
        names = read_header(file).tensors.keys()
    except CheckpointError:
        return True  # damaged: whoever reads it says so
    return not (names >= _MOMENTS or names & _DATA)


def _has_pictures(folder: Path) -> bool:
    return any(is_image_name(name) for _, _, names in os.walk(folder) for name in names)
