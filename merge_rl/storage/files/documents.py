"""Untrusted YAML and JSON documents: bounded reading, and refusals that say where and why.

Only plain data comes out (mappings, lists, text, numbers, true / false, null); nothing in a
document can run, repeat a key or grow by aliases.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from merge_rl.errors import CheckpointError, ManifestError

if TYPE_CHECKING:
    from yaml import CSafeLoader as _LibraryLoader
else:
    _LibraryLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where it is built in

MAX_DOCUMENT_BYTES = 4 * 2**20
_USUAL_DEPTH: Final = 20  # of nesting
# PyYAML lets these escape for scalars that do not fit their tag, such as 2024-99-99.
_ESCAPING: Final = (ValueError, LookupError, AttributeError, TypeError)


class _KeysOnce(yaml.constructor.SafeConstructor):
    """Refuses repeated keys."""

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


def read_bounded(path: Path, limit: int = MAX_DOCUMENT_BYTES) -> str:
    """UTF-8 text of a file of at most `limit` bytes."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > limit:
        raise ManifestError(f"{path}: larger than {limit} bytes, the most that is read")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 text (byte {error.start})") from None


def load_yaml(path: Path) -> object:
    """The one YAML document in `path`, as plain data."""
    text = read_bounded(path)
    # What is refused here is read once more: for one wording of refusals, with libyaml or not.
    with suppress(yaml.YAMLError, *_ESCAPING):
        if _is_usual(text):
            return yaml.load(text, Loader=_QuickLoader)
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        message = f"{path}: not readable YAML: {error.problem}{place}"
    except RecursionError:
        message = f"{path}: not readable YAML: nested too deeply"
    except (yaml.YAMLError, *_ESCAPING) as error:
        detail = " ".join(str(error).split())
        message = f"{path}: not readable YAML: {detail}"
    raise ManifestError(message) from None


def load_json_mapping(text: str, where: str) -> dict[str, Any]:
    """A JSON object, as a dict of plain data; `where` begins the message of a refusal."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise CheckpointError(f"{where}: not readable JSON: nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {describe(value)}")
    return value


def describe(value: object) -> str:
    """A few words for a value of the wrong kind."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    shown = text if len(text) <= 60 else text[:57] + "..."
    return f"the text {shown}" if isinstance(value, str) else shown


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def require_plain(value: object, where: str) -> None:
    """Refuse what JSON cannot hold: dates, bytes, sets, keys that are not text."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ManifestError(f"{where}: expected text as key, found {describe(key)}")
            require_plain(item, f"{where}, {key}")
    elif isinstance(value, list):
        for position, item in enumerate(value):
            require_plain(item, f"{where}[{position}]")
    elif value is not None and not isinstance(value, (str, int, float, bool)):
        expected = "text, a number, true, false, a list or a mapping"
        raise ManifestError(f"{where}: expected {expected}, found {describe(value)}")


class Fields:
    """One mapping of a document, at `where` (file and place, for messages).

    Unknown and missing keys are refused on construction, wrong types on access. A key whose
    value is null counts as left out.
    """

    def __init__(
        self, value: object, where: str, *, required: Iterable[str], optional: Iterable[str] = ()
    ) -> None:
        if not isinstance(value, dict):
            raise ManifestError(f"{where}: expected a mapping, found {describe(value)}")
        required, known = list(required), [*required, *optional]
        for key in value:
            if key not in known:
                hint = nearest(str(key), known)
                listed = ", ".join(known)
                raise ManifestError(f"{where}: unknown key {key!r}{hint} (known: {listed})")
        for key in required:
            if value.get(key) is None:
                raise ManifestError(f"{where}: the key {key!r} is missing")
        self.where, self._value = where, value

    def __contains__(self, key: str) -> bool:
        return self._value.get(key) is not None

    def raw(self, key: str) -> object:
        """The value as it is, None when left out."""
        return self._value.get(key)

    def refuse(self, key: str, expected: str) -> ManifestError:
        """The error for a value that is not what was expected."""
        found = describe(self._value.get(key))
        return ManifestError(f"{self.where}, {key}: expected {expected}, found {found}")

    def text(self, key: str) -> str | None:
        value = self.raw(key)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise self.refuse(key, "text")
        return value if value is None else str(value)

    def needed_text(self, key: str) -> str:
        value = self.text(key)
        if value is None:
            raise self.refuse(key, "text")
        return value

    def flag(self, key: str) -> bool | None:
        value = self.raw(key)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def count(self, key: str) -> int | None:
        """A whole number that is not negative."""
        value = self.raw(key)
        if value is None:
            return None
        # bool is a subclass of int: "nimg: yes" is no count.
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.refuse(key, "a whole number of at least 0")
        return value

    def number(self, key: str) -> float | None:
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.refuse(key, "a number")
        return float(value)

    def entries(self, key: str) -> list[object]:
        value = self.raw(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.refuse(key, "a list")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """A mapping of plain data, empty when left out."""
        value = self.raw(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.refuse(key, "a mapping")
        require_plain(value, f"{self.where}, {key}")
        return value
