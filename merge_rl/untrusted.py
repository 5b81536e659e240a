"""Files from anywhere: opened, and read as YAML or JSON, within bounds.

Only regular files are opened, so that nothing waits for a pipe or reads a device for ever, and only
those whose bytes are there, so that no reader takes memory for the holes of a sparse file. Only
plain data comes out of a document (mappings, lists, text, numbers, true / false, null): nothing in
it can run, repeat a key, nest without end or grow by aliases.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import ValuesView
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import yaml

from merge_rl.errors import CheckpointError, ManifestError, MergeRLError, absent

if TYPE_CHECKING:
    from yaml import CSafeLoader as _LibraryLoader
else:
    _LibraryLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where it is built in

FREE_BYTES: Final = 256 * 2**20  # what any file may hold, or expand to
MAX_EXPANSION: Final = 100  # times what is stored of it, beyond that
MAX_DOCUMENT_BYTES = 4 * 2**20
MAX_DEPTH: Final = 100  # of nesting
MAX_REASON: Final = 300  # characters: some quote the file
_USUAL_DEPTH: Final = 20
_MAX_PIECES: Final = 10_000  # of a sparse file that are counted
_POINTER: Final = b"version https://git-lfs.github.com/spec/"
_POINTER_SIZE: Final = re.compile(rb"^size (\d{1,20})$", re.MULTILINE)
_MAX_POINTER_BYTES: Final = 1024  # as its specification says
# PyYAML lets these escape for scalars that do not fit their tag, such as 2024-99-99 or !!int ''.
_ESCAPING: Final = (ValueError, LookupError, AttributeError, TypeError)

Refusal = type[MergeRLError]


def open_file(path: str | os.PathLike[str], refusal: Refusal = CheckpointError) -> BinaryIO:
    """A regular file, opened for reading bytes; `refusal` where it cannot be read as one.

    Folders, pipes, sockets and devices are refused, be it behind a link, and so are a file of more
    than 256 MiB of which less than a hundredth is stored, and a pointer of Git LFS to a file.
    """
    try:
        _require_regular(Path(path).stat(), path, refusal)
        # What lies there may have changed since: opening a pipe must not wait for its other end.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
        file = os.fdopen(os.open(path, flags | getattr(os, "O_BINARY", 0)), "rb")
    except FileNotFoundError:
        raise refusal(absent(path, "file")) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise refusal(f"{path}: cannot be read: {reason(error)}") from None
    try:
        status = os.fstat(file.fileno())
        _require_regular(status, path, refusal)
        size = status.st_size
        if size > FREE_BYTES and (stored := _stored(file.fileno(), size)) * MAX_EXPANSION < size:
            raise refusal(f"{path}: {size} bytes of which {stored} are stored, the rest are holes")
        if size <= _MAX_POINTER_BYTES:
            if problem := pointer_problem(file.read(_MAX_POINTER_BYTES)):
                raise refusal(f"{path}: {problem}")
            file.seek(0)
    except BaseException as error:
        file.close()
        if isinstance(error, OSError):  # such as a file of /proc that refuses to be read
            raise refusal(f"{path}: cannot be read: {reason(error)}") from None
        raise
    return file


def is_there(path: Path, refusal: Refusal = CheckpointError) -> bool:
    """Whether a file lies at `path`; `refusal` for what stands there and is none."""
    if not os.path.lexists(path):
        return False
    open_file(path, refusal).close()
    return True


def pointer_problem(content: bytes) -> str | None:
    """What to say of content that is a pointer of Git LFS, and what to do; None if it is none."""
    if not content.startswith(_POINTER):
        return None
    size = _POINTER_SIZE.search(content[:_MAX_POINTER_BYTES])
    meant = f"a file of {int(size[1]):,} bytes" if size else "a file"
    return (
        f"a Git LFS pointer to {meant}, which was not fetched; run `git lfs pull` in its repository"
    )


def reason(error: BaseException) -> str:
    """What an error of the system or of a library says, in one line of moderate length."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return text[:MAX_REASON] + "..." if len(text) > MAX_REASON else text or type(error).__name__


def _require_regular(
    status: os.stat_result, path: str | os.PathLike[str], refusal: Refusal
) -> None:
    if not stat.S_ISREG(status.st_mode):
        found = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise refusal(f"{path}: expected a file, found {found}")


_KINDS: Final = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _stored(descriptor: int, size: int) -> int:
    """Bytes of a file that are no holes; all where the system cannot tell."""
    if not hasattr(os, "SEEK_DATA"):
        return size
    total = position = 0
    try:
        for _ in range(_MAX_PIECES):
            begin = os.lseek(descriptor, position, os.SEEK_DATA)
            position = os.lseek(descriptor, begin, os.SEEK_HOLE)
            total += position - begin
        return size
    except OSError as error:
        return total if error.errno == errno.ENXIO else size  # ENXIO: nothing but a hole follows
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)


def read_bounded(
    path: Path, limit: int = MAX_DOCUMENT_BYTES, refusal: Refusal = ManifestError
) -> str:
    """UTF-8 text of a file of at most `limit` bytes."""
    try:
        with open_file(path, refusal) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise refusal(f"{path}: cannot be read: {reason(error)}") from None
    if len(data) > limit:
        raise refusal(f"{path}: larger than {limit} bytes, the most that is read")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"bytes that are not UTF-8 (byte {error.start})"
        raise refusal(f"{path}: expected text, found {found}") from None


class _KeysOnce(yaml.constructor.SafeConstructor):
    """Refuses repeated keys. Numbers are decimal: 0x10, 0b1 and 1:30 are text, and 010 is ten."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # PyYAML lets the last of two equal keys win, which hides slips of copy and paste.
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value!r} appears twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def decimal(self, node: yaml.ScalarNode) -> object:
        """A number as options read it, not by its base or in parts of sixty."""
        if node.tag.endswith(":float"):
            return node.value if ":" in node.value else self.construct_yaml_float(node)
        decimal = re.fullmatch("[-+]?[0-9]+(?:_[0-9]+)*", node.value)
        return int(node.value) if decimal else node.value or self.construct_yaml_int(node)


for _tag in ("int", "float"):
    _KeysOnce.add_constructor(f"tag:yaml.org,2002:{_tag}", _KeysOnce.decimal)  # type: ignore[type-var]


class _StrictLoader(_KeysOnce, yaml.SafeLoader):
    """Safe loader that also refuses aliases and repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        # A few hundred bytes of nested aliases stand for billions of values once walked.
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", None)
        return super().compose_node(parent, index)


class _QuickLoader(_KeysOnce, _LibraryLoader):
    """Ten times as quick, for documents that `_is_usual` has seen."""


def _is_usual(text: str) -> bool:
    """Whether a document has no aliases and usual depth: libyaml's composer is recursive."""
    depth = 0
    for event in yaml.parse(text, Loader=_LibraryLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _USUAL_DEPTH or isinstance(event, yaml.AliasEvent):
            return False
    return True


def load_yaml(path: Path, refusal: Refusal = ManifestError) -> object:
    """The one YAML document in `path`, as plain data."""
    return parse_yaml(read_bounded(path, refusal=refusal), str(path), refusal)


def parse_yaml(text: str, where: str, refusal: Refusal = ManifestError) -> object:
    """The one YAML document of a text, as plain data; `where` begins the message of a refusal."""
    # What is refused here is parsed again without libyaml, so that messages are the same.
    with suppress(yaml.YAMLError, *_ESCAPING):
        if _is_usual(text):
            return yaml.load(text, Loader=_QuickLoader)
    try:
        return _writable(_bounded(yaml.load(text, Loader=_StrictLoader)), text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        why = f"{error.problem}{place}"
    except RecursionError:
        why = "nested too deeply"
    except (yaml.YAMLError, ValueError) as error:
        why = reason(error)
    except _ESCAPING:
        why = "a value that does not fit its tag"
    raise refusal(f"{where}: not readable YAML: {why}") from None


def parse_json(text: str | bytes, where: str, refusal: Refusal = CheckpointError) -> Any:
    """The value of a JSON document, as plain data; `where` begins the message of a refusal."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        text = text.removeprefix("\ufeff")  # the byte-order mark that some editors write
        return _writable(_bounded(json.loads(text, object_pairs_hook=_once)), text)
    except RecursionError:
        why = "nested too deeply"
    except ValueError as error:
        why = str(error)
    raise refusal(f"{where}: not readable JSON: {why}") from None


def load_json_mapping(
    text: str | bytes, where: str, refusal: Refusal = CheckpointError
) -> dict[str, Any]:
    """A JSON object, as a dict of plain data; `where` begins the message of a refusal."""
    value = parse_json(text, where, refusal)
    if not isinstance(value, dict):
        raise refusal(f"{where}: expected a JSON object, found {describe(value)}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in values if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice")
    return values


def _bounded(value: object) -> object:
    """The value itself; RecursionError if it is nested deeper than what walks it may follow."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        whole = (item.values() if isinstance(item, dict) else item for item in level)
        level = [i for x in whole if isinstance(x, (list, tuple, set, ValuesView)) for i in x]
        if not level:
            return value
    raise RecursionError


_ESCAPED_HALF: Final = re.compile(r"\\(u|U0000)[dD][89a-fA-F]")


def _writable(value: object, text: str) -> object:
    """The value itself; ValueError for an escape of half a character, as libyaml refuses it."""
    if _ESCAPED_HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise ValueError(f"{half} is half of a character") from None
    return value


def describe(value: object) -> str:
    """A few words for a value of the wrong kind."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    shown = text if len(text) <= 60 else text[:57] + "..."
    return f"the text {shown}" if isinstance(value, str) else shown
