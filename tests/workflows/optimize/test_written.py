"""What becomes the merged model: never a result that is worse than its start, or has no score."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merge_rl as mrl
from merge_rl.config.optimize import OptimizeConfig
from merge_rl.errors import StatisticsError
from merge_rl.features.digits import DigitsNet
from merge_rl.workflows.evaluate.final_scores import Comparison, compare
from merge_rl.workflows.optimize import run
from merge_rl.workflows.report import write_report
from merge_rl.workflows.rollout import Failures

pytestmark = pytest.mark.usefixtures("no_network_here")

TinyConfig = Callable[..., OptimizeConfig]


def scores(*values: float) -> list[dict[str, float]]:
    return [{"reference": value} for value in values]


def compared(start: list[float], result: list[float], **more: Any) -> Comparison:
    others = {entry: scores(1.0, 1.0, 1.0) for entry in ("uniform", "best single")}
    table = {"start": scores(*start), **others, "result": scores(*result)}
    return Comparison(10, "a", table, **more)


@pytest.mark.parametrize(
    ("result", "written"),
    [
        # Differences -1, -2, -3: mean -2, half-width t(0.975, 2) / sqrt(3) = 2.484: not below 0.
        ([2.0, 4.0, 6.0], "result"),
        # -1.9, -2, -2.1: half-width 0.248.
        ([2.9, 4.0, 5.1], "start"),
        ([0.9, 1.0, 1.1], "result"),
    ],
)
def test_worse_is_worse_beyond_the_interval(result: list[float], written: str) -> None:
    found = compared([1.0, 2.0, 3.0], result)
    assert found.written == found.as_dict()["written"] == written
    assert compared([1.0, 2.0, 3.0], result, keep_worse=True).written == "result"
    said = [text for text in found.warnings if "the start is written in its place" in text]
    assert len(said) == (written == "start")


def test_no_score_is_no_result() -> None:
    lost = compared([1.0, 2.0, 3.0], [1.0, math.nan, 1.0], failures={"result": "7 of 30"})
    assert lost.written == "start"
    assert lost.warnings[:2] == [
        "no score of the result: 7 of 30",
        "the result has no score: the start is written in its place (--keep-worse)",
    ]
    found = compared([1.0, math.nan, 3.0], [1.0, 1.0, 1.0], failures={"start": "7 of 30"})
    assert found.written == "result"


def test_the_start_is_exported_and_all_say_so(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(*arguments: Any) -> Comparison:
        found = compare(*arguments)
        rows = [{name: v + 1 for name, v in row.items()} for row in found.scores["start"]]
        return dataclasses.replace(found, scores={**found.scores, "result": rows})

    monkeypatch.setattr(run, "compare", worse)
    results, exported = {}, {}
    for keep in (False, True):
        evaluation = {"keep_worse": keep, "num_images": 20, "selection_images": 10, "repeats": 3}
        out = tmp_path / str(keep)
        merge = {"start": "newest", "grouping": "one"}
        config = tiny_config(shared_tiny, merge=merge, evaluation=evaluation)
        results[keep] = mrl.optimize(shared_tiny, out=out, config=config)
        exported[keep] = mrl.load_model(out / "merged").state_dict()
        assert json.loads((out / "result.json").read_text())["comparison"]["written"] == (
            "result" if keep else "start"
        )
        card, page = (out / "merged/README.md").read_text(), write_report(out).html.read_text()
        for text in (card, page):
            assert ("the result is worse than its start" in text) is not keep
    newest = mrl.open_checkpoints(shared_tiny, track="raw")
    plain = mrl.merge(newest, [0.0, 0.0, 0.0, 1.0])
    assert all(torch.equal(exported[False][name], plain[name]) for name in plain)
    assert torch.equal(results[True].coefficients, results[False].coefficients)
    assert any(not torch.equal(exported[True][name], plain[name]) for name in plain)


# ----------------------------------------------------------------------------- whose doing it is


def test_failures_are_told_apart() -> None:
    rows = torch.ones(6, 3)
    rows[1], rows[4, 0], rows[5] = math.nan, math.inf, math.inf
    found = Failures.of(rows)
    assert found == Failures(samples=1, features=2, count=6)
    assert found.said("mine") == (
        "the model makes samples that are not finite for 1 of 6 images; "
        "the extractor mine gives features that are not finite for 2 of 6 images"
    )
    assert not Failures.of(torch.ones(2, 3))


def now_and_then(monkeypatch: pytest.MonkeyPatch, calls: Callable[[int], bool]) -> None:
    """An extractor whose first answer of some calls is infinite."""
    own, made = DigitsNet.forward, list[int]()

    def forward(self: DigitsNet, images: Tensor) -> Tensor:
        features = own(self, images)
        made.append(len(images))
        if calls(len(made)):
            features = features.clone()
            features[0, 3] = math.inf
        return features

    monkeypatch.setattr(DigitsNet, "forward", forward)


def test_an_extractor_that_fails_from_the_start_is_named(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_and_then(monkeypatch, lambda _call: True)
    with pytest.raises(
        StatisticsError,
        match=r"no score of the starting point: the extractor digits gives features that are not "
        r"finite for \d of 40 images$",
    ):
        mrl.optimize(shared_tiny, out=tmp_path / "run", config=tiny_config(shared_tiny))
    assert not (tmp_path / "run").exists()


def test_an_extractor_that_fails_at_the_end_costs_the_merge(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[int]()

    def noted(call: int) -> bool:
        calls.append(call)
        return False

    with monkeypatch.context() as patch:
        now_and_then(patch, noted)
        whole = mrl.optimize(shared_tiny, out=tmp_path / "whole", config=tiny_config(shared_tiny))
    config = tiny_config(shared_tiny)
    with monkeypatch.context() as patch:  # of the last 12 scores the last 3 are the result's
        now_and_then(patch, lambda call: call > len(calls) - 3)
        found = mrl.optimize(shared_tiny, out=tmp_path / "result", config=config)
    assert found.comparison.written == "start"
    assert found.comparison.warnings[0] == (
        "no score of the result: the extractor digits gives features that are not finite for 3 of "
        "60 images"
    )
    card = (tmp_path / "result/merged/README.md").read_text()
    assert "for 3 of 60 images" in card
    assert "| result | not finite |" in card
    assert "nan" not in card.split("## Coefficients")[0]
    with monkeypatch.context() as patch:
        now_and_then(patch, lambda call: call > len(calls) - 12)
        with pytest.raises(StatisticsError, match="no score of the start or of the result"):
            mrl.optimize(shared_tiny, out=tmp_path / "none", config=config)
    assert not (tmp_path / "none/merged").exists()
    again = mrl.resume(tmp_path / "none")  # once the extractor is mended
    assert isinstance(again, mrl.OptimizeResult)
    assert again.comparison.scores == whole.comparison.scores
