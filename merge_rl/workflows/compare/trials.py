"""The searchers of a comparison and their trials: a run each, resumed where it was left."""

from __future__ import annotations

import dataclasses
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from merge_rl.config import (
    EvaluationConfig,
    OptimizeConfig,
    RewardConfig,
    SearchConfig,
    from_mapping,
    preset,
    to_mapping,
    without_nan,
)
from merge_rl.errors import ConfigError
from merge_rl.interfaces import Tracker
from merge_rl.parallel.group import Group
from merge_rl.parallel.rendezvous import Place
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.storage.files import is_vacant, locked
from merge_rl.storage.runs import RunDir, clear_beginnings, require_same
from merge_rl.untrusted import parse_yaml
from merge_rl.version import __version__
from merge_rl.workflows.assembly import Announce, Job, build_job
from merge_rl.workflows.evaluate import ScoreStore
from merge_rl.workflows.optimize import run_search
from merge_rl.workflows.rollout import on_device

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


def parse_spec(text: str) -> SearcherSpec:
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
            raise ConfigError(
                f"searcher {name}: expected label=LABEL, preset=NAME or SECTION.KEY=VALUE, such as "
                f"search.std=0.5, got {pair!r}"
            )
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


def parse_specs(texts: Sequence[str]) -> tuple[SearcherSpec, ...]:
    """All of them, in order; ConfigError where two could not be told apart."""
    found = tuple(parse_spec(text) for text in texts)
    slugs = [spec.slug for spec in found]
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


FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
"""Shares of the budget at which a search is looked at."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A finished search."""

    config: OptimizeConfig
    found: Mapping[str, Any]  # result.json
    events: Sequence[Mapping[str, Any]]  # a round each
    seconds: float
    rollout_seconds: float  # of these, for sampling and features

    @property
    def coefficients(self) -> Tensor:
        """(G, K) float64."""
        return torch.tensor(self.found["coefficients"], dtype=torch.float64)

    @property
    def images(self) -> int:
        """Generated by the search."""
        return int(self.found["search_images"])

    def reported_at(self, images: float, origin: Tensor) -> Tensor:
        """Coefficients (G, K) that the search would have reported after so many images.

        The result once it was there, before that those of the last round that was over, else where
        it began, once that was decided, else `origin`.
        """
        if self.images <= images:
            return self.coefficients
        rounds = [event for event in self.events if event["images"] <= images]
        if rounds:
            return torch.tensor(rounds[-1]["coefficients"], dtype=torch.float64)
        start = self.found["start"]
        if 0 < start["images"] <= images:
            return torch.tensor(start["coefficients"], dtype=torch.float64)
        return origin

    def curve(self, origin: Tensor) -> list[tuple[float, Tensor]]:
        """(images, coefficients (G, K)) at every share of the budget; the result at the last."""
        return [
            (share * self.config.budget, self.reported_at(share * self.config.budget, origin))
            for share in FRACTIONS
        ]


def run_trial(path: Path, config: OptimizeConfig, job: Job, tracker: Tracker) -> Trial:
    """The search of a resolved config: from its folder if it is done, else begun or gone on with.

    Raises RunError for a folder that holds a search of other settings or inputs.
    """
    with locked(path):
        run = _open(path, config, job)
        if run.read("result.json") is None:
            _search(run, config, job, tracker)
    clock = run.read("clock.json") or {}
    return Trial(
        config=config,
        found=run.read("result.json") or {},
        events=run.events(),
        seconds=clock.get("seconds", 0.0),
        rollout_seconds=clock.get("rollout_seconds", 0.0),
    )


def _search(run: RunDir, config: OptimizeConfig, job: Job, tracker: Tracker) -> None:
    def sampled() -> float:
        return job.rollout.seconds + job.final_rollout.seconds

    before = run.read("clock.json") or {"seconds": 0.0, "rollout_seconds": 0.0}
    began, began_sampling = time.monotonic(), sampled()
    try:
        store = ScoreStore(job, run, config.seed, config.rules)
        found = run_search(config, job, run, tracker, store)
    finally:  # a search that is gone on with takes the sum
        clock = {
            "seconds": before["seconds"] + time.monotonic() - began,
            "rollout_seconds": before["rollout_seconds"] + sampled() - began_sampling,
        }
        run.write("clock.json", clock)
    result = {
        "version": __version__,
        "checkpoints": list(job.checkpoints.names),
        "groups": list(job.group_names),
        **found.as_dict(),
    }
    run.write("result.json", without_nan(result))


def _open(path: Path, config: OptimizeConfig, job: Job) -> RunDir:
    inputs = {"hashes": job.hashes, "version": __version__}
    if path.is_dir():
        clear_beginnings(path)
    if is_vacant(path):
        return RunDir.create(path, config, inputs)
    run = RunDir.open(path)
    require_same(path, to_mapping(run.config()), to_mapping(config))
    hashes = (run.read("inputs.json") or {}).get("hashes")
    require_same(path, hashes or {}, job.hashes, what="inputs")
    return run


class Jobs:
    """Jobs for resolved configs over one set; one set of weights is held at a time.

    Searches that differ in searcher, reward, seed or budget work with the same network, weights,
    map and references. Each has a reward of its own: what one search left in it must not reach
    the next, which would then depend on what ran before it.
    """

    def __init__(
        self, checkpoints: CheckpointSet, announce: Announce, group: Group | None = None
    ) -> None:
        self._checkpoints, self._announce = checkpoints, announce
        self._group = Group(Place()) if group is None else group
        self._last: tuple[OptimizeConfig, Job] | None = None

    def of(self, config: OptimizeConfig) -> Job:
        """The job of a config on this process's device, its reward fresh."""
        config = on_device(config, self._group)
        shared = dataclasses.replace(
            config, seed=0, budget=1, search=SearchConfig(), reward=RewardConfig(),
            evaluation=EvaluationConfig(), extra_references={}, extra_weights={},
        )  # fmt: skip
        if self._last is None or self._last[0] != shared:
            self._last = None  # two sets of weights might not fit
            self._last = (shared, build_job(config, self._checkpoints, self._announce))
            return self._last[1]
        return self._last[1].with_reward(config)


class NamedTracker:
    """A tracker that says which search a phase belongs to, and does not list its rounds."""

    def __init__(self, tracker: Tracker, name: str) -> None:
        self._tracker, self._name = tracker, name

    def phase(self, name: str, total: int) -> None:
        """A phase of this search."""
        self._tracker.phase(f"{self._name}: {name}", total)

    def advance(self, count: int) -> None:
        """As it is."""
        self._tracker.advance(count)

    def event(self, event: Any) -> None:
        """All but rounds, of which there are too many."""
        if event.get("kind") != "round":
            self._tracker.event(event)
