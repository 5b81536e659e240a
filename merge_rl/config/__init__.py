"""Settings of an optimisation: frozen, keyword-only, checked once; YAML in and out.

Code below this layer trusts the values. Every default is what `mergerl optimize` does when
nothing is said.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from merge_rl.config.sampler import SamplerConfig as SamplerConfig
from merge_rl.config.sampler import require
from merge_rl.errors import ConfigError, UnknownNameError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How theta becomes coefficients."""

    map: str = "affine"  # affine, free, softmax, ema
    start: str = "newest"  # newest, uniform, or a checkpoint's name
    scale: float = 0.05  # coefficient units of one unit of theta
    groups: Mapping[str, str] = field(default_factory=dict)  # name -> regex of tensor names

    def __post_init__(self) -> None:
        require(0 < self.scale < math.inf, "scale", "finite and > 0", self.scale)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The reward and its pool."""

    name: str = "fid-subset"  # or a sum such as "fid-subset + 0.2 * fd-dinov2-subset"
    pool_size: int = 5000  # N
    subset_size: int = 100  # n: images a candidate replaces
    num_subsets: int = 1  # Ns: different subsets a candidate is scored on
    num_replacements: int = 1  # Nr: fresh sets of images for each subset
    # rolling: some rows every round; or a number: all rows, every k rounds. The result of a search
    # is the policy mean of the last refresh, the last one whose samples were seen to be sound.
    refresh: str = "rolling"
    refresh_size: int | None = None  # rows a rolling refresh renews; a tenth of the pool if unset
    max_gap: float = 0.20  # running mean of the relative gap above which the loop acts

    def __post_init__(self) -> None:
        require(self.pool_size >= 2, "pool_size", ">= 2", self.pool_size)
        require(self.subset_size >= 1, "subset_size", ">= 1", self.subset_size)
        if self.subset_size > self.pool_size:
            raise ConfigError(
                f"the subset of {self.subset_size} images is larger than the pool of "
                f"{self.pool_size}; expected subset_size <= pool_size"
            )
        require(self.num_subsets >= 1, "num_subsets", ">= 1", self.num_subsets)
        require(self.num_replacements >= 1, "num_replacements", ">= 1", self.num_replacements)
        require(self.max_gap > 0, "max_gap", "> 0", self.max_gap)
        if self.refresh != "rolling":
            require(
                self.refresh.isdecimal() and int(self.refresh) >= 1,
                "refresh", '"rolling" or a number of rounds >= 1', self.refresh,
            )  # fmt: skip
        if self.refresh_size is not None:
            inside = 1 <= self.refresh_size <= self.pool_size
            require(inside, "refresh_size", f"in 1..{self.pool_size}", self.refresh_size)

    @property
    def images_per_candidate(self) -> int:
        """Images a candidate costs: Ns Nr n."""
        return self.num_subsets * self.num_replacements * self.subset_size

    @property
    def rolling_size(self) -> int:
        """Rows that a rolling refresh renews."""
        return self.refresh_size or max(1, self.pool_size // 10)

    def refresh_images(self, round_index: int) -> int:
        """Rows that are renewed after a round, counted from 0."""
        if self.refresh == "rolling":
            return self.rolling_size
        return self.pool_size if (round_index + 1) % int(self.refresh) == 0 else 0


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The searcher; what `policy-gradient` reads is marked so in its own module."""

    name: str = "policy-gradient"
    policy: str = "direct"  # direct: a free mean; mlp: EMANet
    # P, candidates a round; None: the searcher's own, 16 where nothing speaks for another number
    population: int | None = None
    antithetic: bool = True
    std: float = 1.0  # of the first draws, in theta units
    box: float = 5.0  # half-width of the box that a bounded method searches, in theta units
    learn_std: bool = False
    learning_rate: float = 0.7  # Adam's, in theta units: about the step of one round
    std_learning_rate: float = 0.05
    betas: tuple[float, float] = (0.5, 0.9)
    decay: float = 0.93  # of step and exploration, a round
    min_decay: float = 0.1
    top_fraction: float = 1.0  # kept for the update, by advantage
    clip: float = 0.2
    epochs: int = 1  # updates from one batch

    def __post_init__(self) -> None:
        good = self.population is None or self.population >= 1
        require(good, "population", ">= 1", self.population)
        for name in ("std", "box"):
            width = getattr(self, name)
            require(0 < width < math.inf, name, "finite and > 0", width)
        for name in ("learning_rate", "std_learning_rate"):
            rate = getattr(self, name)
            require(0 < rate < math.inf, name, "finite and > 0", rate)
        require(0 < self.decay <= 1, "decay", "in (0, 1]", self.decay)
        require(0 < self.min_decay <= 1, "min_decay", "in (0, 1]", self.min_decay)
        require(0 < self.top_fraction <= 1, "top_fraction", "in (0, 1]", self.top_fraction)
        require(self.clip > 0, "clip", "> 0", self.clip)
        require(self.epochs >= 1, "epochs", ">= 1", self.epochs)
        good = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        require(good, "betas", "two numbers in [0, 1)", self.betas)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The comparison at the end, on fresh seeds."""

    num_images: int = 5000
    repeats: int = 4
    selection_images: int = 1000  # to find the best single checkpoint, on seeds of their own

    def __post_init__(self) -> None:
        require(self.num_images >= 2, "num_images", ">= 2", self.num_images)
        require(self.repeats >= 3, "repeats", ">= 3", self.repeats)
        require(self.selection_images >= 2, "selection_images", ">= 2", self.selection_images)


@dataclass(frozen=True, kw_only=True)
class OptimizeConfig:
    """Everything that fixes the outcome of `mergerl optimize`, and where its inputs lie."""

    checkpoints: str
    track: str | None = None
    extractor: str | None = None  # None here and below: what the checkpoints' manifest says
    extractor_weights: str | None = None
    reference: str | None = None
    heldout: str | None = None
    # Statistics of real data, and weights, of other extractors that the reward names.
    extra_references: Mapping[str, str] = field(default_factory=dict)
    extra_weights: Mapping[str, str] = field(default_factory=dict)
    autoencoder: str | None = None  # None here: also the samples, if they can be images
    autoencoder_weights: str | None = None
    autoencoder_dtype: str = "float32"  # of a latent decoder; bfloat16 halves its time and memory
    budget: int = 50_000  # generated images: pool, candidates and refreshes
    seed: int = 0
    batch: int = 250  # images in one forward pass
    device: str = "cpu"
    # Where the checkpoints lie while they are merged: a device, "cpu" (memory) or "disk" (mapped
    # files); None: the first of the three with room. It changes the time, not the result.
    weights_device: str | None = None
    licence: str | None = None  # of the merge; None: that of the checkpoints
    sampler: SamplerConfig | None = None
    merge: MergeConfig = field(default_factory=MergeConfig)
    reward: RewardConfig = RewardConfig()
    search: SearchConfig = SearchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        require(self.budget >= 1, "budget", ">= 1 image", self.budget)
        require(self.batch >= 1, "batch", ">= 1", self.batch)
        dtypes = ("float32", "bfloat16")
        require(self.autoencoder_dtype in dtypes, "autoencoder_dtype", f"in {dtypes}",
                 self.autoencoder_dtype)  # fmt: skip


def to_mapping(config: Any) -> dict[str, Any]:
    """A config as plain mappings, lists, numbers and strings."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            value = to_mapping(value)
        elif isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Mapping):
            value = dict(value)
        values[item.name] = value
    return values


def from_mapping(cls: type[T], values: object, where: str = "config") -> T:
    """A config of type `cls` from plain mappings; ConfigError names the key that is off."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping, found {type(values).__name__}")
    kinds = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in kinds:
            raise UnknownNameError(f"setting in {where}", str(key), kinds)
        arguments[key] = _convert(kinds[key], value, f"{where}.{key}")
    missing = [
        item.name
        for item in dataclasses.fields(cls)  # type: ignore[arg-type]
        if item.name not in arguments
        and item.default is dataclasses.MISSING
        and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: {missing[0]!r} is missing")
    return cls(**arguments)


def load_mapping(path: Path) -> dict[str, Any]:
    """A YAML file (safe loader) that must hold a mapping with text keys."""
    import yaml  # help texts need the settings' names, and must not wait for it

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    # PyYAML lets ValueError escape for scalars that do not fit their tag, such as 2024-99-99.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid YAML: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping, found {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def load_config(cls: type[T], path: Path) -> T:
    """Read a YAML file (safe loader) into a config."""
    return from_mapping(cls, load_mapping(path), path.name)


def dump_config(config: Any) -> str:
    """A config as YAML text that `load_config` reads back to an equal config."""
    import yaml

    text: str = yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True)
    return text


def _convert(kind: Any, value: object, where: str) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in parts:
            return None
        return _convert(next(p for p in parts if p is not type(None)), value, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return from_mapping(kind, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(parts[0], item, where) for item in value)
    if origin is not None and isinstance(value, Mapping):
        return {str(k): _convert(parts[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and type(value) in (int, str):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-3 as text
            return float(str(value))
    if kind is int and isinstance(value, str):
        with contextlib.suppress(ValueError):
            number = float(value)
            if number.is_integer():
                return int(number)
    if kind is str and type(value) is int:
        return str(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    name = getattr(kind, "__name__", str(kind)) if origin is None else "list or mapping"
    raise ConfigError(f"{where}: expected {name}, found {type(value).__name__} {value!r}")
