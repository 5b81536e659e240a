"""ARCHITECTURE.md names files, functions and packages that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import merge_rl
from merge_rl import registry
from tests.test_architecture import ORDER, PARENTS

ROOT = Path(merge_rl.__file__).parent
PAGE = (Path(__file__).parents[1] / "ARCHITECTURE.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"`([^`\n]+)`", PAGE)


def definitions(source: str) -> set[str]:
    """Functions and classes of a module, and methods as Class.method."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            inner = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            found |= {f"{node.name}.{n.name}" for n in inner if isinstance(node, ast.ClassDef)}
    return found


def test_files_and_functions_are_there() -> None:
    named = [re.fullmatch(r"([\w/]+\.py)(?::([\w.]+))?", text) for text in QUOTED]
    stops = [(match[1], match[2]) for match in named if match]
    assert len(stops) > 25
    for file, name in stops:
        path = ROOT.parent / file if file.startswith("tests/") else ROOT / file
        assert path.is_file(), file
        assert name is None or name in definitions(path.read_text(encoding="utf-8")), (file, name)


def test_folders_are_there() -> None:
    folders = [text for text in QUOTED if re.fullmatch(r"[\w/]+/", text) and text != "merge_rl/"]
    assert len(folders) >= 4
    for folder in folders:
        assert ((ROOT.parent if folder.startswith("tests/") else ROOT) / folder).is_dir(), folder


def test_every_package_is_in_the_table_in_order() -> None:
    table = PAGE.split("## The packages, in order")[1].split("## To add")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    units = [name.rpartition("/")[2] for cell in cells for name in re.findall(r"`([\w/]+)`", cell)]
    assert units == ORDER
    assert {name.partition("/")[0] for name in QUOTED if "/" in name} >= PARENTS


def test_tables_of_the_registry_are_named() -> None:
    rows = PAGE.split("## To add")[1].split("## A theta")[0]
    tables = [name for name in vars(registry) if name.isupper() and name != "TYPE_CHECKING"]
    assert tables
    assert all(f"`{name}`" in rows for name in tables)
