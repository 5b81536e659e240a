"""Names of temporary files that tell their process, and the sweep of what dead processes left."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

LOCK_NAME: Final = ".lock"
ABANDONED_SECONDS: Final = 600  # without a write: temporaries whose process cannot be asked about
_TEMPORARY: Final = re.compile(r"\.tmp-([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}-.*", re.DOTALL)


def temporary_beside(target: Path) -> Path:
    """A name for what becomes `target`, in its folder and with its ending; it names its process."""
    return target.with_name(f".tmp-{machine()}-{os.getpid()}-{secrets.token_hex(4)}-{target.name}")


def is_leftover(name: str) -> bool:
    """Whether a file of this name is a lock or a temporary, and so no content of a folder."""
    return name == LOCK_NAME or name.startswith(".tmp-")


def is_vacant(path: Path, *apart: str) -> bool:
    """Whether nothing lies there but a folder that was made to be locked, or to hold `apart`."""
    if not os.path.lexists(path):
        return True
    is_folder = path.is_dir() and not path.is_symlink()
    names = [item.name for item in path.iterdir()] if is_folder else []
    expected = {LOCK_NAME, *apart}
    return not expected.isdisjoint(names) and all(n in apart or is_leftover(n) for n in names)


def sweep(folder: Path) -> None:
    """Remove the temporaries of writers that are no more, in the folder and below it."""
    for place, folders, files in os.walk(folder):
        found = [name for name in (*folders, *files) if name.startswith(".tmp-")]
        folders[:] = [name for name in folders if name not in found]
        remove_dead(Path(place, name) for name in found)


def remove_dead(paths: Iterable[Path]) -> None:
    """Remove those of the temporaries whose writers are no more."""
    for path in paths:
        with suppress(OSError):
            if not _is_dead(path):
                continue
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_dead(path: Path) -> bool:
    match = _TEMPORARY.fullmatch(path.name)
    if match and match[1] == machine():
        return not is_alive(int(match[2]))
    return time.time() - path.lstat().st_mtime > ABANDONED_SECONDS


@functools.cache
def machine() -> str:
    """Eight digits shared by the processes that see each other's numbers.

    Other machines and containers have others, and so has this one when it is started again.
    """
    facts = [socket.gethostname()]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        facts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def is_alive(pid: int) -> bool:
    """Whether this machine has a process of this number."""
    if os.name == "nt":  # pragma: no cover (there the question would end the process)
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True
