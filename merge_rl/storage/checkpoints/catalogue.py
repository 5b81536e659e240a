"""The catalogue: published checkpoint sets that are known by name, with their scores.

It is the package's copy of the `checkpoints_manifest.yaml` at the root of the repository, whose
comments explain every field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Final

from merge_rl.config import real_number, whole_number
from merge_rl.errors import ManifestError, UnknownNameError
from merge_rl.storage.files import Fields
from merge_rl.untrusted import load_yaml

CATALOGUE_NAME: Final = "checkpoints_manifest.yaml"
CATALOGUE_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class PublishedScore:
    """One published number and what it was measured on."""

    metric: str
    value: float
    file: str | None = None  # None: `method` says what was made from the set
    method: str | None = None
    preset: str | None = None
    guidance: float | None = None  # None: not guided, or as the conditions say
    guide: str | None = None  # file of the guiding network
    conditions: str | None = None


@dataclass(frozen=True, kw_only=True)
class KnownSet:
    """Files of one training run that can be merged with one another."""

    name: str
    family: str
    kind: str
    dataset: str
    resolution: int
    licence: str
    size: str | None = None
    conditional: bool | None = None
    model: Mapping[str, Any] | None = None  # None: the files say
    num_parameters: int | None = None
    dtype: str | None = None
    tensor_bytes: int | None = None  # of one file, exact
    nimg: tuple[int, ...] = ()
    ema_std: tuple[float, ...] = ()
    pattern: str | None = None
    base_url: str | None = None
    links: Mapping[str, str] | None = None
    published: tuple[PublishedScore, ...] = ()
    source: str | None = None
    note: str | None = None
    embedded: bool = False

    @property
    def kimg(self) -> tuple[int, ...]:
        """Training progress as file names give it."""
        return tuple(nimg // 1000 for nimg in self.nimg)

    def file_names(self) -> tuple[str, ...]:
        """All files of the set, by (nimg, ema_std); raw weights have no ema_std in their names."""
        if self.pattern is None:
            return ()
        if not self.nimg:
            return (self.pattern,)
        if not self.ema_std:
            return tuple(self.pattern.format(kimg=kimg) for kimg in self.kimg)
        return tuple(
            self.pattern.format(kimg=kimg, ema_std=ema_std)
            for kimg in self.kimg
            for ema_std in self.ema_std
        )

    def urls(self) -> dict[str, str]:
        """File name -> address."""
        addresses = {name: f"{self.base_url}{name}" for name in self.file_names() if self.base_url}
        return addresses | dict(self.links or {})


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """All known sets, in the order of the file."""

    sets: tuple[KnownSet, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sets, in the order of the file."""
        return tuple(known.name for known in self.sets)

    def find(self, name: str) -> KnownSet:
        """The set of that name; UnknownNameError with the nearest name otherwise."""
        for known in self.sets:
            if known.name == name:
                return known
        raise UnknownNameError("checkpoint set", name, self.names)


@cache
def load_catalogue() -> Catalogue:
    """The catalogue that comes with the package."""
    return read_catalogue(Path(__file__).parents[2] / CATALOGUE_NAME)


def read_catalogue(path: Path) -> Catalogue:
    """A catalogue file; ManifestError if it is malformed or names a set twice."""
    top = Fields(load_yaml(path), str(path), required=["version", "sets"])
    if top.count("version") != CATALOGUE_VERSION:
        raise top.refuse("version", str(CATALOGUE_VERSION))
    sets: dict[str, KnownSet] = {}
    for index, value in enumerate(top.entries("sets")):
        known = _parse_set(value, f"{path}, sets[{index}]")
        if known.name in sets:
            raise ManifestError(f"{path}, sets[{index}]: the name {known.name!r} is taken")
        sets[known.name] = known
    return Catalogue(sets=tuple(sets.values()))


_REQUIRED: Final = ["name", "family", "kind", "dataset", "resolution", "licence"]
_OPTIONAL: Final = [
    *(item.name for item in fields(KnownSet) if item.name not in _REQUIRED),
    "conditions",
]
_SCORE_OPTIONS: Final = ["file", "method", "preset", "guidance", "guide", "conditions"]


def _parse_set(value: object, where: str) -> KnownSet:
    item = Fields(value, where, required=_REQUIRED, optional=_OPTIONAL)
    resolution = item.count("resolution")
    if not resolution:
        raise item.refuse("resolution", "a positive whole number")
    return KnownSet(
        **{key: item.needed_text(key) for key in _REQUIRED if key != "resolution"},
        resolution=resolution,
        size=item.text("size"),
        conditional=item.flag("conditional"),
        model=item.mapping("model") or None,
        num_parameters=item.count("num_parameters"),
        dtype=item.text("dtype"),
        tensor_bytes=item.count("tensor_bytes"),
        nimg=_parse_nimg(item),
        ema_std=_parse_widths(item),
        pattern=item.text("pattern"),
        base_url=item.text("base_url"),
        links=item.mapping("links") or None,
        published=_parse_scores(item),
        source=item.text("source"),
        note=item.text("note"),
        embedded=item.flag("embedded") or False,
    )


def _parse_nimg(item: Fields) -> tuple[int, ...]:
    """A list of counts, or {first, last, every} with both ends included."""
    value = item.raw("nimg")
    if isinstance(value, dict):
        span = Fields(value, f"{item.where}, nimg", required=["first", "last", "every"])
        first, last, every = (span.count(key) or 0 for key in ("first", "last", "every"))
        if every == 0:
            raise span.refuse("every", "a positive whole number")
        return tuple(range(first, last + 1, every))
    counts = [whole_number(nimg) for nimg in item.entries("nimg")]
    if not all(nimg is not None and nimg >= 0 for nimg in counts):
        raise item.refuse("nimg", "whole numbers")
    return tuple(nimg for nimg in counts if nimg is not None)


def _parse_widths(item: Fields) -> tuple[float, ...]:
    values = item.entries("ema_std")
    found = (real_number(width) for width in values)
    widths = tuple(width for width in found if width is not None)
    if len(widths) < len(values):
        raise item.refuse("ema_std", "numbers")
    return widths


def _parse_scores(item: Fields) -> tuple[PublishedScore, ...]:
    scores = []
    for index, value in enumerate(item.entries("published")):
        where = f"{item.where}, published[{index}]"
        score = Fields(value, where, required=["metric", "value"], optional=_SCORE_OPTIONS)
        number = score.number("value")
        if number is None:
            raise score.refuse("value", "a number")
        texts = {key: score.text(key) for key in _SCORE_OPTIONS if key != "guidance"}
        texts["conditions"] = texts["conditions"] or item.text("conditions")
        scores.append(
            PublishedScore(
                metric=score.needed_text("metric"),
                value=number,
                guidance=score.number("guidance"),
                **texts,
            )
        )
    return tuple(scores)
