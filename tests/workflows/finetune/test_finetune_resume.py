"""A fine-tuning run that was stopped anywhere ends, once resumed, as if it had not been."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merge_rl as mrl
from merge_rl.cli.main import Stop
from merge_rl.config.finetune import FinetuneConfig
from merge_rl.errors import RunError, TrainingError
from merge_rl.interfaces import NullTracker
from merge_rl.storage.runs import run_dir as finetune_run
from merge_rl.storage.runs.lifecycle import StopSignals
from merge_rl.storage.runs.run_dir import FinetuneRun, RunFolder, is_finetune_run
from merge_rl.workflows.finetune import scores as finetune_scores
from merge_rl.workflows.finetune import snapshots as finetune_snapshots
from merge_rl.workflows.finetune.learner import Learner
from merge_rl.workflows.finetune.rollouts import KeptRollouts, PolicyRollout
from merge_rl.workflows.finetune.run import resume_finetune
from merge_rl.workflows.finetune.updates import PolicyGradient, RejectionSampling
from tests.finetuning import events_of, outcome_of, small_config, write_sit_set


@pytest.fixture
def small(tmp_path: Path, shared_tiny: Path) -> Path:
    return write_sit_set(tmp_path / "sit", shared_tiny)


def drive(run: Path, config: FinetuneConfig) -> mrl.FinetuneResult:
    """What a user does: start, and once there is a run, go on."""
    if is_finetune_run(run):
        return resume_finetune(run)
    return mrl.finetune(config.model, out=run, config=config)


@pytest.fixture(scope="module")
def whole(shared_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> mrl.FinetuneResult:
    """A run of three steps that nothing has interrupted: to look at."""
    folder = tmp_path_factory.mktemp("whole")
    model = write_sit_set(folder / "sit", shared_tiny)
    return drive(folder / "run", small_config(model))


class Tripwire:
    """Raises KeyboardInterrupt before the k-th of the things that a run does."""

    def __init__(self) -> None:
        self.passed = 0
        self.limit: int | None = None

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if self.passed == self.limit:
                self.limit = None
                raise KeyboardInterrupt
            self.passed += 1
            return function(*arguments, **options)

        return wrapped

    @contextlib.contextmanager
    def at(self, limit: int) -> Iterator[None]:
        self.passed, self.limit = 0, limit
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.fixture
def tripwire(monkeypatch: pytest.MonkeyPatch) -> Tripwire:
    wire = Tripwire()
    watched: list[tuple[Any, str]] = [
        (PolicyRollout, "latents"),
        (PolicyRollout, "replay"),
        (Learner, "begin"),
        (RunFolder, "write"),
        (finetune_run, "write_state"),
        (finetune_snapshots, "save_checkpoint"),
        (finetune_scores, "write_png"),
    ]
    for owner, name in watched:
        monkeypatch.setattr(owner, name, wire.before(getattr(owner, name)))
    return wire


KINDS: dict[str, dict[str, Any]] = {
    "pg": {"save_every": 2},
    "rs": {"algorithm": "rs", "credit": "per-image", "update": {"epochs": 2}},
    "pathwise": {"algorithm": "pathwise", "save_every": 2},
    "kl": {"update": {"kl_weight": 0.1, "epochs": 2}, "rollout": {"window_size": 1}},
}


@pytest.mark.numerics
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_again_and_again(
    kind: str, small: Path, tmp_path: Path, tripwire: Tripwire
) -> None:
    config = small_config(small, **KINDS[kind])
    expected = outcome_of(drive(tmp_path / "whole", config).run_dir)
    run = tmp_path / "run"
    for limit in (9, 14, 5, 17):
        try:
            with tripwire.at(limit):
                drive(run, config)
        except pytest.fail.Exception:  # it came to its end before that place
            break
    tripwire.limit = None
    found = outcome_of(drive(run, config).run_dir)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def test_an_interruption_between_two_epochs_goes_back_to_before_the_step(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Weights are ahead of the state then: saved together, the step would be made twice.
    config = small_config(small, algorithm="rs", update={"epochs": 2}, steps=2)
    expected = outcome_of(drive(tmp_path / "whole", config).run_dir)
    apply, applied = Learner.apply, []

    def interrupted(self: Learner) -> None:
        applied.append(1)
        if len(applied) == 4:  # the second epoch of the second step
            raise KeyboardInterrupt
        apply(self)

    monkeypatch.setattr(Learner, "apply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drive(tmp_path / "run", config)
    found = outcome_of(drive(tmp_path / "run", config).run_dir)
    assert [name for name in expected if found.get(name) != expected[name]] == []


def test_an_interruption_saves_the_last_finished_step(
    small: Path, whole: mrl.FinetuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(small, save_every=100)

    class Stop(NullTracker):
        def event(self, event: Mapping[str, Any]) -> None:
            if event["kind"] == "step" and event["step"] == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mrl.finetune(small, out=tmp_path / "run", config=config, tracker=Stop())
    run = FinetuneRun.open(tmp_path / "run")
    assert [path.name for path in run.state_paths()] == ["step-0000002.safetensors"]
    made: list[int] = []
    real = PolicyGradient.gradients

    def noted(self: PolicyGradient, kept: KeptRollouts, epoch: int) -> dict[str, float]:
        made.append(kept.step)
        return real(self, kept, epoch)

    monkeypatch.setattr(PolicyGradient, "gradients", noted)
    result = resume_finetune(tmp_path / "run")
    assert made == [2]  # the third step alone
    assert result.curves == whole.curves


def test_sigterm_saves_and_resume_ends_alike(
    small: Path, whole: mrl.FinetuneResult, tmp_path: Path, fork: Any, mergerl: Any
) -> None:
    # In a process of its own, as a batch system stops it: the signal comes while a step is made.
    options = [
        "finetune", small, "--out", tmp_path / "run", "--steps", 3, "--seed", 4,
        "--train-steps", 3, "--subsets", 4, "--pool", 20, "--subset", 4, "--refresh", 2,
        "--lr", 1e-3, "--micro-batch", 3, "--eval-steps", 4, "--eval-every", 2,
        "--eval-images", 10, "--final-images", 10, "--repeats", 2, "--save-every", 1,
        "--snapshot-every", 2, "--set", "curves.ode_solver=euler", "--json",
    ]  # fmt: skip
    first = tmp_path / "run/state/step-0000001.safetensors"
    process = fork(*options, disturbed=(signal.SIGTERM, first))
    _, err = process.communicate()
    assert process.returncode == 1, err
    assert "mergerl resume" in err
    assert FinetuneRun.open(tmp_path / "run").load_state() is not None
    ended = mergerl("resume", tmp_path / "run", "--json")
    assert ended.code == 0, ended.err
    found = outcome_of(tmp_path / "run")["events.jsonl"]
    assert found == outcome_of(whole.run_dir)["events.jsonl"]


def test_signals_wait_for_the_end_of_a_block() -> None:
    signals, reached = StopSignals(), []
    before = signal.getsignal(signal.SIGTERM)

    def terminated(held: bool) -> None:
        with signals.held() if held else contextlib.nullcontext():
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(0.01)
            reached.append("end")

    for held in (True, False):
        with signals, pytest.raises(KeyboardInterrupt):
            terminated(held)
    assert reached == ["end"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_only_the_first_signal_interrupts() -> None:
    # One more would break off the wait for threads, which the interpreter then leaves running.
    stop, signals, reached = Stop(), StopSignals(), []
    before = signal.signal(signal.SIGTERM, stop)

    def interrupted_twice() -> None:
        with signals:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait(0.01)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait(0.01)
                reached.append("put in order")

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted_twice()
        os.kill(os.getpid(), signal.SIGTERM)  # nor does the command's own handler from here on
        threading.Event().wait(0.01)
        assert reached == ["put in order"]
        with pytest.raises(KeyboardInterrupt):
            Stop()(signal.SIGTERM, None)
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------------------- what is not finite


def broken_from(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: set[int]) -> None:
    """Make the calls with these numbers (from 1) answer NaN."""
    real, count = getattr(owner, name), 0

    def sometimes(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        found = real(*arguments, **options)
        if count not in calls:
            return found
        if isinstance(found, Tensor):
            return torch.full_like(found, torch.nan)
        return {**found, "loss": float("nan")}

    monkeypatch.setattr(owner, name, sometimes)


@pytest.mark.parametrize("owner", [PolicyGradient, RejectionSampling])
def test_a_loss_that_is_not_finite_skips_the_step(
    owner: type, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_from(monkeypatch, owner, "gradients", {2})
    algorithm = "pg" if owner is PolicyGradient else "rs"
    config = small_config(small, algorithm=algorithm, snapshot_every=1)
    result = mrl.finetune(small, out=tmp_path / "run", config=config)
    assert result.skipped == 1
    assert [event.get("skipped") for event in events_of(result.run_dir, "step")] == [
        None, "loss", None,
    ]  # fmt: skip
    first, second = (
        mrl.load_model(result.run_dir / f"snapshots/raw-000000{i}.safetensors").state_dict()
        for i in (1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rewards_that_are_not_finite_skip_the_step(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_from(monkeypatch, PolicyRollout, "features", {3})  # pool, step 1, step 2
    result = drive(tmp_path / "run", small_config(small))
    skipped = [event.get("skipped") for event in events_of(result.run_dir, "step")]
    assert skipped == [None, "reward", None]


def test_three_in_a_row_end_the_run_with_the_state_before(
    small: Path, whole: mrl.FinetuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(small, steps=5, save_every=1)
    with monkeypatch.context() as patch:
        broken_from(patch, PolicyGradient, "gradients", {3, 4, 5})
        with pytest.raises(TrainingError, match=r"3 steps in a row \(3\.\.5\) had a loss") as end:
            mrl.finetune(small, out=tmp_path / "run", config=config)
    # The weights of step 2 are the ones that failed.
    assert "--lr from earlier weights" in str(end.value)
    assert "snapshots/start-0000000.safetensors)" in str(end.value)
    run = FinetuneRun.open(tmp_path / "run")
    saved = run.load_state()
    assert saved is not None
    assert (saved[1]["step"], saved[1]["skipped"], saved[1]["updates"]) == (2, 0, 2)
    kept = mrl.load_model(tmp_path / "run/snapshots/ema-0000002.safetensors").state_dict()
    before = mrl.load_model(whole.run_dir / "snapshots/ema-0000002.safetensors").state_dict()
    assert all(torch.equal(kept[name], before[name]) for name in kept)
    assert resume_finetune(tmp_path / "run").skipped == 0  # where it was not the weights' fault


def test_a_run_that_never_learned_is_not_told_to_learn_slower(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_from(monkeypatch, PolicyGradient, "gradients", {1, 2, 3})
    with pytest.raises(TrainingError, match=r"\(1\.\.3\).*a smaller --lr is no help"):
        mrl.finetune(small, out=tmp_path / "run", config=small_config(small))


# ---------------------------------------------------------------------------- resuming


@pytest.fixture(scope="module")
def stopped_template(shared_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set, "sit", and a run of three steps on it, "run", that was stopped after two."""

    class Stop(NullTracker):
        def event(self, event: Mapping[str, Any]) -> None:
            if event["kind"] == "step" and event["step"] == 2:
                raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("stopped")
    model = write_sit_set(folder / "sit", shared_tiny)
    with pytest.raises(KeyboardInterrupt):
        mrl.finetune(model, out=folder / "run", config=small_config(model), tracker=Stop())
    return folder


@pytest.fixture
def stopped(stopped_template: Path, small: Path, tmp_path: Path) -> Path:
    """The same on a set of the test's own."""
    run = tmp_path / "run"
    shutil.copytree(stopped_template / "run", run)
    settings = (run / "finetune.yaml").read_text()
    assert str(stopped_template / "sit") in settings
    (run / "finetune.yaml").write_text(settings.replace(str(stopped_template / "sit"), str(small)))
    return run


def test_another_configuration_is_refused(stopped: Path, small: Path) -> None:
    other = small_config(small, seed=5, update={"learning_rate": 2e-3})
    with pytest.raises(RunError, match=r"settings differ: seed, update\.learning_rate; expected"):
        mrl.finetune(small, out=stopped, config=other, resume=True)


def test_a_run_may_go_further(stopped: Path, small: Path, tmp_path: Path) -> None:
    resume_finetune(stopped)  # to its end, and then on from there
    longer = small_config(small, steps=4, keep_last=1)
    result = mrl.finetune(small, out=stopped, config=longer, resume=True)
    whole = mrl.finetune(small, out=tmp_path / "whole", config=longer)
    assert result.step == 4
    assert result.comparison == whole.comparison
    # Where the shorter run ended lies a point more.
    assert {k: v for k, v in result.curves.items() if k in whole.curves} == whole.curves
    assert len(FinetuneRun.open(stopped).state_paths()) == 1


def test_changed_inputs_are_refused(stopped: Path, small: Path) -> None:
    file = small / "evaluation/reference.safetensors"
    file.write_bytes((small / "evaluation/heldout.safetensors").read_bytes())
    with pytest.raises(RunError, match="inputs have changed since it began: reference"):
        resume_finetune(stopped)


def test_an_interrupted_save_leaves_the_previous_state(
    stopped: Path, whole: mrl.FinetuneResult
) -> None:
    newest = FinetuneRun.open(stopped).state_paths()[0]
    saved = newest.read_bytes()
    newest.write_bytes(saved[: len(saved) // 2])  # as a disk that was full, or a crash, leaves it
    warnings: list[str] = []

    class Listen(NullTracker):
        def event(self, event: Mapping[str, Any]) -> None:
            if event["kind"] == "warning":
                warnings.append(event["text"])

    result = resume_finetune(stopped, tracker=Listen())
    assert "the one before it is used" in warnings[0]
    assert result.curves == whole.curves
    assert result.comparison == whole.comparison


def test_a_score_whose_event_found_no_room_is_told_when_the_run_goes_on(
    small: Path, tmp_path: Path, whole: mrl.FinetuneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = RunFolder.append_event

    def full(run: RunFolder[Any], event: Mapping[str, Any]) -> None:
        if event["kind"] == "score" and event["step"] == 3:  # its point is in the curves by now
            raise OSError(28, "No space left on device")
        add(run, event)

    config = small_config(small)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_event", full)
        with pytest.raises(OSError, match="No space left"):
            drive(tmp_path / "run", config)
    found = outcome_of(drive(tmp_path / "run", config).run_dir)
    assert found["events.jsonl"] == outcome_of(whole.run_dir)["events.jsonl"]


def test_no_whole_state_is_refused(stopped: Path) -> None:
    for path in FinetuneRun.open(stopped).state_paths():
        path.write_bytes(b"torn")
    warnings: list[str] = []
    with pytest.raises(RunError, match=r"damaged resume point.*none of 2 can be used"):
        FinetuneRun.open(stopped).load_state(warnings.append)
    assert len(warnings) == 1  # of the newest: there is none before the other
    with pytest.raises(RunError, match="none of 2 can be used"):
        resume_finetune(stopped)


def test_a_state_of_something_else_is_refused(stopped: Path) -> None:
    run = FinetuneRun.open(stopped)
    tensors, values = run.load_state() or ({}, {})
    tensors.pop("learner.weights.final_layer.linear.weight")
    run.save_state(2, tensors, values, keep=2)
    with pytest.raises(RunError, match=r"damaged resume point: '.*final_layer.*' is missing"):
        resume_finetune(stopped)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run directory"):
        resume_finetune(tmp_path / "nothing")
    with pytest.raises(RunError, match=r"not a fine-tuning run, finetune\.yaml is missing"):
        resume_finetune(tmp_path)


def test_states_are_kept_by_number(tmp_path: Path) -> None:
    run = FinetuneRun(tmp_path)
    for step in (10, 20, 30, 40):
        run.save_state(step, {"a": torch.tensor(float(step))}, {"step": step}, keep=2)
    assert [path.stem for path in run.state_paths()] == ["step-0000040", "step-0000030"]
    # Back to an earlier step: what came after it goes.
    run.save_state(35, {"a": torch.tensor(0.0)}, {"step": 35}, keep=2)
    assert [path.stem for path in run.state_paths()] == ["step-0000035", "step-0000030"]
