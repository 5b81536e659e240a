"""Sections that the pages of all runs share: settings, cost, provenance, how to make it again."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from merge_rl.config import SamplerConfig, default_text, flattened, settings_of
from merge_rl.errors import MergeRLError, misfit
from merge_rl.version import __version__
from merge_rl.workflows.report.elements import lines, shares
from merge_rl.workflows.report.markup import (
    NOTHING,
    Safe,
    code,
    folded,
    joined,
    listed,
    section,
    table,
    tag,
)

FEW_HASHES: Final = 6  # files, up to which all are shown at once
# Where inputs lie, which is told where they are told apart: by their hashes.
PLACES: Final = frozenset(
    ["checkpoints", "model", "reference", "heldout", "extractor_weights", "autoencoder_weights"]
)
_STRANGE: Final = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def attempted(title: str, build: Callable[[], Safe]) -> Safe:
    """A section; of files that an older version wrote in another form, a sentence in its place."""
    try:
        return build()
    except (*_STRANGE, MergeRLError) as error:
        said = (
            f"This part cannot be shown: the files of another version differ here ({misfit(error)})"
        )
        text = f"{said}."
        return section(title, tag("p", text, class_="note"))


def warned(texts: Sequence[str]) -> Safe:
    """What must not be overlooked."""
    return joined(tag("p", f"{text}.", class_="warning") for text in texts)


def settings_section(cls: type, values: Mapping[str, Any]) -> Safe:
    """Settings of a run that differ from the defaults of their dataclass."""
    rows = []
    # The groups of a grouping follow from its name.
    told = PLACES | {"merge.groups"} if _said(values, "merge.grouping", None) else PLACES
    own = {
        setting.key: setting.default for setting in settings_of(SamplerConfig, prefix="sampler.")
    }
    for setting in settings_of(cls):
        default = own.get(setting.key, setting.default)
        value = _said(values, setting.key, default)
        plain = list(default) if isinstance(default, tuple) else default
        if setting.key in told or value in (None, plain, [], {}):
            continue
        rows.append([tag("code", setting.key), _text(value), setting.shown])
    if not rows:
        return section("Settings", tag("p", "All settings are the defaults."))
    drawn = table(["setting", "here", "default"], rows, kind="text")
    note = "Said by you, or worked out from the set, the searcher and the budget."
    return section("Settings that differ from the defaults", drawn, note=note)


def _said(values: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value at a dotted key, a mapping such as that of groups as a whole."""
    found: Any = values
    for name in key.split("."):
        if not isinstance(found, Mapping) or name not in found:
            return default
        found = found[name]
    return found


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return lines(*(f"{key}: {_text(item)}" for key, item in value.items()))
    return default_text(tuple(value) if isinstance(value, list) else value)


def cost_section(images: Mapping[str, float], sentences: Sequence[str]) -> Safe:
    """Images by what they went to, and time."""
    return section("Cost and time", shares(images), listed(sentences))


def provenance_section(inputs: Mapping[str, Any], places: Mapping[str, Any]) -> Safe:
    """SHA-256 of everything that was read, and the version that read it.

    `inputs` is inputs.json; of the settings, `places`, those that are text name files.
    """
    rows = []
    for name, digest in flattened(inputs.get("hashes") or {}).items():
        if digest is None:
            continue
        place = places.get(name)
        rows.append(
            [
                name,
                Path(place).name if isinstance(place, str) else "",
                tag("span", str(digest), class_="hash"),
            ]
        )
    began = inputs.get("version")
    by = f"Begun with merge_rl {began}." if began else "The version that began it is not recorded."
    if not rows:
        return section("Provenance", tag("p", f"{by} No hashes are recorded."))
    drawn = table(["input", "file", "SHA-256"], rows, kind="text")
    note = f"{by} {len(rows)} inputs were read."
    shown = drawn if len(rows) <= FEW_HASHES else folded(f"Hashes of all {len(rows)}", drawn)
    return section("Provenance", shown, note=note)


def again_section(commands: Sequence[tuple[str, Sequence[object]]], name: str, text: str) -> Safe:
    """Commands with what each makes, and the file of settings `name` that the first one needs."""
    made = [
        joined([tag("p", what), code(" ".join(shlex.quote(str(part)) for part in command))])
        for what, command in commands
    ]
    kept = folded(f"The settings, {name}", code(text)) if text else NOTHING
    return section("Make it again", *made, kept)


def shown_path(path: str | Path) -> str:
    """A path as one types it: from here, or from home, where it lies below."""
    found = Path(path)
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~")):
        if found.is_absolute() and found.is_relative_to(base):
            return str(Path(prefix) / found.relative_to(base))
    return str(found)


def footer() -> Safe:
    """Who wrote the page."""
    text = (
        f"Written by merge_rl {__version__}. The page is one file and loads nothing from "
        "elsewhere. To cite the method: Li et al., Optimizing Visual Generative Models via "
        "Distribution-wise Rewards, ICML 2026 (arXiv:2607.02291)."
    )
    return tag("footer", text)
