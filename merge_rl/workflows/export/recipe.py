"""Merge recipes (merge.yaml): what it takes to make a merge again, written and read back."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from merge_rl.config import SamplerConfig, from_mapping, real_number, whole_number
from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.storage.files import MAX_SHARD_BYTES, network_name, weights_stem
from merge_rl.storage.hub import GUIDE_FOLDER, RECIPE_NAME, local_recipe
from merge_rl.storage.runs import described
from merge_rl.untrusted import describe, load_yaml
from merge_rl.version import __version__
from merge_rl.workflows.assembly import find_model, guidance_text

RECIPE_VERSION: Final = 1
TOOL: Final = f"merge_rl {__version__}"


def merge_recipe(
    checkpoints: CheckpointSet,
    coefficients: npt.ArrayLike,
    *,
    base: int,
    groups: Mapping[str, str],
    frozen: Sequence[str] = (),
    licence: str | None = None,
    tool: str = TOOL,
    digests: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What it takes to make the merge again: sources with hashes, coefficients, groups, base.

    `frozen` are the patterns of the tensors that stay as in the base; `digests` stand for the
    hashes of the sources where those are not known yet.
    """
    rows = coefficient_rows(coefficients, len(checkpoints))
    if digests is None:
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(checkpoints.sha256, range(len(checkpoints))))
    return {
        "version": RECIPE_VERSION,
        "tool": tool,
        "base": checkpoints.names[base],
        "groups": dict(groups),
        **({"frozen": list(frozen)} if frozen else {}),
        "licence": licence,
        "sources": [
            {
                "name": name,
                "file": checkpoints.entries[i].file,
                "source": checkpoints.entries[i].source,
                "nimg": checkpoints.nimg[i],
                "ema_std": checkpoints.ema_std[i],
                **({"ema_gamma": gamma} if (gamma := checkpoints.entries[i].ema_gamma) else {}),
                "sha256": digests[i],
                "coefficients": [row[i] for row in rows],
            }
            for i, name in enumerate(checkpoints.names)
        ],
    }


def coefficient_rows(coefficients: npt.ArrayLike, count: int) -> list[list[float]]:
    """(G, K) as float64 of one row a group; `count` is K. Takes tensors too."""
    rows: list[list[float]] = np.asarray(coefficients, np.float64).reshape(-1, count).tolist()
    return rows


def sampled(sampler: SamplerConfig) -> str:
    """How a merge with a tuned sampler is to be sampled, for the card."""
    text = guidance_text(sampler)
    return f" To be sampled with {text}, as `sampler` in `merge.yaml` says."


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings without absolute paths: what was used, not where it lay."""
    return {
        key: without_places(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if not (isinstance(value, str) and Path(value).is_absolute())
    }


def recipe_metadata(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of the merged file, text only: the tool, and the sources with their hashes.

    A function of the parts of the recipe that say how to merge: how its coefficients were found
    does not change the file.
    """
    sources = [{k: s[k] for k in ("name", "sha256", "coefficients")} for s in recipe["sources"]]
    how = {key: recipe[key] for key in ("base", "groups", "frozen") if key in recipe}
    how["sources"] = sources
    return {"format": "pt", "tool": recipe["tool"], "merge": json.dumps(how, sort_keys=True)}


MERGEKIT_NAME: Final = "mergekit.yaml"


def mergekit_document(recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """The recipe as a configuration of mergekit's method "linear"; None where it is none.

    That is a weighted sum of all tensors: expressible are merges with one coefficient a checkpoint
    that sum to 1 (buffers that all checkpoints share stay as they are then) and with nothing
    frozen. A model is called by its folder in the set, or by its file without the ending.
    """
    sources = recipe.get("sources")
    if not sources or recipe.get("groups") or recipe.get("frozen"):
        return None
    weights = [source["coefficients"] for source in sources]
    if any(len(row) != 1 for row in weights):
        return None
    if abs(math.fsum(row[0] for row in weights) - 1) > 1e-6:
        return None
    models = [
        {"model": _place(PurePosixPath(source["file"])), "parameters": {"weight": row[0]}}
        for source, row in zip(sources, weights, strict=True)
        if row[0] != 0
    ]
    return {
        "merge_method": "linear", "models": models, "parameters": {"normalize": False},
        "dtype": recipe.get("dtype", "float32"),
    }  # fmt: skip


def _place(file: PurePosixPath) -> str:
    stem = weights_stem(file.name)
    return str(file.with_name(stem) if network_name(file) == stem else file.parent)


class Recipe:
    """A merge.yaml: coefficients by checkpoint name, with the hashes of the sources."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = local_recipe(path)  # of the Hub, where it is the name of a merge there
        if self.path.is_dir():  # a merged model, or the run that made it
            merge = find_model(self.path).path
            if not merge.is_dir():
                expected = f"a {RECIPE_NAME}, or the merge that it lies with"
                raise ConfigError(f"{self.path}: expected {expected}, found {described(self.path)}")
            self.path = merge / RECIPE_NAME
        document = load_yaml(self.path)
        if not isinstance(document, dict) or not isinstance(document.get("sources"), list):
            raise ConfigError(f"{self.path}: expected a merge recipe with a list of sources")
        if whole_number(document.get("version", RECIPE_VERSION)) != RECIPE_VERSION:
            found = describe(document["version"])
            raise ConfigError(f"{self.path}, version: expected {RECIPE_VERSION}, found {found}")
        if not document["sources"]:
            raise ConfigError(f"{self.path}: no sources, expected at least one checkpoint")
        groups = document.get("groups") or {}
        if not isinstance(groups, dict) or not all(isinstance(v, str) for v in groups.values()):
            raise ConfigError(f"{self.path}, groups: expected a mapping of text, found {groups!r}")
        self.groups: dict[str, str] = {str(name): pattern for name, pattern in groups.items()}
        frozen = document.get("frozen") or []
        if not isinstance(frozen, list) or not all(isinstance(v, str) for v in frozen):
            raise ConfigError(f"{self.path}, frozen: expected a list of text, found {frozen!r}")
        self.frozen: list[str] = frozen
        self.base = str(document.get("base", "newest"))
        self.dtype = str(document.get("dtype", "float32"))
        self.tool = str(document.get("tool", TOOL))
        licence = document.get("licence")
        self.licence = None if licence is None else str(licence)
        self.max_shard_bytes = self._size(document.get("max_shard_bytes", MAX_SHARD_BYTES))
        self.sources = [self._source(i, item) for i, item in enumerate(document["sources"])]
        search = document.get("search")
        named = search.get("network") if isinstance(search, dict) else None
        self.network = named if isinstance(named, str) else None  # of the user's who searched
        said = document.get("sampler")
        self.sampler: Mapping[str, Any] | None = said  # where a search has tuned it
        if said is not None:
            self.tuned = from_mapping(SamplerConfig, said, f"{self.path}, sampler")

    tuned = SamplerConfig()

    @property
    def guide(self) -> Path | None:
        """The merge that guides this one, beside the recipe; CheckpointError without it."""
        if self.tuned.guide != GUIDE_FOLDER:
            return None
        folder = self.path.parent / GUIDE_FOLDER
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; expected the guide of the recipe")
        return folder

    @property
    def names(self) -> list[str]:
        """Names of the checkpoints that are merged."""
        return [name for name, _, _ in self.sources]

    @property
    def how(self) -> str:
        """A sentence for the card: what was made, and how it is to be sampled."""
        return "Made again from a recipe." + ("" if self.sampler is None else sampled(self.tuned))

    def _size(self, value: object) -> int:
        size = whole_number(value)
        if size is None or size < 1:
            raise ConfigError(
                f"{self.path}, max_shard_bytes: expected a number of bytes, found {describe(value)}"
            )
        return size

    def _source(self, index: int, item: object) -> tuple[str, str | None, list[float]]:
        source = item if isinstance(item, dict) else {}
        name, digest, values = (source.get(key) for key in ("name", "sha256", "coefficients"))
        listed = values if isinstance(values, list) else []
        numbers = [real_number(value) for value in listed]
        finite = [number is not None and math.isfinite(number) for number in numbers]
        odd = [value for value, fits in zip(listed, finite, strict=True) if not fits]
        odd += [name] if not isinstance(name, str) else [] if isinstance(values, list) else [values]
        odd += [] if isinstance(digest, (str, type(None))) else [digest]
        if odd:
            what = describe(odd[0] if source else item)
            raise ConfigError(
                f"{self.path}, sources[{index}]: expected name and coefficients of each source, "
                f"found {what}"
            )
        return str(name), digest and str(digest).lower(), [v for v in numbers if v is not None]

    def coefficients(self, checkpoints: CheckpointSet) -> npt.NDArray[np.float64]:
        """(G, K) in the set's order, after checking the names of the sources.

        Their hashes are demanded of the set, so that another file is refused when it is read.
        """
        rows: dict[str, list[float]] = {}
        for name, digest, values in self.sources:
            if name not in checkpoints.names:
                raise CheckpointError(
                    f"{checkpoints.folder}: the recipe needs checkpoint {name!r}, which is missing"
                )
            if digest is not None:
                index, told = checkpoints.names.index(name), partial(_other_source, name, digest)
                checkpoints.hashes.demand(index, digest, told)
            if name in rows:
                raise ConfigError(f"{self.path}: {name!r} is listed twice")
            rows[name] = values
        groups = {len(values) for values in rows.values()}
        if len(groups) != 1:
            raise ConfigError(f"{self.path}: sources have different numbers of coefficients")
        zeros = [0.0] * groups.pop()
        table = [rows.get(name, zeros) for name in checkpoints.names]
        found: npt.NDArray[np.float64] = np.array(table, np.float64).T.copy()
        return found


def _other_source(name: str, expected: str, found: str) -> str:
    return f"{name}: SHA-256 is {found}, the recipe was made with {expected}"
