"""What evaluations and comparisons return: typed, still the document, shown as its verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import merge_rl as mrl
from merge_rl.errors import ConfigError
from merge_rl.workflows.report import CompareResult, EvaluateResult, Score, SearcherScore

pytestmark = pytest.mark.usefixtures("no_network_here")


def summary(mean: float, half: float | None) -> dict[str, Any]:
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "low": low, "high": high, "min": mean - 1, "values": [mean - 1, mean + 1]}


def test_scores_are_typed_and_shown_with_their_intervals() -> None:
    document = {
        "kind": "model", "num_images": 5000, "repeats": 2, "seed": 0, "sampler": {"solver": "heun"},
        "fid": {"reference": summary(3.0, 0.25), "heldout": summary(4.0, None)},
    }  # fmt: skip
    found = EvaluateResult(document)
    assert found.score() == Score(3.0, 2.75, 3.25, 2.0, (2.0, 4.0))
    assert found.scores == {"": {"fid": {"reference": found.score(),
                                         "heldout": found.score(reference="heldout")}}}  # fmt: skip
    assert repr(found).splitlines() == [
        "FID 3.000 [2.750, 3.250], reference", "FID 4.000, held-out", "N = 5,000, 2 repeats",
    ]  # fmt: skip
    assert found["fid"]["reference"]["mean"] == 3.0
    assert found == document
    assert (found.num_images, found.notes) == (5000, ())


def test_several_samplers_have_their_names() -> None:
    section = {"sampler": {"solver": "heun"}, "kid": {"reference": summary(0.5, 0.1)}}
    found = EvaluateResult(
        {"kind": "model", "num_images": 10, "repeats": 2, "notes": ["few"],
         "samplers": {"ode": section, "sde": section}}
    )  # fmt: skip
    assert list(found.scores) == ["ode", "sde"]
    assert found.score("kid", sampler="sde").mean == 0.5
    assert "KID 0.500 [0.400, 0.600], reference (sde)" in repr(found)
    assert found.notes == ("few",)


def test_a_comparison_ranks_its_searchers() -> None:
    def line(name: str, values: list[float]) -> dict[str, Any]:
        spread = {"median": sum(values) / 2, "low": min(values), "high": max(values)}
        return {"searcher": name, "images": 90, "fid": {"heldout": {**spread, "values": values}}}

    found = CompareResult({
        "headline": "heldout", "seeds": [0, 1], "best_free": {"entry": "newest", "fid": 3.0},
        "searchers": [line("slow", [2.0, 2.2]), line("quick", [1.0, 1.2])],
    })  # fmt: skip
    assert found.ranking == [
        SearcherScore("quick", 1.1, 1.0, 1.2, 90), SearcherScore("slow", 2.1, 2.0, 2.2, 90),
    ]  # fmt: skip
    assert repr(found).startswith("quick found the best merges; ahead of slow (2.100)")


def test_a_run_is_evaluated_as_it_was_searched(shared_tiny: Path, tmp_path: Path) -> None:
    run = mrl.optimize(
        shared_tiny, out=tmp_path / "run", track="raw", budget=90, population=4, pool_size=40,
        subset_size=10, refresh_size=10, num_steps=2, progress=False, searcher="policy-gradient",
        evaluation={"num_images": 10, "repeats": 3, "selection_images": 10},
    ).run_dir  # fmt: skip
    settings: dict[str, Any] = {"num_images": 20, "repeats": 2, "seed": 5, "progress": False}
    found = mrl.evaluate(run, **settings)
    evaluation = shared_tiny / "evaluation"
    same = mrl.evaluate(
        mrl.load_model(run), reference=evaluation / "reference.safetensors",
        heldout=evaluation / "heldout.safetensors", extractor="digits",
        extractor_weights=str(evaluation / "extractor.safetensors"),
        sampler=mrl.SamplerConfig(num_steps=2), config=mrl.EvaluateConfig(num_images=20, repeats=2),
        seed=5, progress=False,
    )  # fmt: skip
    assert found.scores == same.scores
    assert list(found.scores[""]["fid"]) == ["reference", "heldout"]
    with pytest.raises(ConfigError, match="num_images is 10 in the call and 20 in its config"):
        mrl.evaluate(run, num_images=10, config=mrl.EvaluateConfig(num_images=20))
    with pytest.raises(ConfigError, match="no run or set for a network in memory names a refer"):
        mrl.evaluate(mrl.load_model(run), progress=False)
