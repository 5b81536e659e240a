"""Published files to safetensors with a manifest: data only, nothing in them is executed."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Final

from merge_rl.config import ConvertConfig, from_mapping, yaml_text
from merge_rl.errors import CheckpointError, NonFiniteWeightsError
from merge_rl.interfaces import Tracker
from merge_rl.progress import tracker_of
from merge_rl.storage.checkpoints import MANIFEST_NAME, write_manifest
from merge_rl.storage.convert.contents import Hints, infos_of
from merge_rl.storage.convert.inputs import list_files
from merge_rl.storage.convert.plan import ORIGIN_KEY, ConversionFile, ConversionPlan, make_plan
from merge_rl.storage.convert.sources import files_of
from merge_rl.storage.files import (
    atomic_path,
    count_nonfinite,
    followed,
    locked,
    read_header,
    require_hash,
    sha256_file,
    write_header,
)
from merge_rl.storage.pickles import TensorRef

MAX_WORKERS = 4


@dataclass(frozen=True, kw_only=True)
class ConvertResult:
    """Files that a conversion wrote, or found there and verified.

    Attributes:
        written: safetensors of this conversion.
        skipped: safetensors that were there already, from the same source, with the recorded hash.
        manifest: the `checkpoints_manifest.yaml`.
        deleted: sources that were removed.
    """

    written: tuple[Path, ...]
    skipped: tuple[Path, ...]
    manifest: Path
    deleted: tuple[Path, ...] = ()


def convert(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    config: ConvertConfig | None = None,
    tracker: Tracker | None = None,
    **settings: Any,
) -> ConvertResult:
    """`merge_rl.convert`, of files and folders that lie here."""
    if config is not None and settings:
        raise TypeError(f"convert() takes config or {sorted(settings)[0]}=, not both")
    config = config or from_mapping(ConvertConfig, settings)
    tracker = tracker_of(tracker, progress=False)
    files, repeated = list_files(sources)
    hints = Hints(**{item.name: getattr(config, item.name) for item in fields(Hints)})
    with locked(folder):  # which the manifest of the plan is read under, too
        plan = make_plan(
            files, Path(folder), config.weights, name=config.name, licence=config.licence,
            hints=hints,
        )  # fmt: skip
        yaml_text([job.file for job in plan.jobs])  # names that no manifest holds are refused here
        for kind, texts in (("warning", plan.assumed), ("note", [*repeated, *plan.notes])):
            for text in texts:
                tracker.event({"kind": kind, "text": text})
        tracker.phase("convert", sum(job.found.nbytes for job in plan.jobs))
        workers = config.workers or min(MAX_WORKERS, os.cpu_count() or 1)
        done = _run(plan, workers, tracker, config.delete_source)
    target = {job: plan.folder / job.file for job in plan.jobs}
    return ConvertResult(
        written=tuple(target[job] for job in plan.jobs if done[job].written),
        skipped=tuple(target[job] for job in plan.jobs if not done[job].written),
        manifest=plan.folder / MANIFEST_NAME,
        deleted=_delete(plan) if config.delete_source else (),
    )


@dataclass(frozen=True)
class _Done:
    sha256: str
    written: bool


class _Progress:
    """Adds up the progress of several threads, and stops them."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker, self._lock, self.stopped = tracker, threading.Lock(), False

    def __call__(self, count: int) -> None:
        if self.stopped:
            raise CheckpointError("the conversion was stopped")
        with self._lock:
            self._tracker.advance(count)


def _run(
    plan: ConversionPlan, workers: int, tracker: Tracker, verify: bool
) -> dict[ConversionFile, _Done]:
    """Do all jobs; the manifest grows with every finished one, so that they can be taken up."""
    done: dict[ConversionFile, _Done] = {}
    progress = _Progress(tracker)
    with ThreadPoolExecutor(max(1, min(workers, len(plan.jobs)))) as pool:
        futures = {pool.submit(_do, plan, job, progress, verify): job for job in plan.jobs}
        try:
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                _write_manifest(plan, {job: item.sha256 for job, item in done.items()})
        except BaseException:
            progress.stopped = True
            pool.shutdown(wait=True, cancel_futures=True)
            for folder in {(plan.folder / job.file).parent for job in plan.jobs} - {plan.folder}:
                with suppress(OSError):  # what was made for outputs that did not come
                    folder.rmdir()
            raise
    return done


def _write_manifest(plan: ConversionPlan, hashes: Mapping[ConversionFile, str]) -> None:
    try:
        write_manifest(plan.folder / MANIFEST_NAME, plan.manifest(hashes))
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from None


def _do(plan: ConversionPlan, job: ConversionFile, progress: _Progress, verify: bool) -> _Done:
    path, source = plan.folder / job.file, job.found.path
    recorded = plan.recorded(job)
    if path.exists() and path.samefile(source):  # a .safetensors in its place already
        if read_header(path).tensors.keys() != job.found.tensors.keys():
            raise CheckpointError(
                f"{path}: its tensors are to get other names; convert it into another folder"
            )
        check_finite(job.found.tensors, progress, source)
        return _Done(sha256_file(path), written=False)
    if path.exists() and _is_done(job, path, recorded):
        progress(job.found.nbytes)
        return _Done(str(recorded), written=False)
    sha256 = write_stream(path, job.found.tensors, job.metadata, progress, source)
    if verify:
        require_hash(path, sha256_file(path), sha256)
    return _Done(sha256, written=True)


def _is_done(job: ConversionFile, path: Path, recorded: str | None) -> bool:
    """Whether an output is whole and what would be written; CheckpointError if it is not ours."""
    try:
        metadata = read_header(path).metadata
    except CheckpointError:
        metadata = {}
    origin = metadata.get(ORIGIN_KEY)
    sound = recorded is not None and sha256_file(path) == recorded
    # A file that the manifest lists may be made again where it is damaged, even in its header.
    damaged = recorded is not None and not sound
    if not (origin == job.metadata[ORIGIN_KEY] if origin else damaged):
        raise CheckpointError(
            f"{path}: exists already and was not made from this {job.found.path.name}; move it away"
            " or choose another folder"
        )
    return sound and dict(metadata) == dict(job.metadata)


def _delete(plan: ConversionPlan) -> tuple[Path, ...]:
    outputs = {followed(plan.folder / job.file) for job in plan.jobs}
    removed = []
    for path in dict.fromkeys(part for job in plan.jobs for part in files_of(job.found.path)):
        if followed(path) not in outputs:
            try:
                path.unlink()
            except OSError as error:
                why = error.strerror or error
                raise CheckpointError(f"{path}: converted, but cannot be removed: {why}") from None
            removed.append(path)
    return tuple(removed)


PIECE_BYTES: Final = 2**20  # fits the cache of a core: hashing and checking run over it


def write_stream(
    path: Path,
    tensors: Mapping[str, TensorRef],
    metadata: Mapping[str, str],
    advance: Callable[[int], None],
    source: Path,
) -> str:
    """Write a safetensors file atomically from tensors elsewhere; its SHA-256.

    Memory: a few pieces of 1 MiB, whatever the size. `advance` hears of bytes done. The types stay
    as they are. Raises NonFiniteWeightsError rather than leave a file of NaN.
    """
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            return _write(file, tensors, metadata, advance, source)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from None


def check_finite(
    tensors: Mapping[str, TensorRef], advance: Callable[[int], None], source: Path
) -> None:
    """Read tensors and do nothing else; NonFiniteWeightsError if one holds NaN or infinity."""
    for name, tensor in tensors.items():
        for piece in _finite_pieces(name, tensor, source):
            advance(len(piece))


def _write(
    file: BinaryIO,
    tensors: Mapping[str, TensorRef],
    metadata: Mapping[str, str],
    advance: Callable[[int], None],
    source: Path,
) -> str:
    header = io.BytesIO()
    order = write_header(header, infos_of(tensors), metadata)
    digest = hashlib.sha256(header.getvalue())
    file.write(header.getvalue())
    # Hashing takes about as long as writing, and both let other threads run.
    with ThreadPoolExecutor(1) as pool:
        hashed: Future[None] | None = None
        for name in order:
            for piece in _finite_pieces(name, tensors[name], source):
                if hashed is not None:
                    hashed.result()
                hashed = pool.submit(digest.update, piece)
                file.write(piece)
                advance(len(piece))
        if hashed is not None:
            hashed.result()
    return digest.hexdigest()


def _finite_pieces(name: str, tensor: TensorRef, source: Path) -> Iterator[bytes]:
    code = tensor.info.code
    for piece in tensor.pieces(PIECE_BYTES):
        count = count_nonfinite(piece, code)
        if count:
            raise NonFiniteWeightsError(
                f"{source}: tensor {name} holds NaN or infinity in at least {count} of its values"
            )
        yield piece
