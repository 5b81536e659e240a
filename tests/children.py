"""Processes that run the command, forked from one that has imported what the command needs.

A process of its own starts a second or two of imports later than one that is forked. What it does
is the same: it has its own signals, folder, environment, standard streams and exit status.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Final

import pytest
from torch import Tensor

from merge_rl.workflows.rollout.rollout import Rollout
from tests.quick import without_network

FORKSERVER: Final = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tests.preloaded"])
ROOT: Final = Path(__file__).parents[1]


def run_command(*arguments: str) -> None:
    """`mergerl` with these arguments, as `python -m merge_rl` begins it."""
    from merge_rl.cli.main import main

    sys.argv = ["mergerl", *arguments]
    main()


def run_disturbed(number: int, rank: int, sign: str, *arguments: str) -> None:
    """The same, where rank `rank`, 0 without a launcher, gets a signal once a file `sign` is there.

    It sends it to itself before it makes images, if it was not launched a second time. So there is
    nothing to wait for, and no run ends before its signal. Samples of a search cost nothing.
    """
    if arguments[0] == "optimize":
        without_network(pytest.MonkeyPatch())
    noise = Rollout.noise

    def disturbed(self: Rollout, seeds: Sequence[int]) -> Tensor:
        here = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if here == (str(rank), "0") and Path(sign).is_file() and Path(sign).stat().st_size:
            Rollout.noise = noise  # type: ignore[method-assign]
            os.kill(os.getpid(), number)
        return noise(self, seeds)

    Rollout.noise = disturbed  # type: ignore[method-assign]
    run_command(*arguments)


def launch_ranks(ranks: int, restarts: int, work: Callable[..., None], *arguments: object) -> None:
    """The agent of torchrun in this process: `work` on so many ranks, begun again if one is lost.

    They are forked from here, so that what they need is imported here, once.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    import merge_rl.workflows.finetune.distributed  # noqa: F401

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id="test", rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0", max_restarts=restarts, monitor_interval=0.1,
        start_method="fork",
    )  # fmt: skip
    elastic_launch(config, work)(*arguments)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Child:
    """What `subprocess.Popen` is, for a function called in a forked process.

    Its outputs go to files in `folder`, where processes that it starts itself may write too.
    """

    def __init__(
        self,
        work: Callable[..., None],
        *arguments: object,
        folder: Path,
        environment: dict[str, str],
    ) -> None:
        folder.mkdir(parents=True)
        self._outputs = [folder / name for name in ("out", "err")]
        for output in self._outputs:
            output.touch()
        self._process: ForkServerProcess = FORKSERVER.Process(
            target=_begin, args=(work, arguments, str(Path.cwd()), environment, self._outputs)
        )
        with _at(ROOT):
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As a shell tells it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it and what it has started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it has written to its outputs."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(str(self._outputs[0].parent), timeout or 0)
        out, err = (path.read_text() for path in self._outputs)
        return out, err


@contextmanager
def _at(folder: Path) -> Iterator[None]:
    """In `folder`: the server, which the first child starts, imports what is found from there."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _begin(
    work: Callable[..., None], arguments: tuple[object, ...], folder: str,
    environment: dict[str, str], outputs: list[Path],
) -> None:  # fmt: skip
    os.setsid()
    os.chdir(folder)
    assert "tests.preloaded" in sys.modules, "the server passes over what it cannot import"
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = (_text(descriptor) for descriptor in (1, 2))
    try:
        work(*arguments)
    except SystemExit:
        raise
    except BaseException:  # noqa: BLE001 (as the interpreter does)
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _text(descriptor: int) -> Any:
    return open(descriptor, "w", buffering=1, encoding="utf-8", closefd=False)
