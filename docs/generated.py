"""The pages of the reference that follow from the code: commands, settings, Python."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from rich.text import Text

import merge_rl
from merge_rl.cli.main import command_line
from merge_rl.cli.options import COMMANDS
from merge_rl.cli.options.settings import page


def write(folder: Path) -> None:
    """commands.md, settings.md and python.rst, touched only where their content changes."""
    listed = "\n".join(commands())  # which fills COMMANDS
    pages = {
        "commands.md": listed,
        "settings.md": page([COMMANDS[name] for name in sorted(COMMANDS)]),
        "python.rst": "\n".join(python()),
    }
    for name, text in pages.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def commands() -> Iterator[str]:
    """Every command with its usage, arguments and options, as `--help` has them."""
    yield "# Commands\n"
    yield "What `mergerl COMMAND --help` says. [Settings](settings.md) has what `--set` reaches.\n"
    group: Any = typer.main.get_command(command_line())
    for name, command in sorted(group.commands.items()):
        if command.hidden:
            continue
        context = group.context_class(command, info_name=f"mergerl {name}")
        usage = " ".join(command.collect_usage_pieces(context))
        yield f"## mergerl {name}\n\n    mergerl {name} {usage}\n\n{described(command.help)}\n"
        yield "| argument or option | default | meaning |\n| --- | --- | --- |"
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context)
            if record:
                meaning = cell(plain(parameter.help)).replace("<", "&lt;")
                yield f"| `{cell(record[0])}` | {default(parameter)} | {meaning} |"
        yield ""


def default(parameter: Any) -> str:
    """A default as it is shown: in parentheses where it lies elsewhere; none is empty."""
    shown = getattr(parameter, "show_default", None)
    if isinstance(shown, str):
        return cell(f"({shown})")
    given = None if parameter.required else parameter.default
    return "" if given is None or given is False or given in ((), []) else cell(str(given))


def described(text: str | None) -> str:
    """A command's help in Markdown: a paragraph all in bold is an example, other bold is code."""
    paragraphs = inspect.cleandoc(text or "").split("\n\n")
    marked = (re.sub(r"^\[bold\]([^\[]*)\[/bold\]$", r"    \1", part) for part in paragraphs)
    return plain(re.sub(r"\[bold\](.*?)\[/bold\]", r"`\1`", "\n\n".join(marked)))


def plain(text: str | None) -> str:
    """Help without the markup of terminals."""
    return Text.from_markup(inspect.cleandoc(text or "")).plain


def cell(text: str) -> str:
    """Text for a cell of a table: one line, with no bars of its own."""
    return " ".join(text.split()).replace("|", "\\|")


FIELDS = "precision, recall, density, coverage"  # of a named tuple, which says nothing of them
RETURNED = (
    "merge_rl.workflows.report.results.EvaluateResult",
    "merge_rl.workflows.report.results.Score",
    "merge_rl.workflows.report.results.CompareResult",
    "merge_rl.workflows.report.results.SearcherScore",
    "merge_rl.workflows.report.results.Verdict",
    "merge_rl.storage.hub.upload.Pushed",
    "merge_rl.core.distances.neighbours.PRDC",
)


def python() -> Iterator[str]:
    """Every public name, functions before classes, then what functions return beside these."""
    yield "Python\n======\n\n.. currentmodule:: merge_rl\n"
    yield "Everything here is imported from ``merge_rl``, on first use.\n"
    names = [name for name in merge_rl.__all__ if not name.startswith("_")]
    found = {name: getattr(merge_rl, name) for name in names}
    for title, kind in (("Functions", "function"), ("Classes", "class")):
        yield f"{title}\n{'-' * len(title)}\n"
        for name, value in found.items():
            if inspect.isclass(value) == (kind == "class"):
                members = "\n   :members:" if kind == "class" else ""
                yield f".. auto{kind}:: {name}{members}\n"
    yield "Results\n-------\n\nWhat some of the functions return; these are not made by hand.\n"
    for name in RETURNED:
        yield f".. autoclass:: {name}\n   :members:\n   :exclude-members: of, {FIELDS}\n"


def as_restructured(
    _app: Any, _what: str, _name: str, _value: Any, _options: Any, lines: list[str]
) -> None:
    """Indented formulas after a blank line become literal blocks; stray markup is escaped."""
    lines[:] = literal_blocks(lines)


def literal_blocks(lines: list[str]) -> Iterator[str]:
    """A `::` before every indented block that follows a blank line and text, which is escaped."""
    before = ""  # the last line of text
    blank = inside = False
    for line in lines:
        starts = blank and line.startswith("    ") and before and not before.startswith(" ")
        if starts and not before.endswith("::"):
            yield "::"
            yield ""
        inside = (starts or inside) and (not line.strip() or line.startswith("    "))
        is_code = inside or line.lstrip().startswith((">>>", "..."))
        yield line if is_code else escaped(line)
        blank = not line.strip()
        before = before if blank else line


def escaped(line: str) -> str:
    """Stars, bars, @ and trailing underscores outside of `names` mean themselves."""
    return "".join(_escaped(part) for part in re.split(r"(`[^`]*`)", line))


def _escaped(part: str) -> str:
    return part if part.startswith("`") else re.sub(r"([*|@]|(?<=\w)_(?=\W|$))", r"\\\1", part)
