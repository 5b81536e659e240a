"""A model's weights as one safetensors file, or as shards with an index: written as they come."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple, TypeAlias

import numpy as np

from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.storage.files.atomic import atomic_path, write_json
from merge_rl.storage.files.safetensors_file import require_finite, tensor_bytes, write_header
from merge_rl.storage.files.safetensors_header import TensorInfo
from merge_rl.untrusted import load_json_mapping, read_bounded

if TYPE_CHECKING:
    from torch import Tensor

Buffer: TypeAlias = memoryview | np.ndarray[Any, np.dtype[Any]]

MODEL_STEM: Final = "model"
DIFFUSERS_STEM: Final = "diffusion_pytorch_model"  # what diffusers' from_pretrained looks for
MODEL_NAME: Final = f"{MODEL_STEM}.safetensors"
INDEX_SUFFIX: Final = ".safetensors.index.json"
INDEX_NAME: Final = f"{MODEL_STEM}{INDEX_SUFFIX}"
MAX_SHARD_BYTES: Final = 5 * 10**9  # what the Hub's own libraries split at


@dataclass(frozen=True)
class WeightStream:
    """Tensors of a model that come one by one, each once, with shapes and types known before."""

    infos: Mapping[str, TensorInfo]
    tensors: Iterable[tuple[str, Tensor]]  # in the order of infos

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> WeightStream:
        """A state dict as a stream."""
        infos = {name: TensorInfo.of(tuple(t.shape), t.dtype) for name, t in weights.items()}
        return cls(infos, weights.items())

    def cast(self, code: str) -> WeightStream:
        """The same with floating tensors in the type of that name, each cast when it comes."""
        infos = {name: info.cast(code) for name, info in self.infos.items()}
        return WeightStream(infos, ((k, t.to(infos[k].dtype)) for k, t in self.tensors))


def plan_shards(infos: Mapping[str, TensorInfo], max_bytes: int) -> list[list[str]]:
    """Names in the order given, cut where a shard would exceed `max_bytes`.

    A tensor that is larger by itself makes a shard of its own.
    """
    if max_bytes < 1:
        raise ConfigError(f"expected shards of at least 1 byte, got {max_bytes}")
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.nbytes
    return shards


def write_weights(
    folder: Path,
    stream: WeightStream,
    metadata: Mapping[str, str],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    stem: str = MODEL_STEM,
) -> list[Path]:
    """Write `model.safetensors`, or shards and `model.safetensors.index.json`; the paths written.

    Another `stem` stands in the place of "model" in the names. Weights that are not finite are
    refused (NonFiniteWeightsError). At most one tensor is held at a time.
    """
    tensors = iter(stream.tensors)
    with weights_files(
        folder, stream.infos, metadata, max_shard_bytes=max_shard_bytes, stem=stem
    ) as files:
        for name in stream.infos:
            found, tensor = next(tensors)
            file = files.homes[name]
            if found != name:
                raise CheckpointError(f"{file.path}: expected tensor {name!r}, got {found!r}")
            file.put(name, tensor)
    return files.paths


class WeightsFiles(NamedTuple):
    """Files of one model that are being filled."""

    homes: Mapping[str, TensorFile]  # tensor -> the file that it goes to
    paths: list[Path]

    def write(self, name: str, begin: int, data: Buffer) -> None:
        """See `TensorFile.write`."""
        self.homes[name].write(name, begin, data)

    def describe(self, metadata: Mapping[str, str]) -> None:
        """See `TensorFile.describe`; of every file."""
        for file in dict.fromkeys(self.homes.values()):
            file.describe(metadata)


@contextmanager
def weights_files(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    stem: str = MODEL_STEM,
) -> Iterator[WeightsFiles]:
    """`model.safetensors`, or shards, which the block fills; with them the index of the shards.

    Another `stem` stands in the place of "model" in the names. They appear when the block ends, or
    not at all.
    """
    shards = plan_shards(infos, max_shard_bytes)
    names = [
        f"{stem}.safetensors"
        if len(shards) == 1
        else f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    paths = [folder / name for name in names]
    with ExitStack() as stack:
        homes: dict[str, TensorFile] = {}
        for path, shard in zip(paths, shards, strict=True):
            own = {name: infos[name] for name in shard}
            file = stack.enter_context(tensor_file(path, own, metadata))
            homes |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            paths.append(folder / f"{stem}{INDEX_SUFFIX}")
        yield WeightsFiles(homes, paths)
    if len(shards) > 1:
        total = sum(info.nbytes for info in infos.values())
        places = {name: homes[name].path.name for name in infos}
        write_json(paths[-1], {"metadata": {"total_size": total}, "weight_map": places})


class TensorFile:
    """A safetensors file that is being filled, by any number of threads; see `tensor_file`."""

    def __init__(
        self,
        path: Path,
        file: BinaryIO,
        infos: Mapping[str, TensorInfo],
        metadata: Mapping[str, str],
    ) -> None:
        self.path, self._file, self._infos = path, file, infos
        order = write_header(file, infos, metadata)
        self._start = position = file.tell()
        file.flush()
        self._begins: dict[str, int] = {}
        for name in order:
            self._begins[name] = position
            position += infos[name].nbytes
        self._left = {name: info.nbytes for name, info in infos.items()}
        self._lock = threading.Lock()

    def put(self, name: str, tensor: Tensor) -> None:
        """A whole tensor; one of another form than announced is refused, as is what is not finite.

        Raises CheckpointError and NonFiniteWeightsError.
        """
        if TensorInfo.of(tuple(tensor.shape), tensor.dtype) != self._infos[name]:
            raise CheckpointError(f"{self.path}: expected {self._infos[name]} for tensor {name!r}")
        require_finite(self.path, name, tensor)
        self.write(name, 0, tensor_bytes(tensor))

    def write(self, name: str, begin: int, data: Buffer) -> None:
        """Bytes of a tensor from byte `begin` on; each once."""
        view = (data if isinstance(data, memoryview) else data.data).cast("B")
        with self._lock:
            self._left[name] -= len(view)
        position = self._begins[name] + begin
        while len(view):
            count = os.pwrite(self._file.fileno(), view, position)
            view, position = view[count:], position + count

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Other metadata, of as many bytes as what was announced."""
        self._file.seek(0)
        write_header(self._file, self._infos, metadata)
        if self._file.tell() != self._start:
            raise ValueError(f"{self.path}: expected metadata of as many bytes as announced")
        self._file.flush()

    def require_whole(self) -> None:
        """CheckpointError unless every byte of every tensor came."""
        missing = [name for name, count in self._left.items() if count]
        if missing:
            raise CheckpointError(f"{self.path}: tensor {missing[0]!r} did not come")


@contextmanager
def tensor_file(
    path: Path, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> Iterator[TensorFile]:
    """A safetensors file for the block to fill: under its name when the block ends, or not at all.

    Raises CheckpointError where tensors are missing by then.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        filled = TensorFile(path, file, infos, metadata)
        yield filled
        filled.require_whole()


def stem_in(folder: Path) -> str:
    """What the weights of a model folder are called: as diffusers calls them, or as others do."""
    names = (f"{DIFFUSERS_STEM}.safetensors", f"{DIFFUSERS_STEM}{INDEX_SUFFIX}")
    library = any(os.path.lexists(folder / name) for name in names)
    return DIFFUSERS_STEM if library else MODEL_STEM


def read_index(folder: Path, stem: str = MODEL_STEM) -> dict[str, Path] | None:
    """Tensor name -> shard, as a model folder's index says; None if there is no index."""
    path = folder / f"{stem}{INDEX_SUFFIX}"
    return parse_index(path) if os.path.lexists(path) else None


def parse_index(path: Path) -> dict[str, Path]:
    """Tensor name -> shard, as an index says.

    An index is data from anywhere: a shard outside of its folder is refused. Shards are of the kind
    that its own name says, "model.safetensors.index.json" or "pytorch_model.bin.index.json".
    """
    kind = ".bin" if path.name.endswith(".bin.index.json") else ".safetensors"
    homes = load_json_mapping(read_bounded(path), str(path)).get("weight_map")
    if not isinstance(homes, dict) or not homes:
        raise CheckpointError(f"{path}: expected a weight_map of tensors to files")
    for file in homes.values():
        plain = isinstance(file, str) and PurePosixPath(file).name == file and "\\" not in file
        if not plain or not file.endswith(kind):
            raise CheckpointError(f"{path}: expected names of {kind} beside it, got {file!r}")
    return {name: path.parent / file for name, file in homes.items()}


def is_shard_name(name: str) -> bool:
    """Whether a name is that of a part of a model, which its index lists."""
    return re.search(r"-[0-9]{5}-of-[0-9]{5}\.(?:bin|safetensors)$", name) is not None


def shard_pattern(stem: str = MODEL_STEM) -> str:
    """What shards are called."""
    return f"{stem}-*-of-*.safetensors"


LAYOUTS: Final = tuple(
    name
    for stem in (MODEL_STEM, DIFFUSERS_STEM)
    for name in (f"{stem}.safetensors", f"{stem}{INDEX_SUFFIX}", shard_pattern(stem))
)
"""Names of all files that a model's weights are written to."""
