"""Settings in layers: a preset, the file, options, --set; each says over the ones before it.

An option is one setting, or stands for several at once. Former names work for one release, with a
note on stderr. What a command's argument means, a model or a set, is told here too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from merge_rl.config import (
    LEARN,
    MODEL,
    OptimizeConfig,
    Setting,
    from_mapping,
    load_mapping,
    overlaid,
    override,
    preset,
    set_dotted,
    split_pair,
    to_mapping,
    whole_number,
)
from merge_rl.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from merge_rl.storage.checkpoints import CheckpointSet


from merge_rl.cli.output import ByteTracker, note, say
from merge_rl.config import TRACKERS


@dataclass(frozen=True, kw_only=True)
class Former:
    """An option's former name in some commands; it stands in no help text."""

    commands: tuple[str, ...]
    old: str
    new: str
    prefix: str = ""  # what the values need in front of them now

    def renewed(self, value: Any) -> Any:
        """A value of the former option as the present one takes it."""
        return [self.prefix + text for text in value] if self.prefix else value

    def tell(self) -> None:
        """Say the new name."""
        note_former(self.old, f"{self.new} {self.prefix}..." if self.prefix else self.new)


FORMER: Final = (
    Former(
        commands=("optimize", "plan", "compare", "evaluate", "sample"),
        old="--steps", new="--num-steps",
    ),
    Former(commands=("sample",), old="--num", new="--num-images"),
    Former(
        commands=("evaluate", "sample"), old="--sampler", new="--set", prefix="sampler."
    ),
    Former(commands=("finetune",), old="--from-track", new="--track"),
)  # fmt: skip


def former_names(command: str) -> Sequence[Former]:
    """The former names of a command's options."""
    return [former for former in FORMER if command in former.commands]


def note_former(old: str, new: str) -> None:
    """One line on stderr."""
    say(f"[yellow]note:[/] {old} is {new} now; the next release does not know the old name")


def split_tracks(given: Sequence[str]) -> tuple[str | None, list[str]]:
    """The series that `finetune --track` names, and the trackers that it named formerly."""
    trackers = [name for name in given if name in TRACKERS]
    series = [name for name in given if name not in TRACKERS]
    for name in trackers:
        note_former(f"--track {name}", f"--log-to {name}")
    if len(series) > 1:
        raise ConfigError(f"expected one --track, got {len(series)}: {', '.join(series)}")
    return (series[0] if series else None), trackers


T = TypeVar("T")


def values_of(setting: Setting, given: Any) -> dict[str, Any]:
    """What the value of a setting's option says, by dotted key."""
    about, key = setting.about, setting.key
    if about.named is not None:
        path, named = split_named(str(about.flag), given)
        above = key.rpartition(".")[0]
        said = {key: path, f"{above}.{about.named}" if above else about.named: named}
        return {name: value for name, value in said.items() if value is not None}
    if setting.type_name == "mapping":
        return {key: dict(split_pair(pair) for pair in given)}
    if isinstance(given, list) and (about.choices or setting.type_name == "list of float"):
        given = [part.strip() for text in given for part in text.split(",")]
    return {key: str(given) if isinstance(given, Path) else given}


def layered(
    given: Mapping[str, Any],
    *,
    file: Path | None = None,
    under: str | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """What was said in all, nested as in files.

    `given` has the values of options by dotted key, `under` is the name of a preset, `overrides`
    are KEY=VALUE.
    """
    options: dict[str, Any] = {}
    for key, value in given.items():
        set_dotted(options, key, value)
    said = overlaid(preset(under) if under else {}, load_mapping(file) if file else {})
    said = overlaid(said, options)  # pairs of an option add to those of the file
    for pair in overrides:
        override(said, pair)
    return said


def build(
    cls: type[T],
    said: Mapping[str, Any],
    *,
    near: Mapping[str, Any] | None = None,
    **own: Any,
) -> T:
    """The settings of a command: what was said, over the sampler that the set near it has.

    `own` are fields that the command's arguments say.
    """
    values = {**said, **own}
    if isinstance(values.get("sampler"), Mapping):
        values["sampler"] = {**(near or {}), **values["sampler"]}
    return from_mapping(cls, values)


def split_named(option: str, given: Sequence[str]) -> tuple[str | None, dict[str, str] | None]:
    """Values of a repeatable option, PATH or NAME=PATH: the one path, and the paths by name.

    Nothing given is None. A path that exists is a path, whatever characters it has.
    """
    plain, named = [], {}
    for text in given:
        name, separator, path = text.partition("=")
        if separator and path and re.fullmatch(r"[\w.:-]+", name) and not Path(text).exists():
            named[name] = path
        else:
            plain.append(text)
    if len(plain) > 1:
        raise ConfigError(
            f"expected one {option} without NAME=, got {len(plain)}: {', '.join(plain)}"
        )
    return plain[0] if plain else None, named or None


def build_for_set(
    said: Mapping[str, Any], checkpoints: Path
) -> tuple[OptimizeConfig, CheckpointSet]:
    """The settings of a search and the set, open; refuses a series or name that it lacks."""
    from merge_rl.storage.checkpoints import open_checkpoints

    found = build(OptimizeConfig, said, checkpoints=str(checkpoints))
    opened = open_checkpoints(checkpoints, track=found.track, select=found.select or None)
    if len(opened) < 2:
        why = "; ".join([f"got {len(opened)}", *opened.notes])
        raise CheckpointError(f"{checkpoints}: expected at least 2 checkpoints, {why}")
    near = opened.defaults.sampler
    if opened.manifest is None:
        from merge_rl.workflows.assembly import find_defaults

        sampler = find_defaults(checkpoints).sampler
        near = to_mapping(sampler) if sampler else {}
    return build(OptimizeConfig, said, near=near, checkpoints=str(checkpoints)), opened


@dataclass(frozen=True, kw_only=True)
class Shorthand:
    """An option of the commands that offer the setting `key`."""

    flag: str
    kind: type
    help: str
    panel: str
    key: str
    # From its value and the device to dotted keys and values; those that a command lacks are left
    # out.
    meaning: Callable[[Any, str], Mapping[str, Any]]
    metavar: str | None = None


def fast(on: bool, device: str) -> Mapping[str, Any]:
    """What --fast sets; nothing on a CPU, with a note."""
    half = {"sampler.precision": "bfloat16", "autoencoder_dtype": "bfloat16"}
    if on and device.partition(":")[0] == "cpu":
        say("[yellow]note:[/] --fast is for accelerators: on the device cpu all runs in float32")
        return {}
    return {**half, "sampler.compile": True} if on else {}


def window(text: str, _device: str) -> Mapping[str, Any]:
    """What --window [S+]N sets."""
    first, plus, last = text.rpartition("+")
    start, size = whole_number(first), whole_number(last)
    if size is None or (plus and start is None):
        raise ConfigError(f"expected --window N or S+N, got {text!r}")
    found = {} if start is None else {"rollout.window_start": start}
    return {"rollout.window_size": size, **found}


SHORTHANDS: Final = (
    Shorthand(
        flag="--fast", kind=bool, panel=MODEL,
        help="On an accelerator: network and decoder in bfloat16, compiled; nothing on a CPU.",
        key="sampler.compile", meaning=fast,
    ),
    Shorthand(
        flag="--window", kind=str, metavar="[S+]N", panel=LEARN, key="rollout.window_size",
        help="Noise in N solver steps alone, an ODE elsewhere: N moves, S+N starts at S.",
        meaning=window,
    ),
)  # fmt: skip


MODEL_HELP: Final = (
    "Run (its result), set (its newest checkpoint), model folder, one .safetensors, or user/repo."
)


def meant(model: Path, track: str | None = None) -> Path:
    """The model that a run, a set, a folder or a name of the Hub means, with a note of which."""
    from merge_rl.workflows.assembly import find_model

    with ByteTracker() as tracker:
        found = find_model(named(model), track, tracker)
    return found.told(note)


def named(path: Path) -> Path | str:
    """A path, or the text of one that may be a name of the Hub.

    Where the folder is there, a missing file in it is a slip, not a user of the Hub.
    """
    if path.exists() or path.parent.exists():
        return path
    from merge_rl.storage.hub import list_once

    list_once()
    return str(path)


def meant_set(checkpoints: Path) -> Path:
    """The set that a folder or a name of the Hub means, with a note of which."""
    from merge_rl.storage.runs import find_set

    given = named(checkpoints)
    if isinstance(given, str):
        from merge_rl.storage.hub import local_set

        with ByteTracker() as tracker:
            checkpoints = local_set(given, tracker)
        if str(checkpoints) != given:
            note(f"{given}: took the set of the Hub, {checkpoints}")
    return find_set(checkpoints).told(note)
