"""The searchers of a comparison: a name, settings of its own, and a label for tables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from merge_rl.config import OptimizeConfig, from_mapping, preset, to_mapping
from merge_rl.errors import ConfigError
from merge_rl.untrusted import parse_yaml

BASELINES: Final = ("greedy-soup", "ema-grid", "best-checkpoint", "uniform")
"""Searchers that do no more than compare merges which everybody knows."""
BLACK_BOXES: Final = ("nevergrad:TBPSA", "nevergrad:CMA", "lcsc")
# These with the gradients' reward too: part of a lead may be the reward's, not the searcher's.
SAME: Final = "fid-subset"
DEFAULT: Final = (
    "pathwise", "policy-gradient", *BLACK_BOXES,
    *(f"{name} label='{name}, {SAME}' reward.name={SAME}" for name in BLACK_BOXES), *BASELINES,
)  # fmt: skip
SECTIONS: Final = ("search", "merge", "reward")
"""Settings a searcher may have of its own: others would change what it is compared by."""


@dataclass(frozen=True)
class SearcherSpec:
    """One searcher with its settings."""

    label: str  # what tables call it
    name: str  # what the registry calls it
    settings: Mapping[str, Any] = field(default_factory=dict)  # "search.std" -> value

    @property
    def slug(self) -> str:
        """The label as part of a folder's name."""
        return re.sub(r"[^\w.=-]+", "-", self.label).strip("-.") or "searcher"

    def config(self, base: OptimizeConfig, seed: int) -> OptimizeConfig:
        """The settings of its search with one seed; ConfigError for a setting that is off."""
        values = to_mapping(base)
        search = {**values["search"], "name": self.name}
        if self.name in BASELINES:  # they know how many candidates they have
            search["population"] = None
        values |= {"seed": seed, "search": search}
        for key, value in self.settings.items():
            section, _, name = key.partition(".")
            values[section] = {**values[section], name: value}
        return from_mapping(OptimizeConfig, values)


def parse_contender(text: str) -> SearcherSpec:
    """NAME [label=LABEL] [preset=NAME] [KEY=VALUE ...], with keys such as search.std or merge.map.

    Raises ConfigError for what does not read so, and for settings that all must share.
    """
    try:
        name, *pairs = shlex.split(text)
    except ValueError:
        raise ConfigError(f"expected NAME [KEY=VALUE ...], got {text!r}") from None
    if "=" in name:
        raise ConfigError(f"expected a searcher's name before its settings, got {text!r}")
    label = " ".join([name, *pairs])
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if key == "label" and value:
            label = value
            continue
        if key == "preset" and value:
            settings |= _preset(value)
            continue
        section, dot, _ = key.partition(".")
        if not (separator and dot):
            raise ConfigError(f"searcher {name}: expected KEY=VALUE, got {pair!r}")
        if section not in SECTIONS or key == "search.name":
            raise ConfigError(
                f"searcher {name}: {key} cannot be a setting of one searcher alone, expected "
                f"search.*, merge.* or reward.*"
            )
        settings[key] = _value(name, pair, value)
    return SearcherSpec(label, name, settings)


def _preset(name: str) -> dict[str, Any]:
    sections = preset(name).items()
    found = {f"{section}.{key}": v for section, values in sections for key, v in values.items()}
    return {key: value for key, value in found.items() if key != "search.name"}


def _value(name: str, pair: str, text: str) -> Any:
    return parse_yaml(text, f"searcher {name}: {pair}", ConfigError)


def parse_contenders(texts: Sequence[str]) -> tuple[SearcherSpec, ...]:
    """All of them, in order; ConfigError where two could not be told apart."""
    found = tuple(parse_contender(text) for text in texts)
    slugs = [contender.slug for contender in found]
    twice = next((c.label for c in found if slugs.count(c.slug) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"the searcher {twice!r} is there twice; tell them apart by label=NAME, as in "
            f'"{twice.split()[0]} label=other search.std=0.5"'
        )
    return found


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """Seeds of the searches, one at least and each once; ConfigError otherwise."""
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if not seeds or twice:
        problem = f"{twice[0]} twice" if twice else "none"
        raise ConfigError(f"expected seeds, each once, as in 0,1,2, got {problem}")
    return tuple(seeds)
