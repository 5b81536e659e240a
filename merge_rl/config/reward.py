"""Settings of the reward and its pool of images, and a reward's name: terms with weights."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NoReturn

from merge_rl.config.numbers import whole_number
from merge_rl.config.sampler import require
from merge_rl.config.setting import REWARD, setting
from merge_rl.errors import ConfigError
from merge_rl.own_code import is_own

_NUMBER: Final = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_NAME: Final = r"[A-Za-z](?:[\w.:,-]*\w)?"
_MEAN: Final = "fd-mean"  # of several encoders, "fd-mean:inception,dinov2"
_TERM: Final = re.compile(rf"\s*(?:({_NUMBER})\s*\*\s*)?({_NAME})\s*")


@dataclass(frozen=True)
class RewardTerm:
    """One term of a reward."""

    name: str  # as written
    base: str  # what a registry calls it, without the extractor: "fid-subset"
    extractor: str | None  # None: the checkpoint set's
    weight: float = 1.0


def parse_reward(text: str) -> tuple[RewardTerm, ...]:
    """The terms of a reward, in order.

    Raises ConfigError for what is no sum of terms, for weights that are not above 0, and for a term
    that comes twice. Which names are known, registries say.
    """
    if not isinstance(text, str):
        raise ConfigError(f"expected a reward by its name, got {type(text).__name__}")
    terms, position = [], 0
    while True:
        found = _TERM.match(text, position)
        if found is None:
            _refuse(text, position)
        weight = float(found[1]) if found[1] else 1.0
        if not 0 < weight < math.inf:
            raise ConfigError(f"reward {text!r}: expected weights above 0, got {found[1]}")
        terms.append(_named(found[2], weight))
        position = found.end()
        if position == len(text):
            break
        if text[position] != "+":
            _refuse(text, position)
        position += 1
    seen = [(term.base, term.extractor) for term in terms]
    twice = [term.name for term, key in zip(terms, seen, strict=True) if seen.count(key) > 1]
    if twice:
        raise ConfigError(f"reward {text!r}: {twice[0]!r} comes twice; give it one weight")
    return tuple(terms)


def _named(name: str, weight: float) -> RewardTerm:
    if name.partition(":")[0] == _MEAN:
        return RewardTerm(name, _MEAN, name.partition(":")[2] or None, weight)
    if is_own(name) and not name.startswith(("fd-", "kid-", "mmd-")):  # of an own extractor
        return RewardTerm(name, name, None, weight)
    metric, _, rest = name.partition("-")
    extractor, _, form = rest.rpartition("-")
    base = f"{'fid' if metric == 'fd' else metric}-{form}"
    return RewardTerm(name, base, extractor or None, weight)


def _refuse(text: str, position: int) -> NoReturn:
    found = repr(text[position:].strip()) if text[position:].strip() else "nothing"
    raise ConfigError(
        f"reward {text!r}: expected NAME or NUMBER * NAME, joined by +, found {found} "
        f"after {text[:position].strip()!r}"
    )


SUBSET_SIZE: Final = 100
GRADIENT_COST: Final = 3
"""Images that one with its gradient counts as: the way there, and twice as much back."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The reward, and the pool of generated images that it is measured in."""

    name: str | None = setting(
        None,
        "fid-, kid- or mmd- with subset or full, fid-influence (first order, faster), on another "
        "extractor as fd-NAME-subset, fd-mean of several (--extractor inception,dinov2), or a sum: "
        "'fid-subset + 0.2 * fd-dinov2-subset'.",
        REWARD, "--reward",
        unset="fid-subset; of black boxes in a search, which remember rewards, fid-full",
    )  # fmt: skip
    pool_size: int = setting(
        5000, "N, images in the pool; in a search pathwise takes 1/20 of the budget at most.",
        REWARD, "--pool",
    )  # fmt: skip
    subset_size: int | None = setting(
        None, "n, images a candidate replaces, or all it is scored on.", REWARD, "--subset",
        unset="what suits reward and budget",
    )  # fmt: skip
    num_subsets: int = setting(1, "Ns, different subsets a candidate is scored on.", REWARD)
    num_replacements: int = setting(1, "Nr, fresh sets of images for each subset.", REWARD)
    # The result of a search is the policy mean of the last refresh, the last one whose samples
    # were seen to be sound.
    refresh: str = setting(
        "rolling",
        "rolling: some rows of the pool every round; K: all rows, every K rounds. Rounds are steps "
        "in fine-tuning; the searcher pathwise is always rolling.",
        REWARD, "--refresh", metavar="rolling|K",
    )  # fmt: skip
    # A pool that is renewed more slowly than the policy moves makes it overshoot.
    refresh_size: int | None = setting(
        None, "Rows that a rolling refresh renews.", REWARD,
        unset="a tenth of the pool, or what four candidates replace if that is more",
    )  # fmt: skip
    max_gap: float = setting(
        0.20, "Running mean of the relative gap above which the loop acts.", REWARD
    )

    def __post_init__(self) -> None:
        require(self.pool_size >= 2, "pool_size", ">= 2", self.pool_size)
        if self.subset_size is not None:
            require(self.subset_size >= 1, "subset_size", ">= 1", self.subset_size)
        if self.pooled and self.images_per_subset > self.pool_size:
            raise ConfigError(
                f"the subset of {self.images_per_subset} images is larger than the pool of "
                f"{self.pool_size}; expected subset_size <= pool_size"
            )
        require(self.num_subsets >= 1, "num_subsets", ">= 1", self.num_subsets)
        require(self.num_replacements >= 1, "num_replacements", ">= 1", self.num_replacements)
        require(self.max_gap > 0, "max_gap", "> 0", self.max_gap)
        if self.refresh != "rolling":
            require(
                self.renewed_every >= 1,
                "refresh", '"rolling" or a number of rounds >= 1', self.refresh,
            )  # fmt: skip
        if self.refresh_size is not None:
            inside = 1 <= self.refresh_size <= self.pool_size
            require(inside, "refresh_size", f"in 1..{self.pool_size}", self.refresh_size)

    @property
    def text(self) -> str:
        """The reward: `name`, or the subset-replace FID."""
        return self.name or "fid-subset"

    @cached_property
    def terms(self) -> tuple[RewardTerm, ...]:
        """What the reward is the weighted sum of."""
        return parse_reward(self.text)

    @cached_property
    def distance(self) -> str:
        """What the pool's distance is called: FID, KID, MMD, fd-mean, or distance of sums."""
        first, *more = self.terms
        if more or first.weight != 1:
            return "distance"
        kind = first.base.partition("-")[0]
        if first.base == _MEAN:
            return _MEAN
        return kind.upper() if kind in ("fid", "kid", "mmd") else "distance"

    @cached_property
    def pooled(self) -> bool:
        """Whether a term replaces part of a pool; the others score a candidate's own images."""
        return not all(term.base.endswith("-full") for term in self.terms)

    @cached_property
    def images_per_subset(self) -> int:
        """n: `subset_size`, or what is usual."""
        return self.subset_size or SUBSET_SIZE

    @cached_property
    def images_per_candidate(self) -> int:
        """Images a candidate costs: Ns Nr n."""
        return self.num_subsets * self.num_replacements * self.images_per_subset

    @cached_property
    def rolling_size(self) -> int:
        """Rows that a rolling refresh renews."""
        share = max(1, self.pool_size // 10, 4 * self.images_per_candidate)
        return self.refresh_size or min(share, self.pool_size)

    @cached_property
    def renewed_every(self) -> int:
        """Rounds after which the whole pool is renewed; 1 of a rolling refresh."""
        return 1 if self.refresh == "rolling" else whole_number(self.refresh) or 0

    def refresh_images(self, round_index: int) -> int:
        """Rows of the pool that are renewed after a round, counted from 0."""
        if (round_index + 1) % self.renewed_every:
            return 0
        return self.rolling_size if self.refresh == "rolling" else self.pool_size
