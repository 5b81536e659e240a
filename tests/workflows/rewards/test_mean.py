"""fd-mean: several encoders in one number, in units of what real images are apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from merge_rl import own_code
from merge_rl.config.reward import RewardTerm, parse_reward
from merge_rl.core.distances.frechet import frechet_distance
from merge_rl.core.distances.statistics import feature_stats
from merge_rl.errors import ConfigError, StatisticsError, UnknownNameError
from merge_rl.registry import EXTRACTORS
from merge_rl.workflows.assembly import extractors
from merge_rl.workflows.assembly.extractors import build_extractor, encoder_spans, weights_by_name
from merge_rl.workflows.assembly.references import expected_extractor
from merge_rl.workflows.evaluate.metrics import MetricScores
from merge_rl.workflows.reference import Reference
from merge_rl.workflows.rewards import Pool, RewardGradient, RewardSource, RewardSum, WeightedReward
from merge_rl.workflows.rewards.mean import MeanFrechet

pytestmark = pytest.mark.usefixtures("no_network_here")

SPANS = ((0, 2), (2, 5))


def images(count: int, seed: int, shift: float = 0.0) -> Tensor:
    """Five features, of which the last three are a thousand times as large."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, 5, generator=generator) + shift) * torch.tensor(
        [1, 1, 1e3, 1e3, 1e3]
    )


REAL, HELD = (Reference(stats=feature_stats(images(300, seed))) for seed in (1, 2))


def made(heldout: Reference | None = HELD) -> MeanFrechet:
    return MeanFrechet(RewardSource(name="m", reference=REAL, heldout=heldout, spans=SPANS))


def by_hand(features: Tensor) -> float:
    parts = []
    for first, stop in SPANS:
        own, real, held = (
            feature_stats(rows[:, first:stop])
            for rows in (features, images(300, 1), images(300, 2))
        )
        parts.append(frechet_distance(own, real) / frechet_distance(held, real))
    return float(sum(parts) / 2)


def test_it_is_the_mean_of_the_ratios() -> None:
    features = images(60, 3, 0.5)
    pool, fresh, rows = Pool.of(features, torch.zeros(60).long()), images(20, 4), torch.arange(20)
    reward = made()
    assert reward.pool_distance(pool) == pytest.approx(by_hand(features), rel=1e-6)
    assert reward.distance_of(features) == pytest.approx(by_hand(features), rel=1e-6)
    found = reward.rewards(pool, [(rows, torch.stack([fresh, fresh * torch.nan]))])
    replaced = torch.cat([fresh, features[20:]])
    assert float(found[0]) == pytest.approx(-by_hand(replaced), rel=1e-6)
    assert bool(found[1].isnan())
    assert made().distance_of(images(300, 2)) == pytest.approx(1)  # as far as real images are


def test_no_encoder_counts_for_more() -> None:
    # The same shift of either encoder's features, in their own units, costs about the same.
    base = images(300, 2)
    moved = [base.clone(), base.clone()]
    moved[0][:, :2] += 1
    moved[1][:, 2:] += 1e3
    first, second = (made().distance_of(features) for features in moved)
    assert 0.3 < first / second < 3


def test_its_gradient_is_that_of_the_pool() -> None:
    features = images(60, 3, 0.5).double()

    def pool(rows: Tensor) -> Pool:
        return Pool.of(rows, torch.zeros(60).long())

    reward = RewardSum([WeightedReward("fd-mean", 2.0, made(), 0, 5)])
    found = RewardGradient(reward, pool(features)).cotangents(features) * 60
    for row, column, step in ((0, 0, 1e-4), (7, 3, 0.1)):
        distances = []
        for sign in (1, -1):
            changed = features.clone()
            changed[row, column] += sign * step
            distances.append(reward.pool_distance(pool(changed)))
        expected = 60 * (distances[0] - distances[1]) / (2 * step)
        assert float(found[row, column]) == pytest.approx(expected, rel=1e-4)


def test_without_heldout_images_the_kept_features_are_halved() -> None:
    rows = images(300, 1)
    kept = Reference(stats=feature_stats(rows), features=rows)
    reward = MeanFrechet(RewardSource(name="m", reference=kept, spans=SPANS))
    assert 0.2 < reward.distance_of(images(150, 5)) < 5
    with pytest.raises(StatisticsError, match="expected held-out statistics .* or kept features"):
        MeanFrechet(RewardSource(name="m", reference=REAL, spans=SPANS))
    with pytest.raises(StatisticsError, match=r"features 0\.\.1 are those of the held-out images"):
        made(REAL)


def test_the_metric_is_the_same_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extractors.DIMS, "inception", 2)
    monkeypatch.setitem(extractors.DIMS, "dinov2", 3)
    references = {
        name: (Reference(stats=found.stats, extractor="inception,dinov2"), name)
        for name, found in (("reference", REAL), ("heldout", HELD))
    }
    features = images(60, 3, 0.5)
    found = MetricScores(["fd-mean"], references).of(features)
    assert found["fd-mean"]["reference"] == pytest.approx(by_hand(features), rel=1e-6)
    first = feature_stats(images(300, 1)[:, :2])
    own = frechet_distance(feature_stats(features[:, :2]), first)
    assert found["fd-inception"]["reference"] == pytest.approx(float(own), rel=1e-6)
    assert found["fd-mean"].keys() == found["fd-dinov2"].keys() == {"reference", "heldout"}


def test_names() -> None:
    assert parse_reward("0.5 * fd-mean + fd-mean:inception,dinov2-dgm") == (
        RewardTerm("fd-mean", "fd-mean", None, 0.5),
        RewardTerm("fd-mean:inception,dinov2-dgm", "fd-mean", "inception,dinov2-dgm", 1.0),
    )
    assert encoder_spans("inception,dinov2", 3072) == ((0, 2048), (2048, 3072))
    assert expected_extractor("inception,dinov2", None) == ("inception,dinov2", None, 3072)
    assert weights_by_name("digits,inception", "digits=a/b.safetensors") == {
        "digits": "a/b.safetensors"
    }
    with pytest.raises(ConfigError, match="'dinov2' comes twice"):
        expected_extractor("dinov2,inception,dinov2", None)
    assert encoder_spans("digits,mine:make,clip", 64 + 5 + 768) == ((0, 64), (64, 69), (69, 837))
    assert expected_extractor("inception,mine:make", None) is None
    with pytest.raises(ConfigError, match="one module at most among several, got mine:a, mine:b"):
        build_extractor("mine:a,inception,mine:b", None)
    with pytest.raises(ConfigError, match="expected more than 64 features of digits,mine:make, go"):
        encoder_spans("digits,mine:make", 64)
    with pytest.raises(UnknownNameError, match="incepton"):
        expected_extractor("incepton,dinov2", None)
    with pytest.raises(ConfigError, match="NAME=FILE with NAME one of digits, inception"):
        weights_by_name("digits,inception", "a.safetensors")
    with pytest.raises(ConfigError, match="expected 3072 features of inception,dinov2, got 5"):
        encoder_spans("inception,dinov2", 5)


class Means:
    """Stands for a natural extractor: means and deviations of grey pictures."""

    name, dim = "means", 3

    def __call__(self, pictures: Tensor) -> Tensor:
        values = pictures.float().flatten(1) / 255
        return torch.stack([values.mean(1), values.std(1), values[:, ::7].mean(1)], 1)


def make_means(_weights: object) -> Means:
    return Means()


@pytest.mark.parametrize("second", ["means", f"{__name__}:Means"])
def test_a_search_by_two_encoders(
    second: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, mergerl: Callable[..., Any]
) -> None:
    monkeypatch.setitem(EXTRACTORS, "means", f"{__name__}:make_means")
    monkeypatch.setitem(extractors.DIMS, "means", 3)
    weights = tiny / "evaluation/extractor.safetensors"
    monkeypatch.setitem(extractors.DEFAULT_WEIGHTS, "means", str(weights))
    images = torch.randint(256, (120, 1, 8, 8), dtype=torch.uint8)
    np.savez("real.npz", images=images.permute(0, 2, 3, 1).numpy())
    both = ("--extractor", f"digits,{second}", "--extractor-weights", f"digits={weights}")
    ended = mergerl("reference", "real.npz", "--out", "ref.safetensors", *both, "--split")
    assert ended.code == 0, ended.err
    scored = ("--reference", "ref-a.safetensors", "--heldout", "ref-b.safetensors")
    ended = mergerl(
        "optimize", tiny, "--track", "raw", "--out", "run", *both, *scored, "--reward", "fd-mean",
        "--pool", 30, "--subset", 6, "--budget", 300, "--searcher", "policy-gradient",
        "--set", "evaluation.num_images=20", "--set", "evaluation.selection_images=10",
        "--num-steps", 2,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    # All of it as the run says: both encoders, their weights, both halves.
    command = (
        "evaluate",
        "run/merged",
        "--metrics",
        "fd-mean",
        "--num-images",
        "20",
        "--repeats",
        "2",
        "--json",
    )
    named: tuple[str, ...] = ()
    if ":" in second:  # whose code the run alone does not let in
        monkeypatch.setattr(own_code, "_allowed", {})
        refused = mergerl(*command)
        assert f"pass --extractor digits,{second} to import it" in refused.err
        named = both[:2]
    ended = mergerl(*command, *named)
    assert ended.code == 0, ended.err
    assert f'"fd-{second}": ' in ended.out
    assert '"fd-digits": ' in ended.out
