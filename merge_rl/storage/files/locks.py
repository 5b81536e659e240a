"""One writer a folder: a lock that says who holds it, and names that tell whose a temporary is.

The lock is an open file: whatever ends its process frees it, on this machine and on network file
systems that pass locks on (NFS 4, Lustre, GPFS, CephFS). Where a file system knows no locks, the
file itself is the lock; it is taken over where its writer was a process of this machine and is
gone, and has to be removed by hand where it was one of another machine. Who holds a folder sweeps
the temporary files that dead processes left in it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

from merge_rl.errors import BusyError, MergeRLError, RunError
from merge_rl.untrusted import load_json_mapping, reason

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


try:
    import fcntl
except ImportError:  # pragma: no cover (Windows: the file itself is the lock)
    fcntl = None  # type: ignore[assignment]

_ATTEMPTS: Final = 10
_NOTE_BYTES: Final = 4096

# Of this thread, by the lock's path: who holds a folder may call what holds it as well.
_HELD: ContextVar[frozenset[Path]] = ContextVar("_HELD", default=frozenset())


@contextmanager
def locked(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Hold a folder, made when missing: no other process or thread writes into it meanwhile.

    What dead writers left in it is swept. A folder that was made here and stays empty goes again.
    Inside a block that holds the folder, and for None, nothing happens. Raises RunError, with
    process, machine, command and time of the holder, for a folder that is held.
    """
    if folder is None:
        yield
        return
    path = Path(os.path.realpath(folder)) / LOCK_NAME
    with _held(path, Path(folder)) as fresh:
        if fresh:
            sweep(path.parent)
        yield


@contextmanager
def locked_output(target: str | os.PathLike[str]) -> Iterator[None]:
    """The same for one file, or for a folder that appears whole: the lock lies beside it."""
    path = Path(target).absolute()
    with _held(path.with_name(f".{path.name}.lock"), Path(target)) as fresh:
        if fresh:
            remove_dead(p for p in path.parent.glob(".tmp-*") if p.name.endswith(f"-{path.name}"))
        yield


def require_unlocked(folder: Path) -> None:
    """Raise RunError for a folder that a process is writing into; nothing is held or written."""
    path = folder / LOCK_NAME
    try:
        descriptor = os.open(path, _flags(os.O_RDONLY))
    except OSError:
        return
    try:
        _take(descriptor, path, folder, created=False, shared=True)
    finally:
        os.close(descriptor)


@contextmanager
def _held(path: Path, what: Path) -> Iterator[bool]:
    """Whether the lock was taken here, and not by a block around this one."""
    if path in _HELD.get():
        yield False
        return
    made = [place for place in (path.parent, *path.parent.parents) if not place.exists()]
    try:
        descriptor = _acquire(path, what)
        token = _HELD.set(_HELD.get() | {path})
        try:
            yield True
        finally:
            _HELD.reset(token)
            _release(path, descriptor)
    finally:
        with suppress(OSError):  # the first that is not empty ends it
            for place in made:
                place.rmdir()


def _acquire(path: Path, what: Path) -> int:
    """The open lock file."""
    for _ in range(_ATTEMPTS):
        lost = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _open(path, what)
        except FileNotFoundError as error:  # its last holder has just removed the folder
            lost = error
            continue
        except FileExistsError:
            raise RunError(f"{what}: expected a folder to write to, found a file") from None
        except OSError as error:
            raise RunError(f"{what}: cannot be written: {reason(error)}") from None
        if descriptor is not None:
            return descriptor
    if lost is not None:  # by ten others in a row, or for good, as below /proc
        raise RunError(f"{what}: cannot be made or written: {reason(lost)}")
    raise RunError(f"{what} is being written by other processes, one after the other; try again")


def _open(path: Path, what: Path) -> int | None:
    """The lock file, held; None where it was removed while it was opened."""
    try:
        descriptor, created = os.open(path, _flags(os.O_RDWR | os.O_CREAT | os.O_EXCL), 0o666), True
    except FileExistsError:
        descriptor, created = os.open(path, _flags(os.O_RDWR)), False
    try:
        if _take(descriptor, path, what, created=created) and _is_same(descriptor, path):
            with suppress(OSError):  # on a full disk it holds, without a word of who does
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_self()).encode())
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _flags(mode: int) -> int:
    # A folder may come from anywhere: what lies there under the lock's name must not lead out of
    # it, and opening it must not wait.
    extra = ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC")
    return functools.reduce(lambda flags, name: flags | getattr(os, name, 0), extra, mode)


def _take(descriptor: int, path: Path, what: Path, *, created: bool, shared: bool = False) -> bool:
    """Whether the lock is ours, False to look again; RunError if it is somebody else's."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise RunError(f"{path}: expected the lock of a writer, found no file; remove it")
    try:
        if fcntl is None:
            raise OSError
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise BusyError(f"{_sentence(what, _holder(descriptor))}; wait for it, or end it") from None
    except OSError:  # no locks here
        return created or shared or _take_over(descriptor, path, what)
    return True


def _take_over(descriptor: int, path: Path, what: Path) -> bool:
    """Without locks of the file system: make way for a new file where the holder is gone."""
    holder = _holder(descriptor)
    if holder.get("machine") == machine() and not is_alive(holder["pid"]):
        path.unlink(missing_ok=True)
        return False
    raise BusyError(f"{_sentence(what, holder)}; wait for it, or remove {path} if it is gone")


def _release(path: Path, descriptor: int) -> None:
    with suppress(OSError):
        if _is_same(descriptor, path):  # and not that of a folder that took this one's place
            path.unlink()
    os.close(descriptor)


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False


def _self() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {
        "command": _command(sys.argv), "pid": os.getpid(), "host": socket.gethostname(),
        "since": since, "machine": machine(),
    }  # fmt: skip


def _command(argv: list[str]) -> str:
    """Program and subcommand: other arguments are nobody's business."""
    name = Path(argv[0]).name if argv else ""
    if name not in ("mergerl", "__main__.py"):
        return name or "python"
    return " ".join(["mergerl", *(word for word in argv[1:2] if word.isalpha())])


def _holder(descriptor: int) -> dict[str, Any]:
    """What a lock file says; nothing where it is not whole."""
    expected = {key: type(value) for key, value in _self().items()}
    try:
        note = load_json_mapping(os.read(descriptor, _NOTE_BYTES), "lock")
    except (MergeRLError, OSError):
        return {}
    return note if {key: type(value) for key, value in note.items()} == expected else {}


def _sentence(what: Path, holder: dict[str, Any]) -> str:
    if not holder:
        return f"{what} is being written by another process"
    return (
        f"{what} is being written by {holder['command']} (pid {holder['pid']} on {holder['host']}, "
        f"since {holder['since']})"
    )
