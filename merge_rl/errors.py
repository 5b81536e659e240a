"""One exception tree: everything the package refuses on purpose is a `MergeRLError`.

A message is one sentence that says what was found and what was expected. The command line prints
it and exits with 1; a library user catches the root or the branch.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final


class MergeRLError(Exception):
    """Root of all errors raised on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Made anew from its message: an error that its own arguments make cannot leave a worker of
        # `multiprocessing`, whose pool then waits for it for ever.
        return _anew, (type(self), *self.args), self.__dict__


def _anew(kind: type[MergeRLError], *args: object) -> MergeRLError:
    return kind.__new__(kind, *args)


class ConfigError(MergeRLError):
    """A setting, or a combination of settings, that cannot work."""


class UnknownNameError(ConfigError):
    """A name that is not registered; the message suggests the nearest known one.

    `nearest` replaces our own guess, where the caller knows better.
    """

    def __init__(
        self, kind: str, name: str, known: Iterable[str], *, nearest: Sequence[str] | None = None
    ) -> None:
        names = sorted(known)
        if nearest is None:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        listed = ", ".join(names) or "none"
        super().__init__(f"unknown {kind} {name!r}{hint} (known: {listed})")
        self.kind, self.name, self.known = kind, name, tuple(names)


class MissingLibraryError(ConfigError):
    """A library of an extra that is not installed; the message says how to."""

    def __init__(self, use: str, library: str, extra: str) -> None:
        self.library = library
        super().__init__(
            f"{use} needs the library {library}, which is not installed; "
            f"pip install 'merge_rl[{extra}]'"
        )


class BudgetError(ConfigError):
    """A budget of generated images that does not pay for one round."""


class CheckpointError(MergeRLError):
    """A checkpoint file or folder that cannot be used."""


class ManifestError(CheckpointError):
    """A manifest that is malformed or names a path outside its folder."""


class IncompatibleCheckpointError(CheckpointError):
    """A file whose tensor names, shapes or dtypes differ from the rest of its set."""


class NonFiniteWeightsError(CheckpointError):
    """Weights that hold NaN or infinity."""


class NonFiniteSamplesError(NonFiniteWeightsError):
    """Weights whose samples become NaN or infinite at some step of a rollout."""


class HashMismatchError(CheckpointError):
    """A file whose SHA-256 differs from the recorded one."""


class DataFileError(MergeRLError):
    """A file of images, features or statistics that cannot be read."""


class ImageError(DataFileError):
    """An image, or a folder or file of images, that cannot be used."""


class StatisticsError(MergeRLError):
    """Feature statistics that cannot be computed or compared."""


class TooFewSamplesError(StatisticsError):
    """Fewer samples than an estimator needs."""


class OutOfMemoryError(MergeRLError):
    """More memory than the device, or the machine, has."""


class TrainingError(MergeRLError):
    """A training run that cannot go on, such as one whose losses are not finite."""


class RunError(MergeRLError):
    """A run directory that exists already, is incomplete, or belongs to other inputs."""


class BusyError(RunError):
    """A folder or file that another process is writing."""


class DownloadError(MergeRLError):
    """A file that cannot be downloaded, or is not what its server announced."""


class HubError(MergeRLError):
    """The Hub refused, cannot be reached, or sent something that cannot be used."""


class ParallelError(MergeRLError):
    """Ranks that failed, hang, are gone, or work with different inputs."""


class StoppedError(ParallelError):
    """Raised where another rank has failed: that rank's sentence says why."""


class SilentLeaderError(ParallelError):
    """Raised on one other rank where rank 0, which would tell it, hangs itself."""


_ADDRESS: Final = re.compile(
    "(?:https?|s3|gs|hf)://(?:(?:www\\.)?(?:huggingface\\.co|hf\\.co)/(?!datasets/|spaces/))?"
)


def absent(path: object, expected: str = "file or folder", *, of_hub: bool = False) -> str:
    """What to say of a path at which nothing lies, and of an address given for one.

    Where names of the Hub are taken, `of_hub`, the address of a repository is told its name.
    """
    text = re.sub(r"^(\w{2,}:)/+", r"\1//", str(path))  # a path has one slash where it had two
    address = _ADDRESS.match(text)
    if address is None:
        return f"{path}: no such {expected}"
    repo = "/".join(re.split("[/?#]", text[address.end() :])[:2])
    named = of_hub and "/" in repo and address[0] not in ("http://", "https://", "s3://", "gs://")
    way = f", or the repository's name: {repo}" if named else ": download it first"
    return f"{text}: an address, expected a {expected}{way}"


def quoted(path: object) -> str:
    """A path as a shell takes it, in a command that is there to be typed."""
    return shlex.quote(str(path))


@contextmanager
def about(what: object) -> Iterator[None]:
    """Refusals of statistics begin with what they are about, of several files the one."""
    try:
        yield
    except StatisticsError as error:
        if str(error).startswith(str(what)):
            raise
        raise type(error)(f"{what}: {error}") from None


def misfit(error: Exception) -> str:
    """What is wrong with contents that do not fit where they are used, in one line."""
    if isinstance(error, KeyError) and error.args:
        return f"{error.args[0]!r} is missing"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
