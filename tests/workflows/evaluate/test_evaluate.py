"""Scores of one model: fresh disjoint seeds, intervals, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import merge_rl as mrl
from merge_rl.config.sampler import SamplerConfig
from merge_rl.core.distances.frechet import frechet_distance
from merge_rl.core.distances.intervals import mean_interval
from merge_rl.core.distances.statistics import FeatureStats
from merge_rl.core.sampling.compatibility import balanced_labels
from merge_rl.errors import (
    ConfigError,
    NonFiniteWeightsError,
    RunError,
    StatisticsError,
    TooFewSamplesError,
    UnknownNameError,
)
from merge_rl.features.digits import DigitsNet, load_digits_extractor
from merge_rl.rng import ImageStreams, image_seeds
from merge_rl.storage.checkpoints.model_file import open_model_file
from merge_rl.workflows.evaluate import features as generated
from merge_rl.workflows.evaluate.features import samplers_of
from merge_rl.workflows.reference.features import load_features
from merge_rl.workflows.reference.file import load_reference
from merge_rl.workflows.rollout.rollout import Rollout

SAMPLER = SamplerConfig(num_steps=2)


@pytest.fixture(scope="module")
def model(shared_tiny: Path) -> nn.Module:
    return mrl.load_model(shared_tiny / "raw/tiny-0000400.safetensors")


@pytest.fixture(scope="module")
def extractor(shared_tiny: Path) -> DigitsNet:
    path = shared_tiny / "evaluation/extractor.safetensors"
    return load_digits_extractor(open_model_file(path).weights)


@pytest.fixture(scope="module")
def settings(shared_tiny: Path, extractor: DigitsNet) -> dict[str, Any]:
    reference = shared_tiny / "evaluation/reference.safetensors"
    return {
        "reference": reference, "extractor": extractor, "num_images": 12, "repeats": 3,
        "sampler": SAMPLER, "seed": 7,
    }  # fmt: skip


def test_the_scores_by_hand(
    model: nn.Module, extractor: DigitsNet, settings: dict[str, Any], shared_tiny: Path
) -> None:
    # Every block of 12 images has a stream of seeds, and the classes 0-9, 0, 1.
    heldout = load_reference(shared_tiny / "evaluation/heldout.safetensors")
    found = mrl.evaluate(model, heldout=heldout, **settings)
    assert (found["num_images"], found["repeats"], found["seed"]) == (12, 3, 7)
    reference = load_reference(settings["reference"])
    for name, stats in (("reference", reference.stats), ("heldout", heldout.stats)):
        values = []
        for repeat in range(3):
            noise = ImageStreams(image_seeds(12, 7, "evaluate", repeat)).randn((1, 8, 8))
            samples = mrl.sample(model, noise, balanced_labels(12, 10), num_steps=2)
            images = (samples * 127.5 + 128).clip(0, 255).to(torch.uint8)
            values.append(frechet_distance(mrl.feature_stats(extractor(images)), stats))
        summary = found["fid"][name]
        assert summary["values"] == pytest.approx(values, rel=1e-6)
        interval = mean_interval(values)
        assert summary["mean"] == pytest.approx(interval.mean, rel=1e-6)
        assert summary["low"] == pytest.approx(interval.low, rel=1e-6)
        assert summary["high"] == pytest.approx(interval.high, rel=1e-6)
        assert summary["min"] == pytest.approx(min(values), rel=1e-6)
    assert found["sampler"]["num_steps"] == 2
    json.dumps(found, allow_nan=False)


def test_no_image_is_shared_by_blocks_or_seeds(
    model: nn.Module, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    original = Rollout.noise

    def noise(self: Rollout, seeds: list[int]) -> Tensor:
        asked.extend(seeds)
        return original(self, seeds)

    monkeypatch.setattr(Rollout, "noise", noise)
    a = mrl.evaluate(model, **settings)["fid"]["reference"]["values"]
    first = list(asked)
    # Close as they are, the seeds have neither an image nor a score in common.
    b = mrl.evaluate(model, **{**settings, "seed": 10})["fid"]["reference"]["values"]
    assert len(first) == 36
    assert len({*asked}) == len(asked) == 72
    assert len({*a, *b}) == 6
    assert mrl.evaluate(model, **settings)["fid"]["reference"]["values"] == a


def test_statistics_are_taken_in_every_form(model: nn.Module, settings: dict[str, Any]) -> None:
    loaded = load_reference(settings["reference"])
    for reference in (str(settings["reference"]), loaded, loaded.stats):
        found = mrl.evaluate(model, **{**settings, "reference": reference})
        assert found == mrl.evaluate(model, **settings)


def test_progress_counts_every_image(model: nn.Module, settings: dict[str, Any]) -> None:
    class Notes:
        """Writes down what it hears."""

        def __init__(self) -> None:
            self.phases: list[tuple[str, int]] = []
            self.done = 0

        def phase(self, name: str, total: int) -> None:
            self.phases.append((name, total))

        def advance(self, count: int) -> None:
            self.done += count

        def event(self, event: object) -> None:
            raise AssertionError("an evaluation has no events")

    notes = Notes()
    mrl.evaluate(model, tracker=notes, **{**settings, "batch": 5})
    assert notes.phases == [("evaluate", 36)]
    assert notes.done == 36


def test_a_model_that_fails_has_no_score(settings: dict[str, Any], shared_tiny: Path) -> None:
    broken = mrl.load_model(shared_tiny / "raw/tiny-0000400.safetensors")
    broken.get_parameter("unet.out_gain").fill_(torch.nan)
    with pytest.raises(NonFiniteWeightsError, match="samples that are not finite: no score"):
        mrl.evaluate(broken, **settings)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"metrics": ["fidd"]}, UnknownNameError, "unknown metric 'fidd'; did you mean 'fid'"),
        (
            {"metrics": ["fid", "x"]},
            UnknownNameError,
            r"unknown metric 'x' \(known: fd-mean, fid, ",
        ),
        ({"num_images": 1}, TooFewSamplesError, "at least 2 images, got 1"),
        ({"num_images": 0}, TooFewSamplesError, "at least 2 images, got 0"),
        ({"repeats": 1}, TooFewSamplesError, "at least 2 repeats, got 1"),
        ({"sampler": SamplerConfig(solver="huen")}, UnknownNameError, "did you mean 'heun'"),
        ({"reference": "nowhere.safetensors"}, Exception, "nowhere.safetensors: no such file"),
    ],
)
def test_what_cannot_be_scored(
    changes: dict[str, Any], error: type[Exception], message: str, model: nn.Module,
    settings: dict[str, Any],
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        mrl.evaluate(model, **{**settings, **changes})


def test_statistics_of_other_features_are_refused(
    model: nn.Module, settings: dict[str, Any]
) -> None:
    class Other(DigitsNet):
        name = "inception"

    with pytest.raises(StatisticsError, match="of extractor 'digits', expected 'inception'"):
        mrl.evaluate(model, **{**settings, "extractor": Other()})
    small = FeatureStats(9, torch.zeros(3).double(), torch.eye(3).double())
    with pytest.raises(StatisticsError, match="dimension"):
        mrl.evaluate(model, **{**settings, "reference": small})


def test_guidance_is_part_of_the_score(
    model: nn.Module, settings: dict[str, Any], shared_tiny: Path
) -> None:
    plain = mrl.evaluate(model, **settings)["fid"]["reference"]["values"]
    guide = str(shared_tiny / "raw/tiny-0000100.safetensors")
    guided = SamplerConfig(num_steps=2, guidance=1.5, guide=guide)
    found = mrl.evaluate(model, **{**settings, "sampler": guided})
    assert found["sampler"]["guidance"] == 1.5
    assert set(found["fid"]["reference"]["values"]).isdisjoint(plain)
    # Guided by itself a model is itself, whatever the strength.
    own = SamplerConfig(num_steps=2, guidance=3.0, guide=guide.replace("100.", "400."))
    same = mrl.evaluate(model, **{**settings, "sampler": own})
    assert same["fid"]["reference"]["values"] == pytest.approx(plain, rel=1e-5)
    with pytest.raises(ConfigError, match="guidance 2 needs a guide"):
        mrl.evaluate(model, **{**settings, "sampler": SamplerConfig(guidance=2)})


# ------------------------------------------------------------------------- kept features, samplers


def test_a_run_that_was_cut_short_goes_on(
    model: nn.Module, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated, "PIECE_ROWS", 5)  # 12 images: pieces of 5, 5 and 2
    original, left = Rollout.features, 4

    def features(self: Rollout, noise: Tensor, labels: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return original(self, noise, labels)

    whole = mrl.evaluate(model, **settings)
    monkeypatch.setattr(Rollout, "features", features)
    kept = tmp_path / "features"
    with pytest.raises(KeyboardInterrupt):
        mrl.evaluate(model, save_features=kept, **settings)
    names = [".ode-seed7-1-12.safetensors.partial", "ode-seed7-0-12.safetensors"]
    assert sorted(path.name for path in kept.iterdir()) == names
    left = 5  # of nine pieces four are made
    assert mrl.evaluate(model, save_features=kept, **settings) == whole
    assert left == 0
    assert mrl.evaluate(model, save_features=kept, **settings) == whole
    saved = load_features(kept / "ode-seed7-2-12.safetensors")
    assert saved.extractor == "digits"
    assert saved.labels is not None
    assert saved.labels.tolist() == [*range(10), 0, 1]


def test_kept_features_of_another_model_are_refused(
    model: nn.Module, settings: dict[str, Any], shared_tiny: Path, tmp_path: Path
) -> None:
    mrl.evaluate(model, save_features=tmp_path, **settings)
    other = mrl.load_model(shared_tiny / "raw/tiny-0000300.safetensors")
    with pytest.raises(
        RunError, match=r"ode-seed7-0-12\.safetensors belongs to another evaluation: its n"
    ):
        mrl.evaluate(other, save_features=tmp_path, **settings)
    longer = {**settings, "sampler": SamplerConfig(num_steps=3)}
    with pytest.raises(RunError, match="its sampler is .*; choose another folder"):
        mrl.evaluate(model, save_features=tmp_path, **longer)


def test_a_path_will_do(settings: dict[str, Any], shared_tiny: Path, model: nn.Module) -> None:
    path = shared_tiny / "raw/tiny-0000400.safetensors"
    assert mrl.evaluate(path, **settings) == mrl.evaluate(model, **settings)


def test_samplers_have_a_section_each(model: nn.Module, settings: dict[str, Any]) -> None:
    two = {"ode": SAMPLER, "sde": SamplerConfig(solver="sde-euler", num_steps=2)}
    found = mrl.evaluate(model, **{**settings, "sampler": two})
    assert list(found["samplers"]) == ["ode", "sde"]
    for name, sampler in two.items():
        alone = mrl.evaluate(model, **{**settings, "sampler": sampler})
        assert found["samplers"][name]["fid"] == alone["fid"]
        assert found["samplers"][name]["sampler"] == alone["sampler"]
    values = [section["fid"]["reference"]["values"] for section in found["samplers"].values()]
    assert set(values[0]).isdisjoint(values[1])


def test_velocity_networks_are_scored_under_both(settings: dict[str, Any]) -> None:
    options = {
        "model": "sit", "input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 8,
        "depth": 1, "num_heads": 2, "num_classes": 10, "learn_sigma": False,
    }  # fmt: skip
    network = mrl.build_model(options)
    base = SamplerConfig(num_steps=2, sde_num_steps=3)
    found = mrl.evaluate(network, **{**settings, "sampler": samplers_of(network, base)})
    samplers = {name: section["sampler"] for name, section in found["samplers"].items()}
    assert {name: s["solver"] for name, s in samplers.items()} == {
        "ode": "heun",
        "sde": "sde-euler",
    }
    assert {name: s["num_steps"] for name, s in samplers.items()} == {"ode": 2, "sde": 3}


def test_which_samplers(model: nn.Module) -> None:
    class Velocity:
        prediction = "velocity"

    base = SamplerConfig(num_steps=5)
    sde = SamplerConfig(solver="sde-heun", num_steps=7)
    assert samplers_of(model, base) == {"ode": base}
    assert samplers_of(model, sde) == {"sde": sde}
    assert list(samplers_of(Velocity())) == ["ode", "sde"]
    both = samplers_of(Velocity(), sde)
    assert (both["sde"], both["ode"].solver, both["ode"].num_steps) == (sde, "heun", 7)
    made = samplers_of(model, base, "sde")["sde"]
    assert (made.solver, made.num_steps) == ("sde-euler", base.sde_num_steps)
    with pytest.raises(UnknownNameError, match="unknown sampler 'odes'; did you mean 'ode'"):
        samplers_of(model, base, "odes")
