"""A model's weights as one safetensors file, or as shards with an index: written as they come."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.storage.files.atomic import atomic_path, write_json
from merge_rl.storage.files.safetensors_file import require_finite, tensor_bytes, write_header
from merge_rl.storage.files.safetensors_header import TensorInfo
from merge_rl.untrusted import load_json_mapping, read_bounded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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

    def cast(self, dtype: torch.dtype) -> WeightStream:
        """The same with floating tensors in `dtype`, each cast when it comes."""

        def target(own: torch.dtype) -> torch.dtype:
            return dtype if own.is_floating_point else own

        infos = {k: TensorInfo.of(info.shape, target(info.dtype)) for k, info in self.infos.items()}
        return WeightStream(infos, ((k, t.to(target(t.dtype))) for k, t in self.tensors))


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

    Another `stem` stands in the place of "model" in the names. Each file appears when it is
    complete. Weights that are not finite are refused (NonFiniteWeightsError). At most one tensor
    is held at a time.
    """
    shards = plan_shards(stream.infos, max_shard_bytes)
    names = [
        f"{stem}.safetensors"
        if len(shards) == 1
        else f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    tensors = iter(stream.tensors)
    for file, shard in zip(names, shards, strict=True):
        infos = {name: stream.infos[name] for name in shard}
        _write_shard(folder / file, infos, tensors, metadata)
    paths = [folder / name for name in names]
    if len(shards) > 1:
        total = sum(info.nbytes for info in stream.infos.values())
        homes = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": homes}
        paths.append(folder / f"{stem}{INDEX_SUFFIX}")
        write_json(paths[-1], index)
    return paths


def _write_shard(
    path: Path,
    infos: Mapping[str, TensorInfo],
    tensors: Iterator[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    with tensor_file(path, infos, metadata) as put:
        for name in infos:
            found, tensor = next(tensors)
            if found != name:
                raise CheckpointError(f"{path}: expected tensor {name!r}, got {found!r}")
            put(name, tensor)


@contextmanager
def tensor_file(
    path: Path, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> Iterator[Callable[[str, Tensor], None]]:
    """A safetensors file that is filled tensor by tensor: the block gets put(name, tensor).

    It appears under its name when the block ends, or not at all. Tensors of another form than
    announced are refused, as are values that are not finite.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        order = write_header(file, infos, metadata)
        position, begins = file.tell(), {}
        for name in order:
            begins[name] = position
            position += infos[name].nbytes

        def put(name: str, tensor: Tensor) -> None:
            if TensorInfo.of(tuple(tensor.shape), tensor.dtype) != infos[name]:
                raise CheckpointError(f"{path}: expected {infos[name]} for tensor {name!r}")
            require_finite(path, name, tensor)
            file.seek(begins.pop(name))
            file.write(tensor_bytes(tensor))

        yield put
        if begins:
            raise CheckpointError(f"{path}: tensor {next(iter(begins))!r} did not come")


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

    An index is data from anywhere: a shard outside of its folder is refused.
    """
    homes = load_json_mapping(read_bounded(path), str(path)).get("weight_map")
    if not isinstance(homes, dict) or not homes:
        raise CheckpointError(f"{path}: expected a weight_map of tensors to files")
    for file in homes.values():
        plain = isinstance(file, str) and PurePosixPath(file).name == file and "\\" not in file
        if not plain or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path}: expected names of .safetensors beside it, got {file!r}")
    return {name: path.parent / file for name, file in homes.items()}


def shard_pattern(stem: str = MODEL_STEM) -> str:
    """What shards are called."""
    return f"{stem}-*-of-*.safetensors"


LAYOUTS: Final = tuple(
    name
    for stem in (MODEL_STEM, DIFFUSERS_STEM)
    for name in (f"{stem}.safetensors", f"{stem}{INDEX_SUFFIX}", shard_pattern(stem))
)
"""Names of all files that a model's weights are written to."""
