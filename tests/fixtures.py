"""Fixtures shared by all tests."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer.main
from torch import Tensor

from merge_rl.cli.main import main
from merge_rl.config.optimize import (
    EvaluationConfig,
    MergeConfig,
    OptimizeConfig,
    RewardConfig,
    SearchConfig,
)
from merge_rl.core.distances.statistics import feature_stats
from merge_rl.features.digits import DigitsNet, load_digits_extractor
from merge_rl.models.edm2 import EDM2
from merge_rl.storage.checkpoints.manifest import (
    MANIFEST_NAME,
    CheckpointEntry,
    Manifest,
    SetDefaults,
    write_manifest,
)
from merge_rl.storage.checkpoints.model_file import save_checkpoint
from merge_rl.storage.files.atomic import save_tensors
from merge_rl.workflows.reference.file import save_reference
from tests.children import Child, run_command, run_disturbed
from tests.hub_server import FileServer, HubServer, hub_client, only_loopback, running
from tests.quick import draw_figures, spare, with_network, without_network

TINY_MODEL: dict[str, Any] = {
    "model": "edm2",
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 10,
    "use_fp16": False,
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
    "channels_per_head": 8,
    "logvar_channels": 8,
}
RAW = [f"tiny-{100 * i:07d}" for i in (1, 2, 3, 4)]
EMA = [(f"tiny-{100 * i:07d}-{std:.3f}", 102400 * i, std) for i in (2, 4) for std in (0.05, 0.1)]


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of reference numbers from the official implementations."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_disks() -> Iterator[None]:
    # Nobody pulls the plug in a test, and a run forces some sixty writes to disk.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _spared() -> None:
    spare()


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages have their figures, which they lack in other tests."""
    draw_figures(monkeypatch)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts make samples that cost next to nothing and depend on every weight."""
    without_network(monkeypatch)


@pytest.fixture(scope="module")
def no_network_here() -> Iterator[None]:
    """The same for all tests of a module and for what they share."""
    with pytest.MonkeyPatch.context() as patch:
        without_network(patch)
        yield


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are the network's after all."""
    with_network(monkeypatch)


# ------------------------------------------------------------------------------- the tiny set


def _random_like(state: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    return {name: torch.randn(t.shape, generator=generator) for name, t in state.items()}


def _tiny_base(generator: torch.Generator) -> dict[str, Tensor]:
    network = EDM2(**{key: value for key, value in TINY_MODEL.items() if key != "model"})
    base = _random_like(network.state_dict(), generator)
    # A new network has gains of 0 and answers 0 whatever its other weights are.
    gains = {name: torch.tensor(0.8) for name in base if name.endswith("gain")}
    return {**base, **gains}


def _perturbed(base: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Half precision; Fourier frequencies and phases are those of the base, as in training."""
    noise = _random_like(base, generator)
    moved = {k: v if "fourier" in k else v + 0.3 * noise[k] for k, v in base.items()}
    return {name: tensor.half() for name, tensor in moved.items()}


def _write_evaluation(folder: Path, generator: torch.Generator) -> None:
    weights = {k: 0.3 * v for k, v in _random_like(DigitsNet().state_dict(), generator).items()}
    weights["whitening"] = torch.eye(len(weights["whitening"]))
    extractor = load_digits_extractor(weights)
    save_tensors(folder / "extractor.safetensors", weights)
    digest = hashlib.sha256((folder / "extractor.safetensors").read_bytes()).hexdigest()
    for name, count in (("reference", 200), ("heldout", 150)):
        images = torch.randint(0, 256, (count, 1, 8, 8), generator=generator).to(torch.uint8)
        stats = feature_stats(extractor(images))
        save_reference(
            folder / f"{name}.safetensors", stats, extractor="digits", extractor_sha256=digest,
            resolution=8, source="random images",
        )  # fmt: skip


def _write_tiny(folder: Path) -> None:
    generator = torch.Generator().manual_seed(11)
    base = _tiny_base(generator)
    rows: list[tuple[str, int, float | None]] = [
        (f"raw/{stem}", 102400 * (i + 1), None) for i, stem in enumerate(RAW)
    ]
    rows += [(f"ema/{stem}", nimg, std) for stem, nimg, std in EMA]
    entries = []
    for name, nimg, std in rows:
        path = folder / f"{name}.safetensors"
        save_checkpoint(path, _perturbed(base, generator))
        entry = CheckpointEntry(
            file=f"{name}.safetensors", nimg=nimg, ema_std=std, track=name[:3],
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        )  # fmt: skip
        entries.append(entry)
    _write_evaluation(folder / "evaluation", generator)
    defaults = SetDefaults(
        extractor="digits",
        extractor_weights=Path("evaluation/extractor.safetensors"),
        reference=Path("evaluation/reference.safetensors"),
        heldout=Path("evaluation/heldout.safetensors"),
        sampler={"num_steps": 2},
    )
    manifest = Manifest(
        name="tiny", licence="MIT", model=TINY_MODEL, defaults=defaults, checkpoints=tuple(entries)
    )
    write_manifest(folder / MANIFEST_NAME, manifest)


@pytest.fixture(scope="session")
def _tiny_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "tiny"
    _write_tiny(folder)
    return folder


@pytest.fixture
def tiny(_tiny_template: Path, tmp_path: Path) -> Path:
    """A set of the test's own: four raw and four EMA checkpoints of a random 8x8 EDM2, with a
    manifest, a random extractor and statistics of random images. Tracks "raw" and "ema"."""
    folder = tmp_path / "tiny"
    shutil.copytree(_tiny_template, folder)
    return folder


@pytest.fixture(scope="session")
def shared_tiny(_tiny_template: Path) -> Path:
    """The same set for all tests of a process: to read only."""
    return _tiny_template


TinyConfig = Callable[..., OptimizeConfig]
"""(folder, budget=..., **sections) -> settings of a search that takes a fraction of a second."""


@pytest.fixture(scope="session")
def tiny_config() -> TinyConfig:
    """Sections (merge, reward, search, evaluation) are mappings that change single settings."""

    def make(folder: Path, **changes: Any) -> OptimizeConfig:
        sections: dict[str, tuple[Any, dict[str, Any]]] = {
            "merge": (MergeConfig, {"grouping": "one"}),
            "reward": (
                RewardConfig,
                {"pool_size": 40, "subset_size": 10, "refresh_size": 10, "max_gap": 1e9},
            ),
            "search": (
                SearchConfig, {"name": "policy-gradient", "population": 4, "antithetic": True},
            ),
            "evaluation": (
                EvaluationConfig, {"num_images": 20, "repeats": 3, "selection_images": 10},
            ),
        }  # fmt: skip
        built: dict[str, Any] = {}
        for name, (cls, fixed) in sections.items():
            built[name] = cls(**{**fixed, **changes.pop(name, {})})
        top = {"track": "raw", "budget": 190, "seed": 5, **changes}
        return OptimizeConfig(checkpoints=str(folder), **built, **top)

    return make


Outcome = Callable[[Path], dict[str, object]]
"""run directory -> what the run came to, by file: all but times and the places of its inputs."""


@pytest.fixture(scope="session")
def outcome() -> Outcome:
    def read(run: Path) -> dict[str, object]:
        files = {str(f.relative_to(run)): f for f in run.rglob("*") if f.is_file()}
        found: dict[str, object] = {
            name: file.read_bytes()
            for name, file in files.items()
            if name != "config.yaml" and not name.startswith("report.")  # it tells the time
        }
        lines = [json.loads(line) for line in files["events.jsonl"].read_text().splitlines()]
        found["events.jsonl"] = [
            {**line, "seconds": None, "rollout_seconds": None} for line in lines
        ]
        return found

    return read


# ---------------------------------------------------------------------------- the command line


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Commands run in a folder of their own and leave this process as they found it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("MERGERL_DEBUG", raising=False)
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.pop("MERGERL_DEBUG", None)


_parser_of = functools.cache(typer.main.get_command)


@pytest.fixture
def mergerl(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, _own_folder: None
) -> Callable[..., Ended]:
    """Run a command in this process."""
    # Made of hundreds of options, the parser takes a tenth of a second: once will do.
    monkeypatch.setattr(typer.main, "get_command", _parser_of)
    # The command's name is not that of a module which runs the tests, as in `python -m pytest`.
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None, raising=False)

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["mergerl", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Ended(code, out, err)

    return run


@pytest.fixture
def launch(_own_folder: None) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a command in a process of its own; it does not outlive the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        # One thread as in this process: how many there are decides how sums round.
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "merge_rl", *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=alone,
            # A shell that runs this in the background has its children ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def fork(_own_folder: None, tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """The same where the start of a process is not what is looked at: forked, and so quicker.

    `disturbed` is the signal that it gets and the file that is there then: see `run_disturbed`.
    """
    started: list[Child] = []

    def start(*arguments: object, disturbed: tuple[int, object] | None = None) -> Child:
        folder = tmp_path.with_name(f"{tmp_path.name}-child{len(started)}")
        alone, words = {**os.environ, "OMP_NUM_THREADS": "1"}, map(str, arguments)
        work: Callable[..., None] = run_command
        if disturbed is not None:
            work = partial(run_disturbed, int(disturbed[0]), 0, str(disturbed[1]))
        started.append(Child(work, *words, folder=folder, environment=alone))
        return started[-1]

    yield start
    for child in started:
        child.kill()


# ------------------------------------------------------------------------ servers on loopback


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A server of plain files; nothing but this machine can be reached."""
    server = FileServer()
    with running(server), only_loopback(monkeypatch):
        yield server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub, and the client set to speak to it; nothing but this machine can be reached."""
    server = HubServer()
    home = tmp_path / "hf-home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with running(server), only_loopback(monkeypatch), hub_client(monkeypatch, server, home):
        yield server
