"""Names of options as they were: they work for one release, with a note on stderr."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from merge_rl.cli.output import say
from merge_rl.config import TRACKERS
from merge_rl.errors import ConfigError


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
