"""The life of a run: begin, go on with the same settings and inputs, stop when asked."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from merge_rl.config import (
    FREE_ON_RESUME,
    FinetuneConfig,
    OptimizeConfig,
    changed,
    differing_keys,
    to_mapping,
)
from merge_rl.errors import RunError
from merge_rl.interfaces import Tracker
from merge_rl.storage.files import LOCK_NAME, is_leftover, is_vacant
from merge_rl.storage.runs.run_dir import FinetuneRun, RunDir, RunFolder
from merge_rl.version import __version__

if TYPE_CHECKING:
    from merge_rl.parallel.rendezvous import Place

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, the first of both signals raises KeyboardInterrupt; inside `held` at its end.

    Batch systems send SIGTERM before they kill. Others do nothing until it is left: they would
    break off the wait for threads. Outside of the main thread, where no signal arrives, it does
    nothing.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._holding = self._pending = self._ending = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._arrived) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self._ending = {}, False

    def _arrived(self, _number: int, _frame: FrameType | None) -> None:
        if self._holding:
            self._pending = True
        elif not self._ending:
            self._interrupt()

    def _interrupt(self) -> NoReturn:
        self._ending = True
        for (
            handler
        ) in self._before.values():  # the command's own handler ignores further signals too
            if hasattr(handler, "ending"):
                handler.ending = True
        raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """Run the block to its end; a signal that arrived meanwhile is raised after it.

        Within another held block, at the end of that one.
        """
        within = self._holding
        with self.noted():
            yield
        if self._pending and not within:
            self._pending = False
            self._interrupt()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Run the block to its end; `pending` tells of signals that arrived meanwhile."""
        within, self._holding = self._holding, True
        try:
            yield
        finally:
            self._holding = within

    @property
    def pending(self) -> bool:
        """Whether a signal was held back."""
        return self._pending


LAUNCH_NAME: Final = "launch.json"


def goes_on(out: str | os.PathLike[str], place: Place) -> bool:
    """Whether the run at `out` was begun by this launch: by a process that was restarted since."""
    run = RunDir(out)
    if not run.path.is_dir():
        return False
    recorded = run.read(LAUNCH_NAME) or {}
    return place.restarts > 0 or (place.job is not None and recorded.get("job") == place.job)


C = TypeVar("C", OptimizeConfig, FinetuneConfig)


def _begin(
    run: RunFolder[C],
    config: C,
    inputs: Mapping[str, Any],
    place: Place,
    require_settings: Callable[[], object],
) -> None:
    """Begin a run of any kind, or go on with that of the same launch before it was restarted.

    `require_settings` raises for a run of other settings; RunError for one of other inputs, and for
    a directory of anything else.
    """
    if goes_on(run.path, place):
        clear_beginnings(run.path)
        if not is_vacant(run.path):
            run.open(run.path)
            require_settings()
            require_same_inputs(run, inputs["hashes"])
            return
    run.create(run.path, config, inputs)
    if place.job is not None:
        run.write(LAUNCH_NAME, {"job": place.job})


def begin_run(
    out: str | os.PathLike[str], config: OptimizeConfig, inputs: Mapping[str, Any], place: Place
) -> RunDir:
    """The run directory of a search: new, or that of the same launch before it was restarted.

    Raises RunError for a directory of other settings or inputs, or of anything else.
    """
    run = RunDir(out)

    def require_settings() -> None:
        if changed(to_mapping(run.config()), to_mapping(config)):
            raise RunError(
                f"{run.path} was begun with other settings; choose another --out, or resume that "
                "run"
            )

    _begin(run, config, inputs, place, require_settings)
    return run


def begin_finetune(
    out: str | os.PathLike[str], config: FinetuneConfig, inputs: Mapping[str, Any], place: Place
) -> FinetuneRun:
    """The directory of a fine-tuning run; see `begin_run`."""
    run = FinetuneRun(out)
    _begin(run, config, inputs, place, lambda: continued(run, config))
    return run


@contextmanager
def gone_unless(resumable: Callable[[], bool], folder: Path) -> Iterator[None]:
    """Remove a run that fails with nothing to go on from: be out of the next try's way."""
    try:
        yield
    except Exception:  # a function of the user's may raise anything
        if not resumable():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def clear_beginnings(folder: Path) -> None:
    """Remove a run directory that was lost before it had settings; nothing else is touched."""
    found = [file for file in folder.iterdir() if file.name != LOCK_NAME]
    if all(file.name == "inputs.json" or is_leftover(file.name) for file in found):
        for file in found:
            file.unlink()
        with suppress(OSError):  # it is locked
            folder.rmdir()


_SET: Final = {"checkpoints", "model"}
_ELSEWHERE: Final = "; resume --checkpoints PATH takes those it began with from elsewhere"


def require_same_inputs(run: RunFolder[Any], hashes: Mapping[str, Any]) -> None:
    """Raise RunError unless the inputs are those that a run began with."""
    recorded = (run.read("inputs.json") or {}).get("hashes")
    if recorded != hashes:
        known = recorded if isinstance(recorded, dict) else {}
        raise _changed(run, [k for k, v in hashes.items() if known.get(k) != v])


def require_same_set(run: RunFolder[Any], names: Iterable[str]) -> None:
    """Raise the same for a set of other names, which need not fit the network or the groups."""
    hashes = (run.read("inputs.json") or {}).get("hashes")
    known = hashes.get("checkpoints") if isinstance(hashes, dict) else None
    if isinstance(known, dict) and known.keys() != set(names):
        raise _changed(run, ["checkpoints"])


def _changed(run: RunFolder[Any], inputs: Sequence[str]) -> RunError:
    return RunError(
        f"{run.path}: cannot resume, the inputs have changed since it began: "
        f"{', '.join(inputs)} (by SHA-256){_ELSEWHERE if _SET & set(inputs) else ''}"
    )


def require_resumable(run: RunFolder[Any], hashes: Mapping[str, Any], tracker: Tracker) -> None:
    """Raise RunError for inputs other than a run began with; warn of another version."""
    began = (run.read("inputs.json") or {}).get("version")
    if began != __version__:
        text = f"the run began with merge_rl {began}, this is {__version__}: last bits may differ"
        tracker.event({"kind": "warning", "text": text})
    require_same_inputs(run, hashes)


def require_same(
    path: Path, before: Mapping[str, Any], now: Mapping[str, Any], *, what: str = "settings"
) -> None:
    """Raise RunError, naming what differs, unless both are equal."""
    found = changed(before, now)
    differ = [key for key in found if not key.endswith("weights_device")]  # changes no result
    if differ:
        shown = "; ".join("{} was {!r}, is {!r}".format(k, *found[k]) for k in differ[:5])
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise RunError(
            f"{path} was begun with other {what}: {shown}{more}; choose another --out, or the same "
            f"{what}"
        )


def continued(run: FinetuneRun, config: FinetuneConfig | None) -> FinetuneConfig:
    """The settings of a run that goes on; with what of them a config may change.

    Raises RunError with the names of other settings that differ.
    """
    own = run.config()
    if config is None:
        return own
    differing = differing_keys(own, config)
    if differing:
        raise RunError(
            f"{run.path}: cannot resume with another configuration, these settings differ: "
            f"{', '.join(differing)}; expected those of {run.path / 'finetune.yaml'}"
        )
    return dataclasses.replace(own, **{k: getattr(config, k) for k in FREE_ON_RESUME})
