"""Searches along the gradient: their cost, what they write, how they go on, what they refuse."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import merge_rl as mrl
from merge_rl import own_code
from merge_rl.config.optimize import OptimizeConfig
from merge_rl.config.sampler import SamplerConfig
from merge_rl.core.sampling.compatibility import without_gradient
from merge_rl.errors import BudgetError, ConfigError
from merge_rl.features.digits import DigitsNet
from merge_rl.interfaces import NullTracker
from merge_rl.storage.checkpoints import open_checkpoints
from merge_rl.workflows.assembly import resolve_config, tried_in_vain, why_no_gradient
from merge_rl.workflows.rewards import Level, RewardGradient
from merge_rl.workflows.rollout import DifferentiableRollout
from merge_rl.workflows.rollout.derivatives import StepWatch

pytestmark = pytest.mark.usefixtures("no_network_here")

TinyConfig = Callable[..., OptimizeConfig]
Outcome = Callable[[Path], dict[str, object]]


class Heard(NullTracker):
    """Keeps warnings and notes; Ctrl-C once so many rounds are done."""

    def __init__(self, rounds: int = 10**9) -> None:
        self.left, self.said = rounds, list[str]()

    def event(self, event: Mapping[str, Any]) -> None:
        if event.get("kind") in ("warning", "note"):
            self.said.append(str(event["text"]))
        self.left -= event.get("kind") == "round"
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture
def config(shared_tiny: Path, tiny_config: TinyConfig) -> OptimizeConfig:
    return tiny_config(
        shared_tiny, budget=250, search={"name": "pathwise", "population": None},
        merge={"scale": 0.2},
    )  # fmt: skip


def rounds_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["kind"] == "round"]


def test_a_run(config: OptimizeConfig, tmp_path: Path) -> None:
    result = mrl.optimize(config.checkpoints, out=tmp_path / "run", config=config)
    rounds = rounds_of(tmp_path / "run")
    # A pool of 40, then 30 images a round: 10 with their gradient, which cost three each.
    assert [e["images"] for e in rounds] == [40 + 30 * (i + 1) for i in range(len(rounds))]
    assert len(rounds) == (250 - 40) // 30
    assert result.images <= 250
    assert all(e["failed"] == 0 and e["refreshed"] == 10 for e in rounds)
    # A round's images take the place of the oldest, and the next round finds them there.
    pools = [(e["pool_before"], e["pool_after"]) for e in rounds]
    assert [before for before, _ in pools[1:]] == [after for _, after in pools[:-1]]
    assert rounds[0]["theta"] != rounds[1]["theta"]


@pytest.mark.parametrize("reward", ["fid-subset", "2 * fid-influence"])
def test_interrupted_and_resumed(
    reward: str, config: OptimizeConfig, tmp_path: Path, outcome: Outcome
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    mrl.optimize(config.checkpoints, out=whole, config=config, reward=reward)
    begun = {"out": run, "config": config, "reward": reward}
    with pytest.raises(KeyboardInterrupt):
        mrl.optimize(config.checkpoints, **begun, tracker=Heard(2))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        mrl.resume(run, tracker=Heard(3))
    mrl.resume(run)
    assert outcome(run) == outcome(whole)


def test_a_run_of_an_earlier_release_keeps_its_steps(
    config: OptimizeConfig, tmp_path: Path, outcome: Outcome
) -> None:
    before = dataclasses.replace(config, rules=2)
    mrl.optimize(config.checkpoints, out=tmp_path / "whole", config=before)
    with pytest.raises(KeyboardInterrupt):
        mrl.optimize(
            config.checkpoints, out=tmp_path / "run", config=before, tracker=Heard(3)
        )  # fmt: skip
    mrl.resume(tmp_path / "run")
    rounds = rounds_of(tmp_path / "run")
    lengths, left = [e["step_length"] for e in rounds], len(rounds)
    wide = lengths[0] * torch.linspace(1, 1 / left, left).double()
    torch.testing.assert_close(torch.tensor(lengths).double(), wide)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_too_small_a_budget_is_refused(config: OptimizeConfig, tmp_path: Path) -> None:
    message = r"does not pay for one round: 10 images with their gradient.* at least 70"
    small = dataclasses.replace(config, budget=60)
    with pytest.raises(BudgetError, match=message):
        mrl.optimize(config.checkpoints, out=tmp_path / "run", config=small)
    assert not (tmp_path / "run").exists()


def test_what_has_no_gradient_is_refused(
    config: OptimizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            mrl.optimize(config.checkpoints, out=tmp_path / "run", config=config, **changes)
        assert not (tmp_path / "run").exists()

    refused("needs rewards with a derivative, got 'fid-full'.*auto", reward="fid-full")
    taken = DigitsNet.forward
    monkeypatch.setattr(DigitsNet, "forward", lambda net, images: taken(net, images.detach()))
    refused("the extractor 'digits' has no derivative: its features do not depend")


def test_three_rounds_without_a_gradient_end_the_search(
    config: OptimizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, rounds = DifferentiableRollout.__call__, 0

    def spoilt(self: DifferentiableRollout, *given: Any) -> Any:
        nonlocal rounds
        rounds += 1
        made = found(self, *given)
        if rounds > 2:
            made.gradient.fill_(torch.nan)
        return made

    monkeypatch.setattr(DifferentiableRollout, "__call__", spoilt)
    heard = Heard()
    mrl.optimize(config.checkpoints, out=tmp_path / "run", config=config, tracker=heard)
    events = rounds_of(tmp_path / "run")
    assert [e["failed"] for e in events] == [0, 0, 10, 10, 10]
    assert events[-1]["theta"] == events[1]["candidates"][0]  # the last that had a gradient
    assert any("all candidates failed in 3 rounds running" in text for text in heard.said)


def test_a_search_that_gets_worse_begins_again_at_its_best(
    config: OptimizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distances = iter([2.0, 1.0, *[9.0] * 11, *[20.0] * 99])
    monkeypatch.setattr(RewardGradient, "level", lambda *_given: Level(next(distances), 0.0, 0.0))
    heard, run = Heard(), tmp_path / "run"
    long = dataclasses.replace(config, budget=2000)
    result = mrl.optimize(config.checkpoints, out=run, config=long, tracker=heard)
    rounds = rounds_of(run)
    # Two good rounds, ten bad ones, one at the start of the new attempt, ten that are worse.
    assert len(rounds) == 2 + 10 + 1 + 10
    # The centre of the second round's pool, which was the best: it is still at the start.
    assert rounds[11]["theta"] == rounds[22]["theta"] == rounds[0]["candidates"][0]
    # A pool of 40 is made there anew; not when nothing more is asked.
    costs = [b["images"] - a["images"] for a, b in pairwise(rounds)]
    assert costs == [30] * 11 + [70] + [30] * 10
    assert result.images == rounds[-1]["images"] < 800
    said = [text for text in heard.said if "clearly worse" in text]
    assert len(said) == 2
    assert said[0].startswith("round 12: the distance of the pool was clearly worse")
    assert said[0].endswith("back to the best mean so far with half the step")
    assert said[1].endswith("the search ends early")


def test_a_second_metric_is_looked_at_when_the_pool_is_new(
    config: OptimizeConfig, tmp_path: Path
) -> None:
    mrl.optimize(config.checkpoints, out=tmp_path / "run", config=config)
    looked = [e["round"] for e in rounds_of(tmp_path / "run") if "quadratic-mmd" in e]
    assert looked == [0, 4]  # four rounds of 10 fill a pool of 40


def test_auto_takes_the_gradient_where_there_is_one(
    config: OptimizeConfig, shared_tiny: Path, tiny_config: TinyConfig
) -> None:
    opened = open_checkpoints(shared_tiny, track="raw")

    def resolved(**changes: Any) -> OptimizeConfig:
        search = {"name": "auto", "population": None, **changes.pop("search", {})}
        return resolve_config(tiny_config(shared_tiny, search=search, **changes), opened)

    assert resolved().search.name == "pathwise"
    assert resolved().search.incumbents == 2
    policy = [
        resolved(reward={"name": "fid-full"}),
        resolved(reward={"name": "fid-subset + 2 * mine:Reward"}),
        resolved(sampler=SamplerConfig(solver="sde-euler", num_steps=4)),
        resolved(search={"population": 6}),
        resolved(search={"policy": "mlp"}),
    ]
    assert [found.search.name for found in policy] == ["policy-gradient"] * 5
    assert why_no_gradient(policy[0]) == "the reward fid-full has no gradient"


class Brightness:
    """Features of bytes and of floating images alike."""

    name, dim = "brightness", 2

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        values = images.float().flatten(1) / 255
        return torch.stack([values.mean(1), values.std(1)], 1)


class Counted(Brightness):
    """Without a gradient."""

    name = "counted"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return super().__call__(images.detach())


class Decoder:
    """Makes bytes alone."""

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        return (samples.clip(-1, 1) * 127.5 + 128).clip(0, 255).to(torch.uint8)


class Broken:
    """An extractor that fails."""

    name, dim = "broken", 2

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        raise ConfigError(f"no features of {len(images)} images")


@pytest.mark.parametrize(
    ("code", "kind", "found", "why"),
    [
        (
            Broken, "extractor", "policy-gradient",
            f"whether the extractor {__name__}:Broken has a gradient is not known",
        ),
        (Brightness, "extractor", "pathwise", None),
        (
            Counted, "extractor", "policy-gradient",
            "the extractor 'counted' has no derivative: its features do not depend on a gradient",
        ),
        (
            Decoder, "autoencoder", "policy-gradient",
            f"the decoder {__name__}:Decoder has no derivative: it has no method `levels`",
        ),
    ],
)  # fmt: skip
def test_auto_tries_the_users_code_once(
    shared_tiny: Path, tiny_config: TinyConfig, code: Callable[[], object], kind: str, found: str,
    why: str | None,
) -> None:  # fmt: skip
    made = list[object]()

    def factory() -> object:
        made.append(code())
        return made[-1]

    factory.__qualname__ = code.__qualname__
    opened = open_checkpoints(shared_tiny, track="raw")
    named = {kind: own_code.allow(factory)}
    asked = tiny_config(shared_tiny, search={"name": "auto", "population": None}, **named)
    assert tried_in_vain(asked, opened) == why
    assert resolve_config(asked, opened).search.name == found
    assert len(made) == 1


def test_a_network_without_a_gradient_is_named() -> None:
    class Flow(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.layer(x) + t[:, None]
            return made

    class Blind(Flow):
        @torch.no_grad()
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return super().forward(x, t)

    def stated(module: torch.nn.Module) -> mrl.Network:
        return mrl.describe(
            module, prediction="velocity", time="up", path="linear", sample_shape=[2]
        )

    assert without_gradient(stated(Flow())) is None
    why = "the network Blind has no derivative: what it makes does not depend on a gradient"
    assert without_gradient(stated(Blind())) == why
    with pytest.raises(ConfigError, match="the network has no derivative.* searcher auto"):
        StepWatch()(0, torch.zeros(2, 1))


def test_pools_are_no_larger_than_a_budget_renews(
    shared_tiny: Path, tiny_config: TinyConfig
) -> None:
    opened = open_checkpoints(shared_tiny, track="raw")

    def sizes(budget: int, pool: int = 5000) -> tuple[int, int | None]:
        given = tiny_config(
            shared_tiny, budget=budget, search={"name": "pathwise", "population": None},
            reward={"pool_size": pool, "subset_size": None, "refresh_size": None},
        )  # fmt: skip
        reward = resolve_config(given, opened).reward
        return reward.pool_size, reward.subset_size

    assert sizes(10_000) == (500, 100)
    assert sizes(20_000) == (1000, 100)
    assert sizes(90_000) == (2500, 250)
    assert sizes(90_000, pool=1000) == (1000, 250)
