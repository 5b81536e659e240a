"""Boards beside events.jsonl: what they are told, and that none of them can end a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from merge_rl.errors import ConfigError, UnknownNameError
from merge_rl.storage.files.images import write_png
from merge_rl.storage.runs.trackers import BOARDS, Boards, require_extras

CONFIG = {"seed": 3}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    write_png(tmp_path / "grid.png", torch.full((1, 4, 6), 7, dtype=torch.uint8))
    return tmp_path / "grid.png"


def opened(name: str, folder: Path, warnings: list[str] | None = None) -> Boards:
    warn = (warnings if warnings is not None else []).append
    return Boards.open([name], folder, CONFIG, 2, warn)


def test_tensorboard_files_hold_the_numbers(tmp_path: Path, picture: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    boards = opened("tensorboard", tmp_path)
    boards.log(3, {"loss": 1.5, "fid/sde-eval/heldout": 2.0})
    boards.log(4, {"loss": 0.5})
    boards.picture(4, picture)
    boards.close()
    found = reading.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(3, 1.5), (4, 0.5)]
    assert [event.step for event in found.Images("samples")] == [4]


class Service(ModuleType):
    """Stands for the client of wandb or trackio: notes what it is told."""

    def __init__(self) -> None:
        super().__init__("service")
        self.told: list[Any] = []

    def init(self, **options: Any) -> Any:
        print("hello")  # noqa: T201 (as they do)
        self.told.append(("init", options))
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self.told.append((step, dict(values)))

    def finish(self) -> None:
        self.told.append("finish")

    def Image(self, path: str) -> str:  # noqa: N802 (their name)
        return f"image {path}"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_are_told_everything(
    name: str,
    tmp_path: Path,
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    service = Service()
    monkeypatch.setitem(sys.modules, name, service)
    capsys.readouterr()
    for _ in range(2):  # interrupted and resumed: one run of the service
        boards = opened(name, tmp_path / "run")
        boards.log(3, {"loss": 1.5})
        boards.picture(3, picture)
        boards.close()
    assert capsys.readouterr().out == ""
    first, *rest = service.told[:4]
    assert first[1]["name"] == "run"
    assert (first[1]["config"], first[1]["resume"]) == (CONFIG, "allow")
    assert rest == [(3, {"loss": 1.5}), (3, {"samples": f"image {picture}"}), "finish"]
    assert service.told[4] == first


@pytest.mark.parametrize("name", BOARDS)
def test_a_missing_library_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"--log-to .*pip install 'merge_rl\[{name}\]'"):
        require_extras([name])


def test_unknown_boards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'tensorboard'"):
        opened("tensorbord", tmp_path)


def test_a_board_that_fails_is_left_out() -> None:
    told: list[float] = []

    class Broken:
        def log(self, _step: int, _values: Mapping[str, float]) -> None:
            raise ConnectionError("no route to host")

        def picture(self, _step: int, _path: Path) -> None: ...

        def close(self) -> None: ...

    class Sound(Broken):
        def log(self, _step: int, values: Mapping[str, float]) -> None:
            told.append(values["loss"])

    warnings: list[str] = []
    boards = Boards({"wandb": Broken(), "tensorboard": Sound()}, warnings.append)
    boards.log(1, {"loss": 1.0})
    boards.log(2, {"loss": 2.0})
    assert told == [1.0, 2.0]
    assert warnings == ["wandb failed and is left out from here on: no route to host"]
