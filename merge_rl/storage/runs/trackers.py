"""Where the numbers of a run go beside events.jsonl: TensorBoard, Weights & Biases, trackio.

None is needed; each is an extra, imported when it is asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol

from merge_rl.errors import MissingLibraryError, UnknownNameError
from merge_rl.storage.files import decode_image


class Board(Protocol):
    """A place that shows curves."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by name."""
        ...

    def picture(self, step: int, path: Path) -> None:
        """A PNG of a step."""
        ...

    def close(self) -> None:
        """Write what is still held."""
        ...


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path, _config: Mapping[str, Any], step: int) -> None:
        require_extra("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote about steps that are done again is hidden.
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, path: Path) -> None:
        pixels = decode_image(path.read_bytes(), path.name)
        self._writer.add_image("samples", pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, its files in RUN/wandb; where to, its own environment says."""

    def __init__(self, folder: Path, config: Mapping[str, Any], _step: int) -> None:
        self._library = require_extra("wandb", "wandb")
        # One run here is one run there, however often it is interrupted.
        self._run = self._library.init(
            project="merge_rl", name=folder.name, dir=str(folder), config=dict(config),
            id=_run_id(folder), resume="allow",
        )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, path: Path) -> None:
        self._run.log({"samples": self._library.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A local run of trackio."""

    def __init__(self, folder: Path, config: Mapping[str, Any], _step: int) -> None:
        self._library = require_extra("trackio", "trackio")
        self._library.init(
            project="merge_rl", name=folder.name, config=dict(config), resume="allow"
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._library.log(dict(values), step=step)

    def picture(self, step: int, path: Path) -> None:
        self._library.log({"samples": self._library.Image(str(path))}, step=step)

    def close(self) -> None:
        self._library.finish()


BOARDS: Final[Mapping[str, Callable[[Path, Mapping[str, Any], int], Board]]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


class Boards:
    """Several at once; one that fails is told of and left out, for it must not end a run.

    What their libraries print goes to stderr: stdout belongs to the command.
    """

    def __init__(self, boards: Mapping[str, Board], warn: Callable[[str], None]) -> None:
        self._boards, self._warn = dict(boards), warn

    @classmethod
    def open(
        cls, names: Sequence[str], folder: Path, config: Mapping[str, Any], step: int,
        warn: Callable[[str], None],
    ) -> Boards:  # fmt: skip
        """The named ones; ConfigError for one whose library is missing."""
        boards: dict[str, Board] = {}
        for name in dict.fromkeys(names):
            if name not in BOARDS:
                raise UnknownNameError("tracker", name, BOARDS)
            with contextlib.redirect_stdout(sys.stderr):
                boards[name] = BOARDS[name](folder, config, step)
        return cls(boards, warn)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""
        self._each(lambda board: board.log(step, values))

    def picture(self, step: int, path: Path) -> None:
        """A PNG of a step."""
        self._each(lambda board: board.picture(step, path))

    def close(self) -> None:
        """Write what is still held."""
        self._each(lambda board: board.close())

    def _each(self, call: Callable[[Board], None]) -> None:
        for name, board in list(self._boards.items()):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    call(board)
            except Exception as error:  # noqa: BLE001 (whatever a service's client may raise)
                del self._boards[name]
                self._warn(f"{name} failed and is left out from here on: {error}")


def require_extras(names: Sequence[str]) -> None:
    """Raise ConfigError for the first named tracker whose library is missing."""
    for name in names:
        require_extra(name, name)


def require_extra(library: str, extra: str) -> Any:
    """The library; ConfigError that names its extra if it is not installed."""
    try:
        return import_module(library)
    except ImportError:
        raise MissingLibraryError(f"--log-to {library}", library, extra) from None


def _run_id(folder: Path) -> str:
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
