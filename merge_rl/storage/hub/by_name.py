"""Sets opened and sources converted, be they paths here or names of the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merge_rl.storage.checkpoints import open_checkpoints as open_folder
from merge_rl.storage.files import as_path
from merge_rl.storage.hub.cached import local_set, local_sources
from merge_rl.storage.runs import find_set

if TYPE_CHECKING:
    from merge_rl.config import ConvertConfig
    from merge_rl.interfaces import Tracker
    from merge_rl.storage.checkpoints import CheckpointSet
    from merge_rl.storage.convert import ConvertResult


def open_checkpoints(
    path: str | os.PathLike[str],
    *,
    track: str | None = None,
    select: Sequence[str] | None = None,
    distinct: bool = True,
    tracker: Tracker | None = None,
) -> CheckpointSet:
    """Open a folder of `.safetensors`, with or without a manifest, reading headers and samples.

    `track` keeps one series of a manifest, `select` the checkpoints of these names. Order: by
    (nimg, ema_std) if a manifest gives every nimg, else by the numbers in names (step_750 before
    step_2000), else the manifest's. Every file must agree with the first in tensor names, shapes
    and dtypes. Links to a file, and copies of it, count once where `distinct`; `duplicates` names
    them either way.

    The text "user/repo" or "user/repo@revision" means a set of the Hub, unless there is such a path
    here; it is downloaded to a cache, of which `tracker` hears before. Raises CheckpointError for
    anything but a set, UnknownNameError for a track or a checkpoint that it lacks, and HubError
    where it cannot be downloaded.
    """
    place = find_set(local_set(path, tracker)).path
    return open_folder(place, track=track, select=select, distinct=distinct)


def convert(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    config: ConvertConfig | None = None,
    tracker: Tracker | None = None,
    **settings: Any,
) -> ConvertResult:
    """Turn checkpoints of a training into safetensors with a `checkpoints_manifest.yaml`.

    Published files of EDM2, SiT, DiT, REPA and JiT, and what training libraries write: Lightning,
    accelerate, diffusers, torch.distributed.checkpoint, DeepSpeed, Composer, PEFT, post-hoc EMA
    folders, state dicts of any network. The files are read as data: no name in them is imported,
    looked up or called. Dtypes are kept (float16 stays float16). One piece of a file is in memory
    at a time. All files must hold the same network. Outputs that are there already, sound and made
    from the same source, are kept: an interrupted conversion is simply started again.

    Args:
        sources: files, folders of one checkpoint, or folders of several; of a folder with EDM2
            snapshots, these alone. "user/repo" means the files of a repository of the Hub, unless
            there is such a path here; they are downloaded to the Hub's cache.
        folder: where outputs and manifest go; entries of a manifest there are kept.
        config: what to take, and what the files do not say of themselves.
        tracker: hears of bytes written.
        settings: fields of `ConvertConfig` by name, in the place of `config`.

    Raises CheckpointError for files that are no such checkpoints, are damaged or hostile, hold
    NaN, or belong to another network, RunError for a folder that cannot be written, or that another
    process writes into; nothing is then left under a final name that is not whole.
    """
    from merge_rl.storage.convert import convert as convert_files

    as_path(folder, "folder")
    named: Any = sources
    several = isinstance(named, Iterable) and not isinstance(named, (str, bytes))
    given = list(named) if several else [named]
    found = [local_sources(source, tracker) for source in given]
    files, stated = [file for files, _ in found for file in files], {said for _, said in found}
    licence = stated.pop() if len(stated) == 1 else None
    if config is None and licence is not None:
        settings.setdefault("licence", licence)
    elif config is not None and config.licence is None:
        config = replace(config, licence=licence)
    return convert_files(files, folder, config=config, tracker=tracker, **settings)
