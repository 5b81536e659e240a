"""What a folder is, what is meant by one, and where the inputs of a run lie now."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar

from merge_rl.config import FinetuneConfig, OptimizeConfig
from merge_rl.errors import CheckpointError, RunError, absent, quoted
from merge_rl.storage.checkpoints import CONFIG_NAME, has_manifest
from merge_rl.storage.files import absolute, is_image_name, read_header, reference_file, weights_in
from merge_rl.storage.runs.run_dir import SETTINGS, FinetuneRun, RunDir, is_finetune_run
from merge_rl.untrusted import is_there

FolderKind = Literal[
    "run", "fine-tuning run", "comparison", "damaged run", "set", "model", "images", "nothing"
]
_NEEDED: Final = (  # what it is, the file without which it is none, files that tell it all the same
    ("run", "config.yaml", ("state.safetensors", "events.jsonl")),
    ("run", "inputs.json", ("config.yaml", "events.jsonl")),
    ("fine-tuning run", "finetune.yaml", ("inputs.json", "events.jsonl", "state")),
    ("comparison", SETTINGS, ("compare.json",)),
)
_DATA: Final = frozenset({"features", "reps", "images"})  # tensors that no network has
_MOMENTS: Final = frozenset({"mu", "sigma"})
_LOOKED_AT: Final = 10_000  # files of a tree, which may be a whole disk, among which is a picture


def folder_kind(folder: Path) -> FolderKind:
    """What a folder is, by the files in it.

    Weights go before pictures, which a model may come with; a `.safetensors` of statistics,
    features or pictures is none of weights. A config.json alone makes a model of a folder only
    where there are no pictures: "model", whose weights are missing. A "damaged run" lacks a file.
    """
    if is_there(folder / SETTINGS):
        return "comparison"
    if is_there(folder / "config.yaml") and is_there(folder / "inputs.json"):
        return "run"
    if is_finetune_run(folder):
        return "fine-tuning run"
    if _lacking(folder):
        return "damaged run"
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


def _lacking(folder: Path) -> str | None:
    """What a damaged run lacks, in words; None for a folder that is none."""
    for kind, needed, others in _NEEDED:
        if all((folder / other).exists() for other in others) and not (folder / needed).exists():
            return f"a {kind} whose {needed} is missing"
    return None


def only_inside(folder: Path) -> Path:
    """The folder itself, or where it is nothing by itself the one run, set or model right in it.

    Raises CheckpointError, naming them, where there are several.
    """
    if all((folder / part).is_dir() for part in ("blobs", "snapshots")):  # of the Hub's cache
        folder = folder / "snapshots"
    kind = folder_kind(folder)
    if kind not in ("nothing", "images") or any(is_image_name(i.name) for i in folder.iterdir()):
        return folder
    inside = (item for item in sorted(folder.iterdir()) if item.name[0] != "." and item.is_dir())
    known = {inner: folder_kind(inner) for inner in inside}
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
        of = f"; mergerl report {quoted(folder)} writes its page"
        if kind == "run":
            of = f", of the set {RunDir(folder).config().checkpoints}"
        raise CheckpointError(f"{folder}: expected a set of checkpoints, found a {kind}{of}")
    empty = kind == "nothing" and folder.is_dir() and weights_in(folder)
    if empty or kind in ("images", "damaged run"):
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
        try:
            kind = folder_kind(place)
        except CheckpointError:  # a file that is no run's, such as a link to nothing
            kind = "nothing"
        if kind in ("run", "fine-tuning run", "comparison"):
            shown = place if given.is_absolute() else Path(os.path.relpath(place))
            same = absolute(place) == absolute(given)
            return Meant(shown, None if same else f"{path}: took the {kind} {shown}")
        if kind == "damaged run":
            raise RunError(f"{place}: expected a run, found {described(place)}")
    if folder.is_dir() and folder_kind(folder) != "nothing":
        raise RunError(f"{folder}: expected a run, found {described(folder)}")
    return Meant(given, None)


def result_of(run: Path) -> Path:
    """The model that a finished run, or fine-tuning run, has written; else RunError."""
    if RunDir(run).read("result.json") is None:
        raise RunError(f"{run}: the run is not finished; go on with: mergerl resume {quoted(run)}")
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
    return inside if kind == "nothing" else f"{_lacking(folder) or kind} ({inside})"


def holds_weights(file: Path) -> bool:
    """Whether a `.safetensors`, or an index, is one of weights, not of statistics or features."""
    if file.suffix.lower() != ".safetensors":
        return True  # the index of a model's shards
    try:
        names = read_header(file).tensors.keys()
    except CheckpointError:
        return True  # damaged: whoever reads it says so
    return not (names >= _MOMENTS or names & _DATA)


def _has_pictures(folder: Path) -> bool:
    names = (name for _, _, names in os.walk(folder) for name in names)
    return any(map(is_image_name, itertools.islice(names, _LOOKED_AT)))


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
    it, so that a project may be moved as a whole. Raises RunError for one that is not there, and
    for settings that name none.
    """
    key = "model" if isinstance(config, FinetuneConfig) else "checkpoints"
    if not getattr(config, key):
        raise RunError(f"{run}: the settings of the run are damaged: they name no {key}")
    before = Path(getattr(config, key))
    if checkpoints is None:
        now = _present(before, run, key, announce)
        moved = Moved(before, now)
    else:
        whole = key == "checkpoints"
        now = absolute(find_set(checkpoints).told(announce) if whole else checkpoints)
        if not now.exists():
            raise RunError(f"{now}: no such folder; expected the {key} of {run}")
        if whole and not now.is_dir():
            raise RunError(f"{now}: a file; expected the folder of the {key} of {run}")
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
    return reference_file(path)[0].exists()


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
    homes = dict.fromkeys([absolute(run), run.resolve()])  # a run may be a link to its folder
    for folder in [near for home in homes for near in (home, *home.parents[:_NEAR])]:
        for above in reversed(path.parents):
            found = folder / path.relative_to(above)
            if _exists(found):
                announce(f"{name} is no longer {path}; taken from {found}")
                return found
    if name in ("checkpoints", "model"):
        way = f"say where it is now: mergerl resume {quoted(run)} --checkpoints PATH"
    else:
        settings = "finetune.yaml" if (run / "finetune.yaml").is_file() else "config.yaml"
        way = f"put it back, or say in {run / settings} where it is now"
    raise RunError(f"{run}: cannot resume, {name} is missing: {absent(path)}; {way}")
