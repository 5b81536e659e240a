"""The main job from checkpoints to merged model: what it writes, what it costs, what it scores."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import merge_rl as mrl
from merge_rl.config.mapping import load_config
from merge_rl.config.optimize import OptimizeConfig
from merge_rl.config.sampler import SamplerConfig
from merge_rl.core.distances.frechet import frechet_distance
from merge_rl.core.sampling.compatibility import balanced_labels
from merge_rl.errors import (
    BudgetError,
    ConfigError,
    MergeRLError,
    NonFiniteWeightsError,
    RunError,
    UnknownNameError,
)
from merge_rl.interfaces import NullTracker
from merge_rl.registry import build_autoencoder
from merge_rl.rng import image_seeds
from merge_rl.storage.checkpoints.model_file import open_model_file
from merge_rl.storage.files.safetensors_file import read_file
from merge_rl.workflows.assembly.extractors import build_extractor
from merge_rl.workflows.assembly.job import build_job
from merge_rl.workflows.export.recipe import Recipe
from merge_rl.workflows.optimize.result import OptimizeResult
from merge_rl.workflows.optimize.run import optimize, resume
from merge_rl.workflows.reference.file import load_reference
from merge_rl.workflows.rollout.rollout import MergedRollout, Rollout
from tests.quick import as_users_see_it

TinyConfig = Callable[..., OptimizeConfig]
Outcome = Callable[[Path], dict[str, object]]

FILES = {
    "config.yaml", "inputs.json", "events.jsonl", "state.safetensors", "scores.json", "result.json",
    "merged/model.safetensors", "merged/config.json", "merged/merge.yaml", "merged/README.md",
    "merged/mergekit.yaml", "report.html", "report.md",
    "before-after.png", "samples/start.png", "samples/result.png", "samples/samples.json",
}  # fmt: skip
ENTRIES = ["start", "uniform", "best single", "result"]


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished run that tests may look at but not change."""

    folder: Path
    config: OptimizeConfig
    result: OptimizeResult

    @property
    def run(self) -> Path:
        return self.result.run_dir

    @property
    def events(self) -> list[dict[str, Any]]:
        lines = (self.run / "events.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "result.json").read_text())
        return found


@pytest.fixture(scope="module")
def finished(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    config = tiny_config(shared_tiny, merge={"scale": 0.2})
    out = tmp_path_factory.mktemp("optimize") / "runs" / "a"
    with pytest.MonkeyPatch.context() as patch:
        as_users_see_it(patch)
        return Finished(shared_tiny, config, mrl.optimize(shared_tiny, out=out, config=config))


# ------------------------------------------------------------------------------ what is written


def test_every_promised_file_is_written_and_nothing_else(finished: Finished) -> None:
    found = {str(f.relative_to(finished.run)) for f in finished.run.rglob("*") if f.is_file()}
    assert found == FILES
    assert [path.name for path in finished.run.parent.iterdir()] == ["a"]


def grid_of(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image)


def test_both_ends_are_shown_on_equal_seeds(finished: Finished, tmp_path: Path) -> None:
    record = json.loads((finished.run / "samples/samples.json").read_text())
    seed = finished.config.seed
    assert record == {
        "height": 8, "width": 8, "columns": 10, "first_seed": seed, "labels": 3 * list(range(10)),
    }  # fmt: skip
    # The result's pictures are those of the model that was written, made from its file.
    config = load_config(OptimizeConfig, finished.run / "config.yaml")
    opened = mrl.open_checkpoints(config.checkpoints, track=config.track)
    job = build_job(config, opened)
    rollout = job.final_rollout.rollout.with_network(mrl.load_model(finished.run / "merged"))
    images = rollout.images(rollout.noise(range(seed, seed + 30)), balanced_labels(30, 10))
    shown = grid_of(finished.run / "samples/result.png")
    tiles = shown.reshape(3, 8, 10, 8).transpose(0, 2, 1, 3).reshape(30, 8, 8)
    assert np.abs(tiles.astype(int) - images[:, 0].numpy().astype(int)).max() <= 1
    assert (shown != grid_of(finished.run / "samples/start.png")).any()
    both = grid_of(finished.run / "before-after.png")  # 91 pixels wide, five times, and margins
    assert both.shape[1:] == (2 * 5 * 91 + 3 * 14, 3)


def test_the_held_out_curve_is_that_of_the_pool(finished: Finished) -> None:
    config = load_config(OptimizeConfig, finished.run / "config.yaml")
    heldout = load_reference(config.heldout or "").stats
    _, pool, _ = read_file(finished.run / "state.safetensors", hashed=False)
    (features,) = (value for name, value in pool.items() if name.endswith("pool.features"))
    expected = frechet_distance(mrl.feature_stats(features), heldout)
    assert finished.events[-1]["heldout"] == pytest.approx(expected, rel=1e-6)


def test_the_floor_is_between_real_images(finished: Finished) -> None:
    config = load_config(OptimizeConfig, finished.run / "config.yaml")
    real = [load_reference(path or "").stats for path in (config.reference, config.heldout)]
    assert finished.result.comparison.floor == pytest.approx(frechet_distance(*real), rel=1e-6)


def test_the_config_is_resolved(finished: Finished) -> None:
    written = load_config(OptimizeConfig, finished.run / "config.yaml")
    assert written.sampler == SamplerConfig(num_steps=2)  # as the manifest says
    assert written.extractor == "digits"
    evaluation = finished.folder.resolve() / "evaluation"
    assert written.extractor_weights == str(evaluation / "extractor.safetensors")
    assert written.reference == str(evaluation / "reference.safetensors")
    assert written.heldout == str(evaluation / "heldout.safetensors")
    assert written.checkpoints == str(finished.folder.resolve())
    assert written.reward.name == "fid-subset"  # as the searcher likes it
    resolved = (
        "sampler", "extractor", "extractor_weights", "reference", "heldout", "checkpoints", "reward"
    )  # fmt: skip
    given = {name: getattr(finished.config, name) for name in resolved}
    assert dataclasses.replace(written, **given) == finished.config


def test_the_inputs_are_hashed(finished: Finished) -> None:
    opened = mrl.open_checkpoints(finished.folder, track="raw")
    hashes = json.loads((finished.run / "inputs.json").read_text())["hashes"]
    recorded = {n: e.sha256 for n, e in zip(opened.names, opened.entries, strict=True)}
    assert hashes["checkpoints"] == recorded
    assert set(hashes) == {"checkpoints", "extractor_weights", "reference", "heldout", "guide"}
    assert hashes["guide"] is None


def test_one_event_a_round(finished: Finished) -> None:
    events, population = finished.events, finished.config.search.population or 0
    assert [event["round"] for event in events] == list(range(len(events)))
    assert len(events) == finished.document["rounds"] >= 3
    for event in events:
        assert event["kind"] == "round"
        assert len(event["theta"]) == 3
        assert [len(row) for row in event["coefficients"]] == [4]
        assert [len(theta) for theta in event["candidates"]] == [3] * population
        assert len(event["rewards"]) == population
        assert all(reward < 0 for reward in event["rewards"])
        assert event["failed"] == 0
        assert event["seconds"] > event["rollout_seconds"] > 0
        assert isinstance(event["gap"], float)
    # A pool is measured after its refresh, and before the next: the same pool.
    after = [event["pool_after"] for event in events[:-1]]
    assert after == [event["pool_before"] for event in events[1:]]


def test_coefficients_are_those_of_theta_and_sum_to_one(finished: Finished) -> None:
    for event in finished.events:
        (row,) = event["coefficients"]
        assert sum(row) == pytest.approx(1.0, abs=1e-12)
        # A unit step, in whitened directions, is no larger than the cap.
        moved = torch.tensor(row, dtype=torch.float64) - torch.tensor([0.0, 0, 0, 1]).double()
        assert 0 < float(moved.norm()) <= 0.5 * math.dist(event["theta"], [0.0] * 3) * 2
    (found,) = finished.document["coefficients"]
    assert found == finished.events[-1]["coefficients"][0]  # all of its samples were finite
    assert finished.result.coefficients.tolist() == [found]
    assert found != [0, 0, 0, 1]


# ------------------------------------------------------------------------------- what it costs


def count_rollouts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    original = MergedRollout.features

    def counted(self: MergedRollout, c: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        sizes.append(len(noise))
        return original(self, c, noise, labels)

    monkeypatch.setattr(MergedRollout, "features", counted)
    return sizes


@pytest.mark.parametrize("budget", [90, 139, 140, 189, 190])
def test_the_budget_counts_every_image(
    budget: int, tiny: Path, tiny_config: TinyConfig, tmp_path: Path, no_network: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # The pool costs 40, a round 4 candidates of 10 images and a refresh of 10.
    sizes = count_rollouts(monkeypatch)
    config = tiny_config(tiny, budget=budget)
    result = mrl.optimize(tiny, out=tmp_path / "run", config=config)
    rounds = (budget - 40) // 50
    final = [10] * 4 + [20] * 12  # single checkpoints; four models, three repeats
    assert sizes == [40, *([10] * 5 * rounds), *final]
    events = [json.loads(x) for x in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [event["images"] for event in events] == [90 + 50 * i for i in range(rounds)]
    assert [event["refreshed"] for event in events] == [10] * rounds
    assert result.images == 40 + 50 * rounds <= budget
    document = json.loads((tmp_path / "run/result.json").read_text())
    assert document["search_images"] == result.images


def test_subsets_and_replacements_multiply(
    tiny: Path, tiny_config: TinyConfig, tmp_path: Path, no_network: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sizes = count_rollouts(monkeypatch)
    reward = {"num_subsets": 2, "num_replacements": 3, "refresh_size": 7}
    config = tiny_config(tiny, budget=287, reward=reward)
    result = mrl.optimize(tiny, out=tmp_path / "run", config=config)
    assert sizes[: 1 + 4 * 6 + 1] == [40, *([10] * 24), 7]
    assert result.images == 287


def test_the_last_mean_is_the_result_though_the_pool_was_never_renewed(
    tiny: Path, tiny_config: TinyConfig, tmp_path: Path, no_network: None
) -> None:
    config = tiny_config(tiny, budget=120, reward={"refresh": "10"})
    result = mrl.optimize(tiny, out=tmp_path / "run", config=config)
    events = [json.loads(x) for x in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [event["refreshed"] for event in events] == [0, 0]
    assert result.coefficients.tolist() == events[-1]["coefficients"]


@pytest.mark.parametrize(
    ("reward", "needed"),
    [({}, 90), ({"refresh": "1"}, 120), ({"refresh": "2"}, 80), ({"num_subsets": 3}, 170)],
)
def test_a_budget_below_one_round_is_refused(
    reward: dict[str, Any], needed: int, tiny: Path, tiny_config: TinyConfig, tmp_path: Path,
    no_network: None,
) -> None:  # fmt: skip
    config = tiny_config(tiny, budget=needed - 1, reward=reward)
    with pytest.raises(
        BudgetError, match=rf"{needed - 1} images does not pay.* expected at least {needed}$"
    ):
        mrl.optimize(tiny, out=tmp_path / "run", config=config)
    assert not (tmp_path / "run").exists()
    result = mrl.optimize(
        tiny, out=tmp_path / "run", config=dataclasses.replace(config, budget=needed)
    )
    assert result.images == needed


# ------------------------------------------------------------------------- the final comparison


def test_four_models_are_compared(finished: Finished) -> None:
    comparison = finished.document["comparison"]
    assert list(comparison["entries"]) == ENTRIES
    assert comparison["num_images"] == 20
    assert comparison["repeats"] == 3
    assert comparison["headline"] == "heldout"
    for summary in comparison["entries"].values():
        for name in ("reference", "heldout"):
            values = summary[name]["values"]
            assert len(values) == len(set(values)) == 3
            assert summary[name]["mean"] == pytest.approx(sum(values) / 3)
            assert summary[name]["low"] < summary[name]["mean"] < summary[name]["high"]
            assert summary[name]["min"] == min(values)
    assert set(comparison["gain_over"]) == set(ENTRIES[:-1])
    entries = comparison["entries"]
    gained = comparison["gain_over"]["uniform"]["mean"]
    means = [entries[e]["heldout"]["mean"] for e in ("uniform", "result")]
    assert gained == pytest.approx(means[0] - means[1])
    assert finished.result.baseline == entries["start"]
    assert finished.result.final == entries["result"]


def test_the_best_single_checkpoint_is_the_best_on_seeds_of_its_own(finished: Finished) -> None:
    scores = json.loads((finished.run / "scores.json").read_text())
    selected = {
        key.removeprefix("select/"): score["reference"]
        for key, score in scores.items()
        if key.startswith("select/")
    }
    assert set(selected) == set(mrl.open_checkpoints(finished.folder, track="raw").names)
    assert (
        min(selected, key=lambda n: selected[n]) == finished.document["comparison"]["best_single"]
    )


@pytest.mark.usefixtures("no_network")
def test_all_models_are_scored_on_the_same_fresh_seeds(
    tiny: Path, tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Tensor, Tensor]] = []
    original = MergedRollout.features

    def recorded(self: MergedRollout, c: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        calls.append((noise, labels))
        return original(self, c, noise, labels)

    monkeypatch.setattr(MergedRollout, "features", recorded)
    mrl.optimize(tiny, out=tmp_path / "run", config=tiny_config(tiny, budget=90))
    *before, select, _, _, _ = [noise for noise, _ in calls[:-12]]
    final = [calls[-12 + 3 * i : len(calls) - 9 + 3 * i] for i in range(4)]
    for entry in final[1:]:
        for (noise, labels), (expected, classes) in zip(entry, final[0], strict=True):
            assert torch.equal(noise, expected)
            assert torch.equal(labels, classes)
    # Every image of the three repeats is new: not in another repeat, the selection or the search.
    fresh = torch.cat([noise for noise, _ in final[0]]).flatten(1)
    rest = torch.cat([*before, select]).flatten(1)
    assert len(torch.unique(fresh, dim=0)) == 60
    assert len(torch.unique(torch.cat([fresh, rest]), dim=0)) == 60 + len(torch.unique(rest, dim=0))


def test_the_merged_folder_makes_the_images_that_were_scored(finished: Finished) -> None:
    # From the files alone: network, extractor, statistics, and the seeds of repeat 1.
    model = mrl.load_model(finished.run / "merged")
    evaluation = finished.folder / "evaluation"
    extractor, _ = build_extractor("digits", str(evaluation / "extractor.safetensors"))
    rollout = Rollout(
        model, (1, 8, 8), sampler=SamplerConfig(num_steps=2), autoencoder=build_autoencoder(),
        extractor=extractor, batch=finished.config.batch,
    )  # fmt: skip
    noise = rollout.noise(image_seeds(20, finished.config.seed, "fresh", 1))
    stats = mrl.feature_stats(rollout.features(noise, balanced_labels(20, 10)))
    for name in ("reference", "heldout"):
        reference = load_reference(evaluation / f"{name}.safetensors").stats
        expected = finished.result.final[name]["values"][1]
        assert frechet_distance(stats, reference) == pytest.approx(expected, rel=1e-6)


def test_a_model_whose_samples_are_not_finite_has_no_score(
    tiny: Path, tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The uniform average fails; the run still ends, with null for what could not be scored.
    original = MergedRollout.features

    def failing(self: MergedRollout, c: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        features = original(self, c, noise, labels)
        if torch.equal(c, torch.full_like(c, 0.25)):
            features[3] = torch.nan
        return features

    monkeypatch.setattr(MergedRollout, "features", failing)
    out = tmp_path / "run"
    result = mrl.optimize(tiny, out=out, config=tiny_config(tiny, budget=90))
    comparison = json.loads((out / "result.json").read_text())["comparison"]
    nothing = {"mean": None, "low": None, "high": None, "min": None, "values": [None] * 3}
    assert comparison["entries"]["uniform"] == {"reference": nothing, "heldout": nothing}
    assert comparison["gain_over"]["uniform"] == {"mean": None, "low": None, "high": None}
    assert comparison["entries"]["result"] == result.final
    assert result.comparison.gain("start").mean == comparison["gain_over"]["start"]["mean"]
    assert "nan" not in (out / "merged/merge.yaml").read_text()


# ------------------------------------------------------------------------------ the merged model


@pytest.mark.usefixtures("no_network")
def test_stages_have_coefficients_of_their_own(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = tiny_config(shared_tiny, merge={"grouping": "stages"})
    mrl.optimize(shared_tiny, out=tmp_path / "run", config=config)
    found = json.loads((tmp_path / "run/result.json").read_text())
    written = load_config(OptimizeConfig, tmp_path / "run/config.yaml")
    assert found["groups"] == list(written.merge.groups)
    assert found["groups"][0].startswith("enc ")
    rows = torch.tensor(found["coefficients"])
    assert len(rows) == len(found["groups"])
    assert not torch.allclose(rows[0], rows[1])
    opened = mrl.open_checkpoints(shared_tiny, track="raw")
    recipe = Recipe(tmp_path / "run/merged/merge.yaml")
    made = mrl.merge(opened, recipe.coefficients(opened), groups=recipe.groups, base=recipe.base)
    _, stored, _ = read_file(tmp_path / "run/merged/model.safetensors", hashed=False)
    assert all(torch.equal(stored[name], tensor) for name, tensor in made.items())


@pytest.mark.numerics
def test_the_recipe_makes_the_same_weights_bit_for_bit(finished: Finished) -> None:
    opened = mrl.open_checkpoints(finished.folder, track="raw")
    recipe = Recipe(finished.run / "merged/merge.yaml")
    made = mrl.merge(opened, recipe.coefficients(opened), groups=recipe.groups, base=recipe.base)
    _, stored, _ = read_file(finished.run / "merged/model.safetensors", hashed=False)
    assert list(made) == list(opened.tensors)
    assert set(made) == set(stored)
    for name, tensor in made.items():
        assert stored[name].dtype == torch.float32
        assert torch.equal(stored[name], tensor), name


def test_the_weights_are_the_weighted_sum(finished: Finished) -> None:
    # Computed here in float64, tensor by tensor; what the network keeps as buffers is not averaged.
    opened = mrl.open_checkpoints(finished.folder, track="raw")
    (row,) = finished.document["coefficients"]
    sources = [opened.read(i) for i in range(4)]
    merged = open_model_file(finished.run / "merged")
    assert merged.config == opened.config
    for name, tensor in merged.weights.items():
        total = sum(c * source[name].double() for c, source in zip(row, sources, strict=True))
        expected = sources[3][name].double() if "fourier" in name else total
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_card_says_what_was_found(finished: Finished) -> None:
    card = (finished.run / "merged/README.md").read_text()
    assert card.startswith("---\n")
    assert "license: mit" in card
    summary = finished.result.final["heldout"]
    assert f"{summary['mean']:.3f} [{summary['low']:.3f}, {summary['high']:.3f}]" in card
    assert "N = 20 images, 3 repeats" in card
    for value in finished.result.coefficients[0].tolist():
        assert f"{value:+.4f}" in card


# ------------------------------------------------------------------------------------ randomness


@pytest.fixture(scope="module")
def few(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Another one, of no more images than it takes."""
    evaluation = dataclasses.replace(finished.config.evaluation, num_images=4, selection_images=4)
    reward = dataclasses.replace(
        finished.config.reward, pool_size=10, subset_size=5, refresh_size=5
    )
    config = dataclasses.replace(finished.config, budget=35, evaluation=evaluation, reward=reward)
    out = tmp_path_factory.mktemp("few") / "run"
    return Finished(finished.folder, config, mrl.optimize(finished.folder, out=out, config=config))


@pytest.mark.numerics
def test_the_same_seed_is_the_same_run_and_another_is_not(
    few: Finished, outcome: Outcome, tmp_path: Path
) -> None:
    with torch.random.fork_rng(devices=[]):  # the global generator plays no part
        torch.manual_seed(123)
        again = mrl.optimize(few.folder, out=tmp_path / "b", config=few.config)
    assert outcome(again.run_dir) == outcome(few.run)
    config = dataclasses.replace(few.config, seed=6)
    other = mrl.optimize(few.folder, out=tmp_path / "c", config=config)
    assert not torch.equal(other.coefficients, few.result.coefficients)
    scores = [r.final["reference"]["values"] for r in (other, few.result)]
    assert set(scores[0]).isdisjoint(scores[1])


def test_the_batch_changes_no_decision(few: Finished, tmp_path: Path) -> None:
    config = dataclasses.replace(few.config, batch=3)
    found = mrl.optimize(few.folder, out=tmp_path / "run", config=config)
    # Sums over another batch may round in another way, so equal up to rounding.
    torch.testing.assert_close(found.coefficients, few.result.coefficients, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("no_network")
def test_candidates_of_a_round_share_their_noise(
    tiny: Path, tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    original = MergedRollout.features

    def recorded(self: MergedRollout, c: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        calls.append((c, noise, labels))
        return original(self, c, noise, labels)

    monkeypatch.setattr(MergedRollout, "features", recorded)
    config = tiny_config(tiny, evaluation={})
    mrl.optimize(tiny, out=tmp_path / "run", config=config)
    search = calls[1:16]  # three rounds of four candidates and a refresh
    seen = [calls[0][1]]
    for index in range(3):
        candidates, refresh = search[5 * index : 5 * index + 4], search[5 * index + 4]
        for coefficients, noise, labels in candidates[1:]:
            assert torch.equal(noise, candidates[0][1])
            assert torch.equal(labels, candidates[0][2])
            assert not torch.equal(coefficients, candidates[0][0])
        seen += [candidates[0][1], refresh[1]]
    rows = torch.cat(seen).flatten(1)
    assert len(torch.unique(rows, dim=0)) == len(rows) == 40 + 3 * 20  # nothing is drawn twice


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"track": "rew"}, UnknownNameError, "unknown track 'rew'; did you mean 'raw'"),
        ({"extractor": "digit"}, UnknownNameError, "unknown extractor 'digit'; did you mean 'digi"),
        ({"merge": {"map": "afine"}}, UnknownNameError, "coefficient map 'afine'; did you mean 'a"),
        ({"merge": {"start": "newst"}}, UnknownNameError, "checkpoint 'newst'; did you mean 'new"),
        ({"merge": {"start": "tiny-0000101"}}, UnknownNameError, "did you mean 'tiny-0000100'"),
        ({"merge": {"groups": {"a": "("}}}, ConfigError, "regular expression for group 'a'"),
        ({"merge": {"map": "ema"}}, ConfigError, "ema_std of all 4 checkpoints.* got 0"),
        ({"search": {"policy": "dirct"}}, UnknownNameError, "policy 'dirct'; did you mean 'dir"),
        ({"search": {"name": "cmaes"}}, UnknownNameError, "unknown searcher 'cmaes'"),
        ({"reward": {"name": "fid-subst", "pool_size": 40, "subset_size": 10}}, UnknownNameError,
         "unknown reward 'fid-subst'; did you mean 'fid-subset'"),
        ({"sampler": SamplerConfig(solver="hein")}, UnknownNameError, "did you mean 'heun'"),
        ({"sampler": SamplerConfig(sigma_min=3.0, sigma_max=2.0)}, ConfigError, "sigma"),
        ({"reference": "nowhere.safetensors"}, MergeRLError, "nowhere.safetensors: no such file"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_written(
    changes: dict[str, Any], error: type[MergeRLError], message: str, tiny: Path,
    tiny_config: TinyConfig, tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        mrl.optimize(tiny, out=tmp_path / "runs/a", config=tiny_config(tiny, **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_an_existing_run_is_refused_untouched(finished: Finished, outcome: Outcome) -> None:
    before = outcome(finished.run)
    with pytest.raises(RunError, match="exists already"):
        mrl.optimize(finished.folder, out=finished.run, config=finished.config)
    assert outcome(finished.run) == before


def test_a_set_that_names_no_extractor_asks_for_one(
    tiny: Path, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    (tiny / "raw").rename(bare)
    with pytest.raises(ConfigError, match="no default for an extractor; pass --extractor"):
        mrl.optimize(bare, out=tmp_path / "run", config=tiny_config(bare, track=None))
    assert not (tmp_path / "run").exists()


def test_a_start_that_fails_leaves_no_folder_in_the_way(
    shared_tiny: Path, tmp_path: Path, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(self: Rollout, noise: Tensor, labels: Tensor) -> Tensor:
        return torch.full((len(noise), 64), math.nan)

    monkeypatch.setattr(Rollout, "features", failed)
    with pytest.raises(NonFiniteWeightsError, match="starting point"):
        optimize(shared_tiny, out=tmp_path / "run", config=tiny_config(shared_tiny))
    assert list(tmp_path.iterdir()) == []


def test_resuming_with_another_version_warns(
    shared_tiny: Path, tmp_path: Path, tiny_config: TinyConfig, no_network: None
) -> None:
    class Heard(NullTracker):
        def __init__(self) -> None:
            self.warnings: list[str] = []
            self.notes: list[str] = []

        def event(self, event: Mapping[str, Any]) -> None:
            if event["kind"] in ("warning", "note"):
                {"warning": self.warnings, "note": self.notes}[event["kind"]].append(event["text"])

    run, heard = tmp_path / "run", Heard()
    optimize(shared_tiny, out=run, config=tiny_config(shared_tiny), tracker=heard)
    cost, doubt, page = heard.notes
    assert page.startswith("no plot: a plot needs the library matplotlib")
    assert cost.startswith("494 images in all, about ")
    assert doubt == (
        "the pool has 40 images for 64 features: the covariance is singular, and a Fréchet "
        "distance says little"
    )
    resume(run, tracker=heard)
    assert heard.warnings == []
    inputs = json.loads((run / "inputs.json").read_text())
    (run / "inputs.json").write_text(json.dumps({**inputs, "version": "0.0.1"}))
    resume(run, tracker=heard)
    assert len(heard.warnings) == 1
    assert "began with merge_rl 0.0.1, this is" in heard.warnings[0]
