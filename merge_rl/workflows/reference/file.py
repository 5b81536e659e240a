"""Reference statistics on disk: our safetensors, and the formats of other projects.

The header of ours says which extractor made the features, with which weights and preprocessing,
from how many images of which resolution.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from torch import Tensor

from merge_rl.config import whole_number
from merge_rl.core.distances.statistics import FeatureStats
from merge_rl.errors import StatisticsError
from merge_rl.storage.checkpoints import ModelFile, open_tensors
from merge_rl.storage.files import (
    ArrayInfo,
    image_key,
    instead_of_weights,
    is_image_name,
    npz_arrays,
    read_header,
    reference_file,
    save_tensors,
)
from merge_rl.storage.pickles import TensorRef, read_data
from merge_rl.storage.runs import described, folder_kind, only_inside
from merge_rl.untrusted import open_file
from merge_rl.workflows.reference.features import (
    FEATURE_KEYS,
    FEATURES_FORMAT,
    TORCH_SUFFIXES,
    feature_key,
    load_features,
    told,
    torch_features,
)
from merge_rl.workflows.reference.formats import (
    MOMENTS,
    Reference,
    edm2_entries,
    from_features,
    from_moments,
    read_edm2,
    read_npz,
    sound_moments,
)

FORMAT: Final = "merge_rl.reference.v1"
_TENSORS: Final = ({"mu", "sigma"}, {"mu", "sigma", "features"})


def save_reference(
    path: str | os.PathLike[str],
    stats: FeatureStats,
    *,
    extractor: str,
    extractor_sha256: str | None = None,
    preprocessing: str = "",
    resolution: int | None = None,
    source: str = "",
    features: Tensor | None = None,
    labels: Tensor | None = None,
) -> None:
    """Write moments as float64 "mu" (D,) and "sigma" (D, D), atomically.

    `features` (M, D), and their `labels` (M,), of some or all of the images are stored beside them
    for metrics that compare samples, not moments.
    """
    metadata = {
        "format": FORMAT,
        "count": str(stats.count),
        "extractor": extractor,
        "extractor_sha256": extractor_sha256 or "",
        "resolution": str(resolution or ""),
        "source": source,
    }
    if preprocessing:
        metadata["preprocessing"] = preprocessing
    tensors = {"mu": stats.mean, "sigma": stats.cov}
    if features is not None:
        tensors["features"] = features.float()
    if features is not None and labels is not None:
        tensors["labels"] = labels.long()
    save_tensors(path, tensors, metadata)


def load_reference(
    path: str | os.PathLike[str],
    *,
    entry: str | None = None,
    extractor: str | None = None,
    sha256: str | None = None,
    dim: int | None = None,
) -> Reference:
    """Statistics from a file of any known format, checked.

    Args:
        path: `.safetensors` of ours (statistics or saved features), EDM2 `.pkl`, `.npz` with mu
            and sigma (pytorch-fid, clean-fid, ADM) or reps (dgm-eval), mu and sigma in any of the
            other kinds of file (torch-fidelity), or other features that `load_features` takes.
        entry: of an EDM2 file with several, "fid" or "fd_dinov2"; PATH#ENTRY says the same.
        extractor, sha256, dim: name, weights' hash and dimension of the extractor in use; the
            statistics must be of the same, as far as the file says.

    StatisticsError for moments that no two or more samples have (NaN, a covariance that is not
    symmetric), for other content, and for another extractor or dimension.
    """
    file, named = reference_file(path)
    if file.suffix.lower() == ".pkl":
        loaded = read_edm2(file, entry=entry or named, extractor=extractor, dim=dim)
    elif file.suffix.lower() == ".npz":
        loaded = read_npz(file)
    elif file.suffix.lower() in (".npy", *TORCH_SUFFIXES):
        loaded = _from_arrays(file)
    elif file.suffix.lower() in ("", ".safetensors") and not file.is_dir():
        loaded = _from_safetensors(file)
    else:
        raise _no_statistics(file)
    if extractor is not None:
        loaded.require_extractor(extractor, sha256, path, dim)
    return loaded


def _no_statistics(file: Path) -> StatisticsError:
    """The refusal of what may hold no statistics, by its name or as a folder."""
    if not file.is_dir():
        open_file(file, StatisticsError).close()  # what is none at all is called so
    found = described(file) if file.is_dir() else f"a file with the ending {file.suffix!r}"
    pictures = file.suffix.lower() == ".zip" or is_image_name(file.name) or "images" in found
    made = "; `mergerl reference` makes them of images" if pictures else ""
    known = ", ".join((".safetensors", ".pkl", ".npz", ".npy", *TORCH_SUFFIXES))
    return StatisticsError(
        f"{file}: expected statistics or features as a file of {known}, found {found}{made}"
    )


def load_all_references(path: str | os.PathLike[str]) -> dict[str, Reference]:
    """Every entry of a file of statistics, by name; "" where there is but one."""
    file, named = reference_file(path)
    if file.suffix.lower() != ".pkl" or named is not None:
        return {named or "": load_reference(path)}
    return {entry: load_reference(file, entry=entry) for entry in edm2_entries(file)[1]}


def _from_arrays(path: Path) -> Reference:
    """A .npy, or what torch.save wrote: features, or moments by their names."""
    data = read_data(path) if path.suffix.lower() in TORCH_SUFFIXES else None
    if not isinstance(data, dict) or not data.keys() >= MOMENTS:
        return from_features(load_features(path), path)
    beside = torch_features(data)[0] is not None
    return from_moments(path, data, map(str, data), load_features(path) if beside else None)


def _from_safetensors(path: Path) -> Reference:
    file = open_tensors(path)
    said = file.metadata.get("format", "")
    ours = said.startswith(FORMAT.partition(".")[0])
    if not ours and file.weights.keys() >= MOMENTS:
        beside = load_features(path) if file.weights.keys() & set(FEATURE_KEYS) else None
        return from_moments(path, file.weights, file.weights, beside)
    if said == FEATURES_FORMAT or (said != FORMAT and file.weights.keys() & set(FEATURE_KEYS)):
        return from_features(load_features(path), path)
    if said != FORMAT and ours:
        raise StatisticsError(f"{path}: expected format {FORMAT!r}, found {said!r:.60}")
    found = set(file.weights) - {"labels"}
    if said != FORMAT or found not in _TENSORS:
        raise StatisticsError(f"{path}: expected reference statistics, found other tensors")
    return _from_tensors(file, path)


def _from_tensors(file: ModelFile, path: Path) -> Reference:
    metadata, tensors = file.metadata, file.weights
    stats = sound_moments(_count(metadata, path), tensors["mu"], tensors["sigma"], str(path))
    features, labels = tensors.get("features"), tensors.get("labels")
    if features is not None and (features.ndim != 2 or features.shape[1] != stats.dim):
        raise StatisticsError(
            f"{path}: expected features (M, {stats.dim}), got {tuple(features.shape)}"
        )
    fits = features is not None and labels is not None and labels.shape == features.shape[:1]
    if labels is not None and (not fits or labels.is_floating_point()):
        raise StatisticsError(
            f"{path}: expected a whole number, the label, for each row of features"
        )
    return Reference(
        stats=stats,
        extractor=metadata.get("extractor", ""),
        extractor_sha256=metadata.get("extractor_sha256") or None,
        preprocessing=metadata.get("preprocessing", ""),
        resolution=whole_number(metadata.get("resolution")),
        source=metadata.get("source", ""),
        features=None if features is None else features.float(),
        labels=None if labels is None else labels.long(),
    )


def _count(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> int:
    said = metadata.get("count", "")
    count = whole_number(said)
    if count is None or count < 0:
        raise StatisticsError(f"{path}: expected the number of images, found count {said!r:.60}")
    return count


Kind = Literal["model", "images", "features", "reference"]


def kind_of(path: str | os.PathLike[str]) -> Kind:
    """The most likely kind of a path; whoever reads it checks and says what is wrong.

    See `folder_kind` for folders: all but pictures stands for a model.
    """
    file, entry = reference_file(path)
    if file.is_dir():
        folder = only_inside(file)
        kind = folder_kind(folder)
        if kind == "nothing" and (hint := instead_of_weights(folder)):
            expected = "expected a model, a set, a run, images or features"
            raise StatisticsError(f"{file}: {expected}, found {described(folder)}{hint}")
        return "images" if kind in ("images", "nothing") else "model"
    if entry is not None:
        return "reference"
    suffix = file.suffix.lower()
    if suffix == ".npz":
        return _of_arrays(npz_arrays(file), file)
    if suffix == ".safetensors" and file.is_file():
        return _of_names(set(read_header(file).tensors)) or "model"
    if suffix == ".npy":
        return "features"
    if suffix in TORCH_SUFFIXES and file.is_file():
        return _of_saved(read_data(file), file)
    return "images" if suffix == ".zip" else "model"


def kind_to_score(path: str | os.PathLike[str]) -> Kind:
    """What a path holds, see `kind_of`; StatisticsError for statistics, which are no samples."""
    kind = kind_of(path)
    if kind == "reference":
        raise StatisticsError(
            f"{path} holds statistics; expected a model, images, or features to compare"
        )
    return kind


def _of_saved(data: object, file: Path) -> Kind:
    if isinstance(data, dict) and data.keys() >= MOMENTS:
        return "reference"
    if torch_features(data)[0] is not None:
        return "features"
    if isinstance(data, dict) and any(
        isinstance(item, (TensorRef, dict)) for item in data.values()
    ):
        return "model"
    raise StatisticsError(
        f"{file}: expected features (N, D) of a floating type, alone or by name, or weights, "
        f"found {told(data)}"
    )


def _of_names(names: set[str]) -> Kind | None:
    # ADM's statistics come with images, and ours may come with features.
    if names >= MOMENTS:
        return "reference"
    return "features" if names & set(FEATURE_KEYS) else None


def _of_arrays(arrays: Mapping[str, ArrayInfo], file: Path) -> Kind:
    pictures: Kind | None = "images" if image_key(arrays) else None
    alone: Kind | None = "features" if feature_key(arrays) else None
    kind = _of_names(set(arrays)) or alone or pictures
    if kind is None:
        listed = ", ".join(f"{name!r} {info}" for name, info in arrays.items())
        raise StatisticsError(
            f"{file}: expected images ('images' or 'arr_0'), features ('features' or 'reps') or "
            f"statistics ('mu' and 'sigma'), found {listed}"
        )
    return kind
