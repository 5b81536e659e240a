"""The command under torchrun: the bits of one process, a killed rank and all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import merge_rl as mrl
from merge_rl.config import OptimizeConfig, dump_config

TinyConfig = Callable[..., OptimizeConfig]
Torchrun = Callable[..., "subprocess.Popen[str]"]


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


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def wait_for(path: Path, launcher: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 240
    while not path.exists():
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for children in /proc")
def test_a_search_that_loses_a_rank_ends_with_the_bits_of_one_process(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path, torchrun: Torchrun
) -> None:
    config = tiny_config(shared_tiny, budget=600, search={"population": 4, "start_share": 0.0})
    mrl.optimize(shared_tiny, out=tmp_path / "alone", config=config)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    out = tmp_path / "together"
    command = ("optimize", shared_tiny, "--config", tmp_path / "config.yaml", "--out", out)
    launcher = torchrun(2, *command, "--json", restarts=2)
    wait_for(out / "state.safetensors", launcher)
    os.kill(ranks_of(launcher)[1], signal.SIGKILL)
    printed, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, errors
    for name in ("result.json", "scores.json", "state.safetensors", "merged/model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    assert json.loads(printed)["run_dir"] == str(out)  # by rank 0 alone, and once
