"""`mergerl settings`: every setting with its default and meaning, of the commands that have some.

The documentation has a page with its output with --markdown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Final

import typer

from merge_rl.cli.options import COMMANDS, Offer
from merge_rl.cli.output import JsonFlag, print_json
from merge_rl.cli.tables import print_table
from merge_rl.config import Setting
from merge_rl.errors import UnknownNameError

COLUMNS: Final = ("setting", "option", "default", "meaning")
INTRODUCTION: Final = """# Settings

Written by `mergerl settings --markdown`. A setting is given by its option, in the file of
`--config` (dots are its levels), or by `--set SETTING=VALUE`; options override the file, and
`--set` overrides both. Parentheses say where a default comes from that is no fixed value.
"""


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(settings)


def settings(
    command: Annotated[
        str | None,
        typer.Argument(metavar="COMMAND", help="A command that has settings. \\[default: all]"),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The page of the documentation, on stdout.")
    ] = False,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """List every setting of a command with its option, default and meaning."""
    if command is not None and command not in COMMANDS:
        raise UnknownNameError("command with settings", command, COMMANDS)
    offers = [COMMANDS[name] for name in ([command] if command else sorted(COMMANDS))]
    if json:
        print_json({o.command: [document(o, item) for item in o.settings()] for o in offers})
    elif markdown:
        typer.echo(page(offers), nl=False)
    else:
        for title, offer in titled(offers):
            listed = [listed_row(offer, setting) for setting in offer.settings()]
            print_table(title, ("setting, option", "meaning"), listed, words=True)


def titled(offers: Iterable[Offer]) -> Iterator[tuple[str, Offer]]:
    """Commands under one title that have the same settings and options."""
    groups: dict[object, list[Offer]] = {}
    for offer in offers:
        groups.setdefault((offer.cls, offer.without), []).append(offer)
    for group in groups.values():
        yield ", ".join(f"mergerl {offer.command}" for offer in group), group[0]


def row(offer: Offer, setting: Setting) -> list[str]:
    """A line of the table."""
    shown = setting.shown
    if setting.default in (None, (), {}) and shown:
        shown = f"({shown})"
    return [setting.key, offer.flag(setting) or "", shown, meaning(setting)]


def listed_row(offer: Offer, setting: Setting) -> list[str]:
    """The same in two columns, which leave room for the meaning: name and option, what it is."""
    key, option, default, meant = row(offer, setting)
    return [f"{key}\n  {option}".rstrip(), f"{meant} [default: {default or 'none'}]"]


def meaning(setting: Setting) -> str:
    """What a setting does, with the values it may have where these are few."""
    listed = ", ".join(setting.about.choices)
    return f"{setting.about.help} One of {listed}." if listed else setting.about.help


def document(offer: Offer, setting: Setting) -> dict[str, Any]:
    """A setting in the JSON document; `default` is null where the default lies elsewhere."""
    return {
        "setting": setting.key,
        "option": offer.flag(setting),
        "type": setting.type_name,
        "default": setting.default,
        "default_text": setting.shown,
        "choices": list(setting.about.choices),
        "meaning": setting.about.help,
    }


def page(offers: Iterable[Offer]) -> str:
    """All of it as Markdown."""
    parts = [INTRODUCTION]
    for title, offer in titled(offers):
        lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
        for setting in offer.settings():
            key, *others = row(offer, setting)
            option = f"`{others[0]}`" if others[0] else ""
            lines.append(_line([f"`{key}`", option, *others[1:]]))
        if offer.presets:
            lines += ["", "`--preset NAME` lies under all of them."]
        parts.append(f"## {title}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
