"""The main job under every reward: it runs, resumes to the same bits, and refuses what it lacks."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import merge_rl as mrl
from merge_rl.config.optimize import OptimizeConfig
from merge_rl.core.distances.statistics import feature_stats
from merge_rl.errors import ConfigError, MergeRLError, RunError, StatisticsError, UnknownNameError
from merge_rl.registry import REWARDS
from merge_rl.storage.files.atomic import save_tensors
from merge_rl.storage.runs.run_dir import RunDir
from merge_rl.workflows.assembly.extractors import build_extractor
from merge_rl.workflows.reference.file import save_reference
from tests.quick import without_network, without_pages

TinyConfig = Callable[..., OptimizeConfig]
Outcome = Callable[[Path], dict[str, object]]

SMALL: dict[str, Any] = {
    "budget": 110,
    "merge": {"scale": 0.2},
    "search": {"population": 2},
    "evaluation": {"num_images": 10, "repeats": 3},
}
TONE = "mine_for_tests:make_tone"


class Tone:
    """Mean and spread of an image's brightness, times a weight."""

    name, dim = "tone", 2

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.scale = float(weights["scale"])
        self.calls: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.calls.append(len(images))
        flat = images.float().flatten(1) / 255
        return self.scale * torch.stack([flat.mean(1), flat.std(1)], 1)


@pytest.fixture(autouse=True)
def _user_module(monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    module = ModuleType("mine_for_tests")
    module.make_tone = Tone  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine_for_tests", module)


@pytest.fixture(scope="module")
def files(shared_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """References with features for both extractors, and the other one's weights."""
    folder = tmp_path_factory.mktemp("files")
    images = torch.randint(
        0, 256, (60, 1, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8
    )
    weights = {"scale": torch.tensor(3.0)}
    save_tensors(folder / "tone.safetensors", weights)
    digits, digest = build_extractor(
        "digits", str(shared_tiny / "evaluation/extractor.safetensors")
    )
    for extractor, sha256 in ((digits, digest), (Tone(weights), None)):
        features = extractor(images)
        save_reference(
            folder / f"real-{extractor.name}.safetensors", feature_stats(features),
            extractor=extractor.name, extractor_sha256=sha256, features=features,
        )  # fmt: skip
    return {
        "digits": str(folder / "real-digits.safetensors"),
        "tone": str(folder / "real-tone.safetensors"),
        "weights": str(folder / "tone.safetensors"),
    }


def settings(
    make: TinyConfig, folder: Path, files: dict[str, str], name: str, **changes: Any
) -> OptimizeConfig:
    extra: dict[str, Any] = {}
    if TONE in name:
        extra = {
            "extra_references": {TONE: files["tone"]}, "extra_weights": {TONE: files["weights"]},
        }  # fmt: skip
    rewards = {"name": name, "pool_size": 20, **changes.pop("reward", {})}
    given = {**SMALL, "reference": files["digits"], "reward": rewards, **extra, **changes}
    return make(folder, **given)


Whole = tuple[OptimizeConfig, mrl.OptimizeResult]


@pytest.fixture(scope="module")
def whole_of(
    shared_tiny: Path, files: dict[str, str], tiny_config: TinyConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Whole]:  # fmt: skip
    """reward -> settings, and a run under it that nothing interrupted: to look at."""
    folder = tmp_path_factory.mktemp("whole")

    @functools.cache
    def under(reward: str) -> Whole:
        config = settings(tiny_config, shared_tiny, files, reward)
        name = f"run{len(list(folder.iterdir()))}"
        with pytest.MonkeyPatch.context() as patch:
            without_network(patch)
            return config, mrl.optimize(shared_tiny, out=folder / name, config=config)

    return under


TWO = f"0.5 * fid-subset + fd-{TONE}-subset"
SUMS = [TWO, f"fd-{TONE}-influence", f"fid-influence + 3 * kid-{TONE}-subset + mmd-full"]


@pytest.mark.parametrize("reward", [*REWARDS, *SUMS])
def test_every_reward_searches_and_resumes(
    reward: str, whole_of: Callable[[str], Whole], shared_tiny: Path, tmp_path: Path,
    outcome: Outcome, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config, whole = whole_of(reward)
    events = RunDir.open(whole.run_dir).events()
    # 110 images: a pool of 20 and rounds of 2 x 10 with a refresh of 10; or rounds of 20 alone.
    pooled = config.reward.pooled
    assert pooled == (not reward.endswith("full") or "+" in reward)
    assert len(events) == (3 if pooled else 5)
    assert all((event["pool_before"] is None) != pooled for event in events)
    assert all(isinstance(r, float) for event in events for r in event["rewards"])
    assert len({tuple(event["theta"]) for event in events}) == len(events)
    # The comparison is in FID to the set's reference, whatever was searched for.
    assert whole.comparison.as_dict()["metric"] == "fid"
    assert whole.comparison.references == ["reference"]

    # Stopped while the third round is written down, it ends the same.
    original, written = RunDir.append_event, []

    def stopping(self: RunDir, event: dict[str, Any]) -> None:
        written.append(event)
        if len(written) == 3:
            raise KeyboardInterrupt
        original(self, event)

    monkeypatch.setattr(RunDir, "append_event", stopping)
    without_pages(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        mrl.optimize(shared_tiny, out=tmp_path / "run", config=config)
    mrl.resume(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(whole.run_dir)


def test_events_tell_the_terms_of_a_sum(whole_of: Callable[[str], Whole]) -> None:
    run = whole_of(TWO)[1].run_dir
    for event in RunDir.open(run).events():
        assert list(event["terms"]) == ["fid-subset", f"fd-{TONE}-subset"]
        own, other = event["terms"].values()
        mean = sum(event["rewards"]) / len(event["rewards"])
        assert mean == pytest.approx(0.5 * own + other, rel=1e-9)
        assert own < 0 > other
    hashes = json.loads((run / "inputs.json").read_text())["hashes"]
    assert {f"extractor_weights {TONE}", f"reference {TONE}"} < set(hashes)
    # One name is not a sum.
    run = whole_of("fid-subset")[1].run_dir
    assert not any("terms" in event for event in RunDir.open(run).events())


def test_the_sets_extractor_by_its_own_name_is_the_same_reward(
    whole_of: Callable[[str], Whole], outcome: Outcome
) -> None:
    runs = [whole_of(reward)[1].run_dir for reward in ("fid-subset", "fd-digits-subset")]
    found = [outcome(run)["state.safetensors"] for run in runs]
    assert found[0] == found[1]


def test_an_extractor_works_only_where_it_is_needed(
    shared_tiny: Path, files: dict[str, str], tiny_config: TinyConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls: list[int] = []
    original = Tone.__call__

    def counted(self: Tone, images: Tensor) -> Tensor:
        calls.append(len(images))
        return original(self, images)

    monkeypatch.setattr(Tone, "__call__", counted)
    config = settings(tiny_config, shared_tiny, files, f"fd-{TONE}-subset")
    result = mrl.optimize(shared_tiny, out=tmp_path / "run", config=config)
    assert sum(calls) == result.images  # the search's, none of the comparison's


def test_another_file_of_another_extractor_is_another_run(
    shared_tiny: Path, files: dict[str, str], tiny_config: TinyConfig, tmp_path: Path
) -> None:
    own = {**files, "tone": str(tmp_path / "real.safetensors")}
    features = torch.rand(30, 2, generator=torch.Generator().manual_seed(1))
    save_reference(own["tone"], feature_stats(features), extractor="tone")
    config = settings(tiny_config, shared_tiny, own, TWO)
    run = mrl.optimize(shared_tiny, out=tmp_path / "run", config=config).run_dir
    save_reference(own["tone"], feature_stats(features + 1), extractor="tone")
    with pytest.raises(RunError, match=f"changed since it began: reference {TONE}"):
        mrl.resume(run)


@pytest.mark.parametrize(
    ("reward", "changes", "error", "message"),
    [
        ("fid-subset + ", {}, ConfigError, "found nothing after 'fid-subset \\+'"),
        ("fd-dinov9-subset", {}, UnknownNameError, "unknown extractor 'dinov9'; did you mean"),
        ("fid-subset + 0.2 * fd-dinov2-subset", {}, ConfigError,
         "compares features of 'dinov2': it needs statistics .*--reference dinov2=PATH"),
        ("fid-subset", {"extra_references": {"dinov2": "x"}}, ConfigError,
         "no use for a file of 'dinov2', expected files of no other extractor"),
        (TWO, {"extra_weights": {"inception": "x"}}, ConfigError,
         f"no use for a file of 'inception', expected files of {TONE}"),
        ("fid-full", {"reward": {"subset_size": 1}}, ConfigError,
         "fid-full needs at least 2 images a candidate, got 1"),
        (TWO, {"extra_references": {TONE: "nowhere.safetensors"}}, MergeRLError,
         "nowhere.safetensors: no such file"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_written(
    reward: str, changes: dict[str, Any], error: type[MergeRLError], message: str,
    shared_tiny: Path, files: dict[str, str], tiny_config: TinyConfig, tmp_path: Path,
) -> None:  # fmt: skip
    def search() -> None:
        config = settings(tiny_config, shared_tiny, files, reward, **changes)
        mrl.optimize(shared_tiny, out=tmp_path / "run", config=config)

    with pytest.raises(error, match=message):
        search()
    assert list(tmp_path.iterdir()) == []


def test_statistics_of_another_extractor_are_refused(
    shared_tiny: Path, files: dict[str, str], tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = settings(tiny_config, shared_tiny, {**files, "tone": files["digits"]}, TWO)
    with pytest.raises(StatisticsError, match="statistics of extractor 'digits', expected 'tone'"):
        mrl.optimize(shared_tiny, out=tmp_path / "run", config=config)


def test_kernel_rewards_ask_for_features(
    shared_tiny: Path, files: dict[str, str], tiny_config: TinyConfig, tmp_path: Path
) -> None:
    bare = {**files, "digits": str(shared_tiny / "evaluation/reference.safetensors")}
    config = settings(tiny_config, shared_tiny, bare, "kid-subset")
    message = "reference.safetensors: kid-subset compares .* `mergerl reference --keep-features`"
    with pytest.raises(StatisticsError, match=message):
        mrl.optimize(shared_tiny, out=tmp_path / "run", config=config)
    assert list(tmp_path.iterdir()) == []
