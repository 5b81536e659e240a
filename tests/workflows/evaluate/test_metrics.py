"""Metrics by name: the numbers of the core, on stated rows, or a refusal before any work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from merge_rl.core.distances.frechet import frechet_distance, frechet_infinity
from merge_rl.core.distances.intervals import mean_interval, summarize_repeats
from merge_rl.core.distances.kernels import RBFKernel, kernel_distance, median_bandwidth
from merge_rl.core.distances.neighbours import prdc
from merge_rl.core.distances.statistics import feature_stats
from merge_rl.errors import ConfigError, StatisticsError, TooFewSamplesError, UnknownNameError
from merge_rl.registry import METRICS
from merge_rl.rng import stream
from merge_rl.workflows.evaluate.metrics import MetricScores, some_rows
from merge_rl.workflows.reference.formats import Reference

pytestmark = pytest.mark.numerics


def draw(count: int, shift: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return shift + torch.randn(count, 4, generator=generator)


REAL, FAKE = draw(60, 0.0, 1), draw(80, 0.3, 2)


def reference(*, kept: Tensor | None = REAL) -> dict[str, tuple[Reference, str]]:
    return {"reference": (Reference(stats=feature_stats(REAL), features=kept), "real.safetensors")}


def test_all_metrics_are_those_of_the_core() -> None:
    found = MetricScores(list(METRICS), reference()).of(FAKE)
    values = {name: of["reference"] for name, of in found.items()}
    rbf = RBFKernel(median_bandwidth(REAL))
    drawn = some_rows(FAKE, 60, 0, "sample")  # as many as there are real ones
    order = torch.randperm(60, generator=stream(0, "halves"))
    halves = REAL[order[:30]], REAL[order[30:]]
    assert values == pytest.approx(
        {
            "fid": frechet_distance(feature_stats(FAKE), feature_stats(REAL)),
            "kid": kernel_distance(FAKE, REAL),
            "mmd": kernel_distance(FAKE, REAL, rbf),
            **prdc(REAL, drawn, 5)._asdict(),
            "fid-infinity": frechet_infinity(
                FAKE, feature_stats(REAL), generator=stream(0, "fid-infinity")
            ).value,
            # In units of what two random halves of the kept features are apart.
            "fd-mean": frechet_distance(feature_stats(FAKE), feature_stats(REAL))
            / frechet_distance(feature_stats(halves[0]), feature_stats(halves[1])),
        },
        rel=1e-9,
    )


def test_rows_are_drawn_by_the_seed() -> None:
    scores = [
        MetricScores(["kid"], reference(), max_rows=30, seed=seed).of(FAKE) for seed in (0, 0, 1)
    ]
    assert scores[0] == scores[1] != scores[2]
    real, fake = some_rows(REAL, 30, 1, "reference"), some_rows(FAKE, 30, 1, "sample")
    assert scores[2]["kid"]["reference"] == pytest.approx(kernel_distance(fake, real), rel=1e-9)
    assert len(fake.unique(dim=0)) == 30  # type: ignore[no-untyped-call]
    assert some_rows(FAKE, 80, 1, "sample") is FAKE


def test_what_is_said_about_rows() -> None:
    assert MetricScores(["fid", "fid-infinity"], reference()).rows_used is None
    assert MetricScores(["fid", "prdc"], reference(), max_rows=7).rows_used == 7


@pytest.mark.parametrize("metric", ["kid", "mmd", "prdc"])
def test_metrics_over_pairs_need_features(metric: str) -> None:
    message = rf"real\.safetensors: {metric} compares .* `mergerl reference --keep-features`"
    with pytest.raises(StatisticsError, match=message):
        MetricScores(["fid", metric], reference(kept=None))


@pytest.mark.parametrize(
    ("metrics", "settings", "error", "message"),
    [
        ([], {}, ConfigError, "at least one metric, got none"),
        (["fid", "kod"], {}, UnknownNameError, "unknown metric 'kod'; did you mean 'kid'"),
        (["fid"], {"max_rows": 1}, ConfigError, "at least 2 rows for pairs, got 1"),
    ],
)
def test_refused_settings(
    metrics: list[str], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MetricScores(metrics, reference(), **settings)


@pytest.mark.parametrize("metric", list(METRICS))
def test_never_a_score_for_a_failure(metric: str) -> None:
    scores = MetricScores([metric], reference())
    with pytest.raises(StatisticsError, match="finite features, got 1 of 80 rows"):
        scores.of(FAKE.index_fill(0, torch.tensor([3]), torch.nan))
    with pytest.raises(TooFewSamplesError):
        scores.of(FAKE[:1])
    with pytest.raises(StatisticsError):
        scores.of(FAKE[:, :3])


def test_the_summary_of_repeats() -> None:
    values = [2.0, 1.0, 4.0]
    found = summarize_repeats([{"fid": {"a": value, "b": -value}} for value in values])
    interval = mean_interval(values)
    assert found["fid"]["a"] == {
        "mean": interval.mean, "low": interval.low, "high": interval.high, "min": 1.0,
        "values": values,
    }  # fmt: skip
    assert found["fid"]["b"]["min"] == -4.0
    one = summarize_repeats([{"fid": {"a": 3.0}}])
    assert one["fid"]["a"] == {
        "mean": 3.0, "low": None, "high": None, "min": 3.0, "values": [3.0],
    }  # fmt: skip
