"""The run directory: config, events, resume point, scores, result.

config.yaml        the resolved settings
inputs.json        hashes of everything the run read
inputs/            what was handed over in memory: checkpoints, statistics
events.jsonl       one line a round
state.safetensors  the resume point, replaced atomically after every round
scores.json        finished scores of the final comparison
result.json        the end; its presence means the run is finished
merged/            the merged model
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

from merge_rl.config import (
    FIRST_RULES,
    FinetuneConfig,
    OptimizeConfig,
    dump_config,
    load_config,
)
from merge_rl.errors import RunError, absent, misfit
from merge_rl.storage.files import (
    State,
    as_path,
    is_vacant,
    read_state,
    reading_from,
    told_of,
    write_json,
    write_state,
    write_text,
)
from merge_rl.untrusted import (
    describe,
    is_there,
    load_json_mapping,
)

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

INPUTS: Final = "inputs"
SETTINGS: Final = "settings.json"
C = TypeVar("C", OptimizeConfig, FinetuneConfig)
SCORES: Final = "scores.json"
CURVES_FILE: Final = "curves.json"
_STEP: Final = re.compile("0|[1-9][0-9]{0,11}")


class RunFolder(Generic[C]):
    """Files of one run; every write is atomic or, for events, a whole appended line."""

    KIND: ClassVar[str]
    CONFIG_NAME: ClassVar[str]
    OTHERWISE: ClassVar[str]  # what to do about a folder that is there already
    CONFIG: ClassVar[type]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = as_path(path, "the folder of a run")
        self.config_path = self.path / self.CONFIG_NAME
        self.events_path = self.path / "events.jsonl"

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: C, inputs: Mapping[str, Any]) -> Self:
        """Start a run; an existing path is refused, never written into."""
        run = cls(path)
        if not is_vacant(run.path, INPUTS):
            raise RunError(f"{run.path} exists already; choose another --out, or {cls.OTHERWISE}")
        dump_config(config)  # refused before anything is there
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{run.path}: cannot be made: {error.strerror}") from None
        run.write("inputs.json", inputs)
        run.write_config(config)
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """An existing run; RunError if the folder is missing or is not one."""
        run = cls(path)
        if not run.path.is_dir():
            found = f"{run.path}: expected a run directory, found a file"
            raise RunError(found if run.path.exists() else absent(run.path, "run directory"))
        if is_there(run.path / SETTINGS, RunError):
            raise RunError(f"{run.path}: a comparison goes on with the command that began it")
        if not is_there(run.config_path, RunError):
            raise RunError(f"{run.path}: not a {cls.KIND}, {cls.CONFIG_NAME} is missing")
        return run

    def config(self) -> C:
        """The resolved settings of the run."""
        found: C = load_config(self.CONFIG, self.config_path, rules=FIRST_RULES)
        return found

    def write_config(self, config: C) -> None:
        """Settings that the run goes on with."""
        write_text(self.config_path, dump_config(config))

    def write(self, name: str, value: object) -> None:
        """Write a JSON file of the run, atomically."""
        write_json(self.path / name, value)

    def read(self, name: str) -> dict[str, Any] | None:
        """Contents of a JSON file of the run; None where it is not there.

        RunError for a file that is damaged or holds no JSON object.
        """
        path = self.path / name
        if not os.path.lexists(path):
            return None
        with reading_from(path, RunError) as file:
            return load_json_mapping(file.read(), f"{path}: damaged", RunError)

    def scores(self, names: Iterable[str] = ()) -> dict[str, dict[str, float | None]]:
        """What `scores.json` holds by key: numbers by name, null for what is not finite.

        {} where there is none yet; RunError for anything else, and for a score without `names`.
        """
        known = self.read(SCORES) or {}
        for key, values in known.items():
            beside = key.startswith(("failed/", "second/"))
            _require_numbers(self.path / SCORES, key, values, () if beside else names)
        return known

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Add one line to events.jsonl and force it to disk."""
        line = json.dumps(event, allow_nan=False) + "\n"
        with (
            told_of(self.events_path, self.events_path),
            self.events_path.open("a", encoding="utf-8") as file,
        ):
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def events(self) -> list[dict[str, Any]]:
        """All whole lines of events.jsonl; a last line cut short by a crash is left out.

        RunError names any other line that is no event.
        """
        if not os.path.lexists(self.events_path):
            return []
        events = []
        with reading_from(self.events_path, RunError) as file:
            for number, line in enumerate(file, 1):
                try:
                    events.append(_event(line, f"{self.events_path}: damaged in line {number}"))
                except RunError:
                    if line.endswith(b"\n"):
                        raise
        return events

    def keep_events(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop all other events: those of what will be done again."""
        kept = [event for event in self.events() if wanted(event)]
        write_text(self.events_path, "".join(json.dumps(event) + "\n" for event in kept))


class RunDir(RunFolder[OptimizeConfig]):
    """A search's."""

    KIND, CONFIG_NAME, OTHERWISE = "run directory", "config.yaml", "resume that run"
    CONFIG = OptimizeConfig

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.state_path = self.path / "state.safetensors"
        self.merged_path = self.path / "merged"

    def keep_events_before(self, round_index: int) -> None:
        """Drop events at or after a round."""
        self.keep_events(lambda event: event.get("round", 0) < round_index)

    def save_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Replace the resume point."""
        write_state(self.state_path, tensors, scalars)

    def load_state(self) -> State | None:
        """The resume point, or None if no round has begun."""
        return read_state(self.state_path) if os.path.lexists(self.state_path) else None


@contextmanager
def fitting(path: Path, what: str) -> Iterator[None]:
    """Contents of a file that do not fit where they are used are damage to it: RunError."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise RunError(f"{path}: damaged {what}: {misfit(error)}") from None


def _require_numbers(path: Path, key: str, values: object, names: Iterable[str] = ()) -> None:
    """Refuse what is no mapping of names to finite numbers, or to null in the place of others."""
    numbers = list(values.values()) if isinstance(values, dict) else []
    # A number of hundreds of digits is none that can be computed with.
    odd = [n for n in numbers if n is not None and not (type(n) in (int, float) and abs(n) < 1e100)]
    lacking = [name for name in names if isinstance(values, dict) and name not in values]
    if odd or lacking or not numbers:
        found = f"expected numbers by name, found {describe(odd[0] if odd else values)}"
        found += f" without {lacking[0]}" if lacking else ""
        raise RunError(f"{path}: damaged in {key!r:.60}: {found}")


def _event(line: bytes, where: str) -> dict[str, Any]:
    event = load_json_mapping(line, where, RunError)
    for key in ("round", "step"):
        if type(event.get(key, 0)) is not int:
            found = describe(event[key])
            raise RunError(f"{where}: expected {key} as a whole number, found {found}")
    return event


FINETUNE_NAME: Final = "finetune.yaml"


def is_finetune_run(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a fine-tuning run."""
    return is_there(Path(path) / FINETUNE_NAME, RunError)


class FinetuneRun(RunFolder[FinetuneConfig]):
    """A fine-tuning run's."""

    KIND, CONFIG_NAME, OTHERWISE = "fine-tuning run", FINETUNE_NAME, "go on with --resume"
    CONFIG = FinetuneConfig

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.final_path = self.path / "final"
        self.state_folder = self.path / "state"

    def state_paths(self) -> list[Path]:
        """The resume points, the newest first."""
        return sorted(self.state_folder.glob("step-*.safetensors"), reverse=True)

    def save_state(
        self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], *, keep: int
    ) -> None:
        """Write the resume point of a step, then remove all but the last `keep`.

        Until it is whole the earlier ones are all there; those of later steps, which are being done
        anew, go.
        """
        path = self.state_folder / f"step-{step:07d}.safetensors"
        write_state(path, tensors, values)
        paths = self.state_paths()
        for other in [p for p in paths if p > path] + [p for p in paths if p <= path][keep:]:
            other.unlink(missing_ok=True)

    def load_state(self, warn: Callable[[str], None] = lambda _text: None) -> State | None:
        """The newest resume point that can be read; None if none was written yet.

        `warn` hears of damaged ones that are passed over. RunError if all of them are.
        """
        paths = self.state_paths()
        for path in paths:
            try:
                return read_state(path)
            except RunError as error:
                if path == paths[-1]:
                    raise RunError(f"{error}; none of {len(paths)} can be used") from None
                warn(f"{error}; the one before it is used")
        return None

    def curves(self) -> dict[int, dict[str, dict[str, float | None]]]:
        """What `curves.json` holds: step -> curve -> reference -> FID, null for what is not finite.

        {} where there is none yet; RunError for anything else.
        """
        path, found = self.path / CURVES_FILE, {}
        for step, point in (self.read(CURVES_FILE) or {}).items():
            if not _STEP.fullmatch(step) or not isinstance(point, dict) or not point:
                what = f"expected curves by step, found {describe(point)} at {step!r:.60}"
                raise RunError(f"{path}: damaged: {what}")
            for curve, values in point.items():
                _require_numbers(path, f"{step}/{curve}", values)
            found[int(step)] = point
        return found

    def keep_events_up_to(self, step: int) -> None:
        """Drop events of later steps."""
        self.keep_events(lambda event: event.get("step", 0) <= step)
