"""The command under torchrun: the bits of one process, a killed rank and all."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.distributed.fsdp import fully_shard

import merge_rl as mrl
from merge_rl.config.mapping import dump_config
from merge_rl.config.optimize import OptimizeConfig
from merge_rl.storage.runs.run_dir import FinetuneRun
from tests.children import Child, launch_ranks, run_disturbed
from tests.finetuning import events_of, small_config, write_sit_set
from tests.fixtures import Ended

TinyConfig = Callable[..., OptimizeConfig]
Torchrun = Callable[..., "subprocess.Popen[str]"]
Forked = Callable[..., Child]


@pytest.fixture
def forked(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Start a command on two forked ranks, one of which gets a signal once a file of OUT exists."""
    started: list[Child] = []

    def start(
        disturbance: tuple[signal.Signals, int, str], *command: object, restarts: int = 0,
        patience: int = 60,
    ) -> Child:  # fmt: skip
        number, rank, file = disturbance
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MERGERL_TIMEOUT": str(patience)}
        words = map(str, (*command, "--config", tmp_path / "config.yaml", "--json"))
        child = Child(
            launch_ranks, 2, restarts, run_disturbed, int(number), rank, f"{tmp_path}/run/{file}",
            *words, "--out", f"{tmp_path}/run",
            folder=tmp_path / "child", environment=environment,
        )  # fmt: skip
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Torchrun]:
    """Start a command on several ranks of this machine; it does not outlive the test."""
    started: list[subprocess.Popen[str]] = []

    def start(ranks: int, *arguments: object, restarts: int = 0) -> subprocess.Popen[str]:
        launcher = [
            sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}",
            "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-id=test",
            f"--max-restarts={restarts}", "--monitor-interval=0.1", "-m", "merge_rl",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MERGERL_TIMEOUT": "60"}
        process = subprocess.Popen(
            [*launcher, *map(str, arguments)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_the_launcher_itself(
    shared_tiny: Path, torchrun: Torchrun, mergerl: Callable[..., Ended]
) -> None:
    model = shared_tiny / "raw/tiny-0000400.safetensors"
    command = ("evaluate", model, "--num-images", 20, "--repeats", 2, "--json")
    printed, errors = torchrun(1, *command).communicate(timeout=240)
    assert json.loads(printed) == json.loads(mergerl(*command).out), errors


def test_a_search_that_loses_a_rank_ends_with_the_bits_of_one_process(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path, forked: Forked, no_network: None
) -> None:
    config = tiny_config(shared_tiny, search={"population": 4, "start_share": 0.0})
    mrl.optimize(shared_tiny, out=tmp_path / "alone", config=config)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    launcher = forked((signal.SIGKILL, 1, "state.safetensors"), "optimize", shared_tiny, restarts=1)
    printed, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, errors
    assert "SIGKILL" in errors or "-9" in errors  # told by the launcher, of the first launch
    for name in ("result.json", "scores.json", "state.safetensors", "merged/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert json.loads(printed)["run_dir"] == str(tmp_path / "run")  # by rank 0 alone, and once


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for children in /proc")
def test_a_leader_that_hangs_is_named_and_the_run_goes_on(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path, forked: Forked, no_network: None
) -> None:
    config = tiny_config(shared_tiny, search={"population": 4, "start_share": 0.0})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    launcher = forked((signal.SIGSTOP, 0, "state.safetensors"), "optimize", shared_tiny, patience=3)
    until = time.monotonic() + 60
    while "error: " not in (tmp_path / "child/err").read_text() and time.monotonic() < until:
        time.sleep(0.05)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)  # as the launcher does half a minute later
    _, errors = launcher.communicate(timeout=240)
    (told,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert told.startswith("error: rank 0 ")
    assert launcher.returncode == 1
    assert not (tmp_path / "run/result.json").exists()
    mrl.resume(tmp_path / "run", progress=False)
    assert (tmp_path / "run/result.json").exists()


def test_fine_tuning_that_loses_a_rank_ends_where_one_process_does(
    shared_tiny: Path, tmp_path: Path, forked: Forked
) -> None:
    model = write_sit_set(tmp_path / "sit", shared_tiny)
    config = small_config(model, steps=2, batch=3, update={"learning_rate": 1e-3, "epochs": 2})
    alone = mrl.finetune(model, out=tmp_path / "alone", config=config)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    launcher = forked(
        (signal.SIGKILL, 1, "state/step-0000001.safetensors"), "finetune", model, restarts=1
    )
    printed, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, errors
    found, out = json.loads(printed), tmp_path / "run"  # by rank 0 alone, and once
    assert (found["run_dir"], found["step"], found["images"]) == (str(out), 2, alone.images)
    # Before the first update all weights are equal, and so are the bits of what they make.
    assert found["curves"]["0"] == alone.curves[0]
    assert events_of(out, "step")[0]["loss"] == pytest.approx(
        events_of(tmp_path / "alone", "step")[0]["loss"], rel=1e-6
    )
    for curve, scores in alone.curves[2].items():  # rounding apart, through Adam
        assert found["curves"]["2"][curve] == pytest.approx(scores, rel=1e-2)
    start = found["comparison"]["curves"]["sde-eval"]["entries"]["start"]
    assert start == alone.comparison["curves"]["sde-eval"]["entries"]["start"]


def test_sigterm_of_one_rank_saves_what_lies_in_shards(
    shared_tiny: Path, tmp_path: Path, forked: Forked
) -> None:
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        pytest.skip("shards take a later PyTorch")
    model = write_sit_set(tmp_path / "sit", shared_tiny)
    endless = {"steps": 10_000, "save_every": 10_000, "curves": {"every": 10_000}}
    config = small_config(model, parallel="fsdp", batch=3, **endless)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    out = tmp_path / "run"
    launcher = forked((signal.SIGTERM, 1, "snapshots/raw-0000002.safetensors"), "finetune", model)
    _, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 1
    assert "mergerl resume" in errors
    saved = FinetuneRun.open(out).load_state()
    assert saved is not None
    steps = events_of(out, "step")
    assert saved[1]["step"] == steps[-1]["step"] == saved[1]["updates"] >= 2
    # One process goes on with it, whatever it was shared by.
    longer = small_config(model, parallel="ddp", batch=3, **{**endless, "steps": len(steps) + 1})
    assert mrl.finetune(model, out=out, config=longer, resume=True).step == len(steps) + 1
