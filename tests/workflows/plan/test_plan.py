"""What a search costs, told beforehand, against what a search then does."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from torch import Tensor

import merge_rl as mrl
from merge_rl.config.optimize import AUTO_BATCH, OptimizeConfig
from merge_rl.config.sampler import SamplerConfig
from merge_rl.errors import BudgetError, OutOfMemoryError
from merge_rl.interfaces import NullTracker
from merge_rl.storage.checkpoints.checkpoint_set import CheckpointSet, open_checkpoints
from merge_rl.workflows.assembly import costs, references
from merge_rl.workflows.assembly.costs import cost_parts
from merge_rl.workflows.assembly.memory import MOST_ON_CPU, fit_batch, plan_memory
from merge_rl.workflows.assembly.resolve import resolve_config
from merge_rl.workflows.optimize import WorkStage, budget, prepare, search, search_workload
from merge_rl.workflows.plan import calibration
from merge_rl.workflows.plan.calibration import ImageTime
from merge_rl.workflows.plan.run import plan
from merge_rl.workflows.plan.work import Speeds
from merge_rl.workflows.rollout import calls_an_image, timing
from merge_rl.workflows.rollout.differentiable import (
    Cotangents,
    DifferentiableRollout,
    Differentiated,
)
from merge_rl.workflows.rollout.rollout import MergedRollout, Rollout, WorkItem
from tests.quick import as_users_see_it

TinyConfig = Callable[..., OptimizeConfig]


class Ended(NamedTuple):
    """How a command ended, as the fixture `mergerl` gives it."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def opened(shared_tiny: Path) -> CheckpointSet:
    return open_checkpoints(shared_tiny, track="raw")


@pytest.fixture(scope="module")
def resolved(shared_tiny: Path, opened: CheckpointSet, tiny_config: TinyConfig) -> OptimizeConfig:
    return resolve_config(tiny_config(shared_tiny, budget=1500), opened)


@pytest.fixture(autouse=True, scope="module")
def _counted_once() -> Iterator[None]:
    """What networks cost is looked at elsewhere: here those of one kind are counted once."""
    count, counted = costs._costs, dict[object, Any]()

    def once(model: Mapping[str, Any], rollout: Rollout) -> Any:
        parts = (rollout.guide, rollout.autoencoder, rollout.extractor)
        key = (str(model), rollout.shape, rollout.device.type, *map(type, parts))
        return counted[key] if key in counted else counted.setdefault(key, count(model, rollout))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "_costs", once)
        yield


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose speed is known: 1 ms an image in 1 call, 10 ms for all else."""
    times = ImageTime(0.0, 0.001, 0.0, 0.002)
    monkeypatch.setattr(calibration, "time_images", lambda *_: times)
    for name in ("time_merge", "time_reward", "time_score", "time_write"):
        monkeypatch.setattr(calibration, name, lambda *_, **__: 0.01)


def test_the_stages_are_those_of_the_search(
    shared_tiny: Path, opened: CheckpointSet, tiny_config: TinyConfig, tmp_path: Path,
    no_network: None,
) -> None:  # fmt: skip
    search = {"population": 4, "start_share": 0.4, "final_share": 0.4, "incumbents": 1}
    config = resolve_config(tiny_config(shared_tiny, budget=2000, search=search), opened)
    load = search_workload(config, opened, 1, (1, 8, 8))
    found = mrl.optimize(config.checkpoints, out=tmp_path / "run", config=config).found
    assert load.rounds == found.rounds
    by_name: dict[str, int] = {}
    for stage in load.stages:
        by_name[stage.name] = by_name.get(stage.name, 0) + stage.total
    assert by_name["start"] == found.beginning.images > 0
    assert by_name["best single"] == 4 * 10
    assert by_name["comparison"] == 4 * 3 * 20
    # A gap never opens with these settings, so that nothing is renewed twice. Finalists are
    # start, policy mean, running average and an incumbent. Result and start are then looked at on
    # three more sets of seeds, and the start on those of the last round.
    searched = by_name["start"] + by_name["pool"] + by_name["candidates"] + by_name["refresh"]
    assert searched == found.images - found.choice.images
    assert by_name["finalists"] == found.choice.images
    assert by_name["optimism"] == 7 * found.choice.images_each


def test_images_of_an_sde_take_the_time_of_their_steps() -> None:
    pool, under = WorkStage("pool", 1, 1, 100), WorkStage("comparison", 1, 2, 10, prepare.SDE)
    load = prepare.Workload((pool, under, under), 1, 0)
    assert load.by_name == {"pool": 100, "comparison": 40}
    sampler = SamplerConfig(solver="euler", num_steps=4, sde_num_steps=12)
    rollout: Any = SimpleNamespace(sampler=sampler, model=SimpleNamespace(prediction="velocity"))
    assert prepare.ode_images(load, rollout) == 100 + 40 * 12 / 4


class Notes(NullTracker):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def event(self, event: Mapping[str, Any]) -> None:
        if event.get("kind") == "note":
            self.said.append(str(event["text"]))


class Phases(NullTracker):
    """Keeps what is announced."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def phase(self, name: str, total: int) -> None:
        self.names.append(name)


@pytest.mark.usefixtures("no_network")
def test_the_uniform_average_takes_no_images_of_a_search(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = tiny_config(shared_tiny, search={"name": "uniform", "population": None})
    opened = open_checkpoints(shared_tiny, track=config.track)
    load = search_workload(resolve_config(config, opened), opened, 1, (1, 8, 8))
    heard = Phases()
    run = mrl.optimize(shared_tiny, out=tmp_path / "run", config=config, tracker=heard)
    assert config.reward.pooled
    assert "search" not in heard.names
    assert run.images == load.rounds == 0
    assert {stage.name for stage in load.stages} == {"best single", "comparison", "pictures"}
    assert isinstance(mrl.resume(tmp_path / "run", progress=False), mrl.OptimizeResult)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("searcher", ["auto", "policy-gradient"])
def test_a_budget_is_all_that_is_generated(
    searcher: str, shared_tiny: Path, opened: CheckpointSet, tiny_config: TinyConfig,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    as_users_see_it(monkeypatch)  # what is set aside for pictures is for those of small images
    made: list[int] = []
    plain, both = MergedRollout.features_of, DifferentiableRollout.__call__

    def counted(self: MergedRollout, items: Sequence[WorkItem], phase: str = "") -> list[Tensor]:
        made.extend(len(item.seeds) for item in items)
        return plain(self, items, phase)

    def thrice(self: DifferentiableRollout, item: WorkItem, back: Cotangents) -> Differentiated:
        made.append(3 * len(item.seeds))
        return both(self, item, back)

    monkeypatch.setattr(MergedRollout, "features_of", counted)
    monkeypatch.setattr(DifferentiableRollout, "__call__", thrice)
    monkeypatch.setattr(references, "LEAST_FINAL", 8)
    for module in (budget, search, prepare):
        monkeypatch.setattr(module, "LEAST", 5)
    config = tiny_config(
        shared_tiny, track=None, budget=1300,
        search={"name": searcher, "population": None, "start_share": 0, "final_share": 0.3},
        evaluation={"num_images": None, "selection_images": None, "share": 0.4},
    )  # fmt: skip
    wide = open_checkpoints(shared_tiny, track=None)
    resolved = resolve_config(config, wide)
    assert resolved.search.name == ("pathwise" if searcher == "auto" else searcher)
    load, notes = search_workload(resolved, wide, 1, (1, 8, 8)), Notes()
    run = mrl.optimize(config.checkpoints, out=tmp_path / "run", config=config, tracker=notes)
    final = run.found.choice
    # The start need not be looked at again where it came that far, and nothing if it was chosen.
    spared = 7 if final.label == "start" else int("start" in final.rungs[-1])
    chosen = final.images + (7 - spared) * final.images_each
    choice = sum(s.total for s in load.stages if s.name in ("finalists", "optimism"))
    # To the image, but that finalists which coincide share their part out anew.
    assert sum(made) - chosen + 2 * 30 == load.images - choice
    assert chosen > choice / 2
    assert sum(made) + 2 * 30 <= 1300
    # Less than a round is left, and what no division of a share gives.
    assert load.images <= 1300 < load.images + resolved.round_images(16, 0) + 20
    assert notes.said[0].startswith(f"{load.images:,} images in all, about ")
    assert ("counts as three" in notes.said[0]) == (searcher == "auto")
    both_tracks = [text for text in notes.said if "together; --track takes one" in text]
    assert len(both_tracks) == (len(wide.tracks) > 1)


def test_a_budget_too_small_for_the_comparison_is_refused(
    shared_tiny: Path, opened: CheckpointSet, tiny_config: TinyConfig
) -> None:
    left = {"num_images": None, "selection_images": None, "repeats": 3}
    # 4 checkpoints and 12 looks of 10 images each, and 60 pictures, are 0.4 of 550.
    message = r"leaves 9 for a repeat .*: a budget of 550, or --final-images N"
    with pytest.raises(BudgetError, match=message):
        resolve_config(tiny_config(shared_tiny, budget=545, evaluation=left), opened)
    found = resolve_config(tiny_config(shared_tiny, budget=550, evaluation=left), opened)
    assert (found.evaluation.images, found.evaluation.selection) == (10, 10)
    assert found.evaluation.reserved == 220
    assert resolve_config(found, opened).evaluation == found.evaluation
    # Large budgets leave to the search what 5,000 and 1,000 images do not need.
    large = resolve_config(tiny_config(shared_tiny, budget=10**6, evaluation=left), opened)
    assert large.search_budget == 10**6 - 12 * 5000 - 4 * 1000 - 60
    asked = {**left, "num_images": 50}
    found = resolve_config(tiny_config(shared_tiny, budget=500, evaluation=asked), opened)
    # All four checkpoints together cost as much as one model: 3 repeats of 50 images.
    assert (found.search_budget, found.evaluation.selection) == (500, 150 // 4)
    for images, each in ((5, 10), (5000, 1000)):  # 10 at least, 1,000 at most
        asked = {**left, "num_images": images}
        found = resolve_config(tiny_config(shared_tiny, budget=500, evaluation=asked), opened)
        assert found.evaluation.selection == each


@pytest.mark.usefixtures("quick")
def test_a_plan_by_hand(resolved: OptimizeConfig, opened: CheckpointSet, tmp_path: Path) -> None:
    config = dataclasses.replace(
        resolved, search=dataclasses.replace(resolved.search, start_share=0, final_share=0)
    )
    found = plan(config, opened, out=tmp_path / "run", devices=(1, 4))
    # The pool of 40, then 4 candidates of 10 images and 10 renewed a round: 29 rounds of 50.
    assert found.workload.rounds == 29
    assert found.workload.stages[:3] == (
        WorkStage("pool", 1, 1, 40),
        WorkStage("candidates", 29, 4, 10),
        WorkStage("refresh", 29, 1, 10),
    )  # fmt: skip
    images = 40 + 29 * 50 + 40 + 240 + 24
    assert found.workload.images == images
    # Heun with 2 steps: 3 calls, so 3 x 1 + 2 ms an image.
    assert found.network_calls == 3 * images
    merges = 1 + 29 * 5 + 4 + 12 + 2
    alone = found.estimates[0]
    known = images * 0.005 + merges * 0.01 + 29 * 0.02 + 16 * 0.01
    start = alone.serial - 29 * 0.02 - 16 * 0.01
    assert alone.seconds == pytest.approx(known + start)
    four = found.estimates[1]
    candidates = four.stages[1]  # one each
    assert candidates.making == pytest.approx(29 * 10 * 0.005)
    assert candidates.merging == pytest.approx(29 * 0.01)
    document = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert document["images"] == images
    assert not (tmp_path / "run").exists()


def test_memory_is_that_of_the_parts(resolved: OptimizeConfig, opened: CheckpointSet) -> None:
    parts = cost_parts(resolved, opened, lambda _text: None)
    found = plan_memory(resolved, opened, parts, 1 << 40)
    network = sum(p.numel() for p in parts.parts.network.parameters())
    assert found.weights["checkpoints"] == opened.total_bytes
    assert found.weights["merged weights"] <= 4 * network
    assert found.needed(20) - found.needed(10) == pytest.approx(
        found.needed(30) - found.needed(20), abs=2
    )
    # What has room for exactly 37 images has room for no more.
    tight = dataclasses.replace(found, capacity=found.needed(37))
    assert tight.largest_batch == 37
    tight.require_fit(37)
    with pytest.raises(OutOfMemoryError, match=r"a batch of 38 needs .* fits is 37$"):
        tight.require_fit(38)
    none = dataclasses.replace(found, capacity=found.needed(0))
    with pytest.raises(OutOfMemoryError, match="not even one image at a time fits"):
        none.require_fit(1)


def test_a_batch_chosen_by_memory(resolved: OptimizeConfig, opened: CheckpointSet) -> None:
    assert fit_batch(resolved, opened) is resolved
    auto = dataclasses.replace(resolved, batch=AUTO_BATCH)
    told: list[str] = []
    assert fit_batch(auto, opened, 1 << 40, told.append).batch == MOST_ON_CPU
    assert "batch 250: of 1.02e+03 GiB free" in told[0]
    parts = cost_parts(resolved, opened, lambda _text: None)
    room = plan_memory(resolved, opened, parts).needed(20)
    assert fit_batch(auto, opened, round(room / 0.8)).batch == pytest.approx(20, abs=1)
    with pytest.raises(OutOfMemoryError, match="not even one image"):
        fit_batch(auto, opened, 1000)


def test_what_cannot_work_is_refused(resolved: OptimizeConfig, opened: CheckpointSet) -> None:
    with pytest.raises(OutOfMemoryError, match="the largest batch that fits is"):
        plan(resolved, opened, memory=2_000_000)
    with pytest.raises(BudgetError, match="does not pay for one round"):
        plan(dataclasses.replace(resolved, budget=60), opened)


class Machine:
    """A clock that work moves, and that stands still for nobody: others take their turns."""

    def __init__(self, pauses: Callable[[], float] = lambda: 0.0) -> None:
        self.now, self.pauses = 0.0, pauses

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds + self.pauses()


def run_on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rollouts that take 10 ms a block and call, 20 ms an image and call, and 50 and 30 beside."""
    counts: list[int] = []

    def features(self: Rollout, _noise: Tensor, labels: Tensor) -> None:
        steps, count = self.sampler.num_steps, len(labels)
        counts.append(count)
        machine.spend(-(-count // 8) * (0.01 * steps + 0.05) + count * (0.02 * steps + 0.03))

    monkeypatch.setattr(Rollout, "features", features)
    monkeypatch.setattr(timing, "perf_counter", machine)
    return counts


@pytest.fixture(scope="module")
def in_eights(resolved: OptimizeConfig, opened: CheckpointSet) -> Rollout:
    """A rollout in blocks of 8 images."""
    config = dataclasses.replace(resolved, batch=8)
    return cost_parts(config, opened, lambda _text: None).rollout


def test_times_are_a_line_of_blocks_and_images(
    in_eights: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = run_on(Machine(), monkeypatch)
    found = calibration.time_images(in_eights, 10, 6)
    assert found.block_call == pytest.approx(0.01)
    assert found.image_call == pytest.approx(0.02)
    assert found.of(15) == pytest.approx((0.2, 0.33))
    assert found.spread == pytest.approx(0)
    assert max(seen) <= 6


@pytest.mark.parametrize("seed", range(5))
def test_pauses_that_others_force_on_it_hardly_change_a_measurement(
    in_eights: Rollout, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    # One call in ten waits for two seconds, many times what it takes itself.
    draw = random.Random(seed)
    run_on(Machine(lambda: 2.0 * (draw.random() < 0.1)), monkeypatch)
    found = calibration.time_images(in_eights, 10, 250)
    block, image = found.of(15)
    assert block + 8 * image == pytest.approx(0.2 + 8 * 0.33, rel=0.5)
    assert found.spread > 0.5


@pytest.mark.parametrize("paused", range(12))
def test_a_pause_does_not_change_what_is_said_at_first(
    in_eights: Rollout, monkeypatch: pytest.MonkeyPatch, paused: int
) -> None:
    # One measurement waits for a second, about as long as it takes itself.
    seconds = (float(i == paused) for i in itertools.count())
    machine = Machine(lambda: next(seconds))
    run_on(machine, monkeypatch)

    def side_by_side(
        self: Rollout, blocks: Sequence[Callable[[], tuple[Tensor, Tensor]]]
    ) -> list[Tensor]:
        steps, made = self.sampler.num_steps, [block() for block in blocks]
        count = max(len(labels) for _noise, labels in made)
        machine.spend(0.01 * steps + 0.05 + count * (0.02 * steps + 0.03))
        return [noise for noise, _labels in made]

    monkeypatch.setattr(Rollout, "features_of", side_by_side)
    calls, workers = calls_an_image(in_eights.sampler, in_eights.model), in_eights.workers
    block, image = 0.01 * calls + 0.05, 0.02 * calls + 0.03
    found = timing.image_seconds(in_eights, 10, 250)
    assert found == pytest.approx((block / 8 + image) / workers)


def test_what_takes_no_time_is_called_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, calls = Machine(), list[float]()

    def work(seconds: float) -> None:
        calls.append(seconds)
        machine.spend(seconds)

    monkeypatch.setattr(timing, "perf_counter", machine)
    short, long = calibration.timings([lambda: work(2**-10), lambda: work(9.0)])
    assert (short.seconds, short.spread) == (2**-10, 0)
    assert (long.seconds, long.spread) == (9, 0)
    # 512 calls are the least power of two that takes 0.4 s; nothing is repeated after 30 s.
    assert calls.count(2**-10) == 1 + sum(2**k for k in range(9)) + 2 * 512 + 5 * 512
    assert calls.count(9.0) == 1 + 1 + 5  # no pause takes ten times what is long enough


def test_one_image_alone_gives_a_time(in_eights: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on(Machine(), monkeypatch)
    assert sum(calibration.time_images(in_eights, 10, 1).of(2)) == pytest.approx(0.14)


def test_speeds_are_all_needed() -> None:
    with pytest.raises(TypeError):
        Speeds(block=1.0)  # type: ignore[call-arg]


def test_the_command(
    mergerl: Callable[..., Ended], shared_tiny: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # All is measured as ever, but what takes a millisecond is long enough.
    monkeypatch.setattr(calibration, "ENOUGH", 0.001)
    monkeypatch.setattr(calibration, "PLENTY", 0.001)
    small = ["--track", "raw", "--budget", 600, "--pool", 40, "--subset", 10, "--final-images", 20]
    out = tmp_path / "run"
    ended = mergerl("plan", shared_tiny, *small, "--devices", "1,2", "--out", out, "--json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert [row["devices"] for row in document["time"]] == [1, 2]
    assert document["memory"]["largest_batch"] > 0
    assert not out.exists()
    ended = mergerl("optimize", shared_tiny, *small, "--dry-run", "--memory", 0.001, "--out", out)
    assert ended.code == 1
    assert "the largest batch that fits is" in ended.err
    assert not out.exists()
    ended = mergerl("plan", shared_tiny, "--devices", "1,none")
    assert "expected --devices as numbers >= 1, such as 1,8,64, got '1,none'" in ended.err
