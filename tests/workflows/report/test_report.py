"""What a run tells of itself: honest sentences, a page, a plot."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import merge_rl as mrl
from merge_rl.config.optimize import OptimizeConfig
from merge_rl.core.distances.kernels import kernel_distance
from merge_rl.core.sampling.compatibility import balanced_labels
from merge_rl.errors import RunError
from merge_rl.rng import image_seeds
from merge_rl.storage.runs.run_dir import RunDir
from merge_rl.workflows.assembly.job import build_job
from merge_rl.workflows.assembly.resolve import resolve_config
from merge_rl.workflows.evaluate.final_scores import Comparison, SecondScores, comparison_from
from merge_rl.workflows.evaluate.score_store import SecondMetric
from merge_rl.workflows.optimize.result import OptimizeResult
from merge_rl.workflows.reference.file import load_reference, save_reference
from merge_rl.workflows.reference.formats import Reference
from merge_rl.workflows.report import Report, run_verdict, write_report
from merge_rl.workflows.report.run_page import costs, optimism_text, search_lines
from tests.quick import draw_figures

pytestmark = pytest.mark.usefixtures("no_network_here")

TinyConfig = Callable[..., OptimizeConfig]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def finished(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path_factory: pytest.TempPathFactory
) -> OptimizeResult:
    """A run with a choice of start and finalists, and a reference that keeps features."""
    folder = tmp_path_factory.mktemp("report")
    kept = folder / "kept.safetensors"
    plain = load_reference(shared_tiny / "evaluation/reference.safetensors")
    draw = torch.randn(60, plain.dim, generator=torch.Generator().manual_seed(2))
    save_reference(
        kept, plain.stats, extractor=plain.extractor, extractor_sha256=plain.extractor_sha256,
        features=draw,
    )  # fmt: skip
    config = tiny_config(
        shared_tiny, budget=3000, merge={"start": "auto"}, reward={"name": "fid-subset"},
        search={"start_share": 0.3, "final_share": 0.4, "incumbents": 1},
        reference=str(kept), heldout=str(shared_tiny / "evaluation/heldout.safetensors"),
    )  # fmt: skip
    return mrl.optimize(shared_tiny, out=folder / "run", config=config)


def document(result: OptimizeResult) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((result.run_dir / "result.json").read_text())
    return found


# ------------------------------------------------------------------------------ the second metric


def test_the_second_metric_is_kid_of_the_same_images(finished: OptimizeResult) -> None:
    second = finished.comparison.second
    assert second is not None
    run = finished.run_dir
    config = RunDir.open(run).config()
    opened = mrl.open_checkpoints(config.checkpoints, track="raw")
    job = build_job(resolve_config(config, opened), opened)
    merged = job.final_rollout
    noise = merged.rollout.noise(image_seeds(20, config.seed, "fresh", 1))
    features = merged.features(finished.coefficients, noise, balanced_labels(20, job.num_classes))
    real = job.references["reference"].features
    assert real is not None
    assert second.scores["result"][1] == pytest.approx(kernel_distance(features, real), rel=1e-9)
    assert document(finished)["comparison"]["second"] == second.as_dict()


def test_without_kept_features_moments_do(
    tiny: Path, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    result = mrl.optimize(tiny, out=tmp_path / "run", config=tiny_config(tiny, budget=90))
    found = document(result)["comparison"]["second"]
    assert found["metric"] == "quadratic-mmd"
    assert all(len(entry["values"]) == 3 for entry in found["entries"].values())


def test_a_sample_that_is_not_finite_has_no_second_score() -> None:
    draw = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    stats = mrl.feature_stats(draw)
    metric = SecondMetric(Reference(stats=stats, features=draw), "cpu")
    assert metric.score(draw + 1) > 0
    assert math.isnan(metric.score(torch.full((4, 3), math.nan)))


def test_a_comparison_survives_plain_data(finished: OptimizeResult) -> None:
    plain = json.loads(json.dumps(dataclasses.asdict(finished.comparison)))
    assert comparison_from(plain) == finished.comparison


# ------------------------------------------------------------------------------------ the warning


def comparison(heldout: float, kid: float | None) -> Comparison:
    """Reference FID gained 1, held-out FID and KID as said, give or take a tenth."""
    noise = (-0.1, 0.0, 0.1)

    def scores(level: float) -> list[dict[str, float]]:
        return [{"reference": 5 - level, "heldout": 5 - level * heldout + n} for n in noise]

    second = None
    if kid is not None:
        values = {"start": [2.0, 2.0, 2.0], "result": [2 - kid + n for n in noise]}
        second = SecondScores("kid", values)
    start = [{"reference": 5 + n, "heldout": 5.0} for n in noise]
    table = {"start": start, "uniform": start, "best single": start, "result": scores(1.0)}
    return Comparison(20, "a", table, None, second)


def test_a_gain_that_others_share_needs_no_warning() -> None:
    assert comparison(1.0, None).warnings == []
    assert comparison(1.0, 1.0).warnings == []


def test_a_gain_of_the_optimised_metric_alone_is_warned_of() -> None:
    (text,) = comparison(0.0, None).warnings
    assert text.startswith("FID to the reference improved by +1 [")
    assert "but held-out FID did not, " in text
    (text,) = comparison(1.0, -1.0).warnings
    assert "but KID to the reference did not, -1 [" in text
    doubts = [text for text in comparison(-1.0, 0.0).warnings if "the gain may be one of" in text]
    assert len(doubts) == 2


def test_where_nothing_was_gained_nothing_is_warned_of() -> None:
    same = comparison(0.0, 0.0)
    table = {**same.scores, "result": same.scores["start"]}
    assert dataclasses.replace(same, scores=table).warnings == []


# ------------------------------------------------------------------------------------ the sentences


@pytest.mark.parametrize(("low", "high", "said"), [
    (-0.3, -0.1, "-0.200 [-0.300, -0.100], flattered by its seeds"),
    (-0.3, 0.1, "-0.200 [-0.300, +0.100], not clearly flattered by its seeds"),
    (0.1, 0.3, "-0.200 [+0.100, +0.300], its seeds were hard on it"),
])  # fmt: skip
def test_the_sign_of_an_optimism_is_said(low: float, high: float, said: str) -> None:
    assert optimism_text({"optimism": -0.2, "optimism_interval": [low, high]}) == said
    assert optimism_text({"optimism": -0.2}) == "-0.200, below 0 where its seeds flattered it"


def test_a_search_in_sentences(finished: OptimizeResult) -> None:
    found = document(finished)
    began, chose, spent = search_lines(found)
    start, final = found["start"], found["final"]
    assert began == (
        f"began at {start['label']}, the best of 4 merges that cost no search "
        f"(FID {start['score']:.3f} at N = {start['images_each']})"
    )
    assert f"chose {final['chosen']} of 4 finalists" in chose
    if final["chosen"] == "start":
        assert final["optimism"] is None
        assert "optimism" not in chose
    else:
        # Result and start on three more sets of seeds, and the start on those of the last rung.
        known = "start" in final["rungs"][-1]
        assert final["again_images"] == (6 if known else 7) * final["images_each"]
        low, high = final["optimism_interval"]
        assert low < final["optimism"] < high
        assert f"optimism {final['optimism']:+.3f} [{low:+.3f}, {high:+.3f}]" in chose
    images = found["images"]
    assert sum(images.values()) == found["search_images"] == finished.images
    assert images["final"] == sum(
        final["images_each"] // 2 ** (len(final["rungs"]) - 1 - i) * len(rung)
        for i, rung in enumerate(final["rungs"])
    )
    assert f"{images['rounds']:,} in {found['rounds']} rounds" in spent


def test_time_outside_sampling() -> None:
    events = [{"seconds": 3.0, "rollout_seconds": 2.0}, {"seconds": 1.0, "rollout_seconds": 1.0}]
    assert costs(events) == ["the rounds took 4 s, 25.0% outside sampling and features"]
    assert costs([{"seconds": 3.0}]) == []  # of a run that did not count it


# ----------------------------------------------------------------------------------------- the page


def text_of(written: Report) -> str:
    """The page in Markdown."""
    assert written.page is not None
    return written.page.read_text()


def test_the_page_of_a_run(finished: OptimizeResult, figures: None, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run_dir, run)
    written = write_report(run)
    assert (written.page, written.picture) == (run / "report.md", run / "report.png")
    assert (run / "report.png").read_bytes()[:8] == PNG
    text, found = text_of(written), document(finished)
    assert f"**{run_verdict(found['comparison'])}**" in text
    fid = found["comparison"]["entries"]["result"]["heldout"]
    assert f"{fid['mean']:.3f} [{fid['low']:.3f}, {fid['high']:.3f}]" in text
    for line in search_lines(found):
        assert f"- {line}\n" in text
    assert "KID to the reference: start " in text
    assert f"Chosen: {found['final']['chosen']}, {found['final']['score']:.3f} at N" in text
    for index, name in enumerate(found["checkpoints"]):
        before, after = found["start"]["coefficients"][0][index], found["coefficients"][0][index]
        assert f"| {name} | {before:+.4f} | {after:+.4f} |" in text
    assert "![the search](report.png)" in text


def test_the_page_of_a_merge_by_stages(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(shared_tiny, budget=90, merge={"grouping": "stages"})
    result = mrl.optimize(shared_tiny, out=tmp_path / "run", config=config)
    draw_figures(monkeypatch)  # once, not at every round
    found = document(result)
    report = write_report(tmp_path / "run")
    text = text_of(report)
    # The start is the same for all groups, and said once.
    assert f"| checkpoint | start | {' | '.join(found['groups'])} |" in text
    for index, name in enumerate(found["checkpoints"]):
        rows = [found["start"]["coefficients"][0], *found["coefficients"]]
        assert f"| {name} | {' | '.join(f'{row[index]:+.4f}' for row in rows)} |" in text
    assert "each group of tensors sums to 1.0000." in text
    assert report.picture is not None
    assert report.picture.read_bytes().startswith(PNG)


def test_the_page_of_a_run_that_goes_on(finished: OptimizeResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run_dir, run)
    (run / "result.json").unlink()
    text = text_of(write_report(run))
    assert f"Not finished: {document(finished)['rounds']} rounds" in text
    (run / "events.jsonl").unlink()
    assert "Not finished: no round so far." in text_of(write_report(run))


def test_a_reward_without_a_pool_has_a_plot(
    tiny: Path, tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny, budget=90, reward={"name": "fid-full", "pool_size": 40})
    result = mrl.optimize(tiny, out=tmp_path / "run", config=config)
    draw_figures(monkeypatch)
    assert write_report(result.run_dir).picture is not None


def test_without_the_library_there_is_a_page(finished: OptimizeResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run_dir, run)
    written = write_report(run)
    assert written.picture is None
    assert "pip install 'merge_rl[report]'" in (written.note or "")
    assert "report.png" not in text_of(written)
    assert not (run / "report.png").exists()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run directory"):
        write_report(tmp_path / "none")
    with pytest.raises(RunError, match="not a run directory"):
        write_report(tmp_path)
