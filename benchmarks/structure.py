"""How is the package cut: sizes, cycles, docstrings, and how many files a piece of work visits?

    python -m benchmarks.structure [--before FILE.json] [--out FILE.json]

All figures are measured from the code as it lies there, whatever its layout. Files that a piece of
work visits are counted by tracing `mergerl optimize` and `mergerl finetune` on the embedded digits
runs: a file counts when one of its functions is entered between the two points.

- one round of the search: from the call of a searcher's `tell` to the next call of it, with the
  renewal of the pool and the resume point;
- theta to reward: the part of it from the return of `ask` to the call of `tell`;
- one fine-tuning step: from one event "step" to the next, with no score or resume point between;
- `optimize --config` until the search begins: from the command line's `main` to the first `ask`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import merge_rl
from benchmarks import source_figures as source
from benchmarks.visited_files import Visits, search_mark, step_mark

SOURCE = Path(merge_rl.__file__).parent
TESTS = SOURCE.parent / "tests"
MAX_LINES, MAX_FUNCTION, MAX_PARAMETERS = 300, 60, 12

SEARCH = """
track: raw
budget: 220
merge: {map: affine, grouping: one, start: newest}
search: {population: 2, start_share: 0, final_share: 0}
reward: {pool_size: 60, subset_size: 10, refresh_size: 20}
sampler: {solver: heun, num_steps: 2}
evaluation: {num_images: 10, repeats: 3, selection_images: 10}
"""
FINETUNE = """
algorithm: pg
steps: 3
reward: {name: fid-subset, pool_size: 60, subset_size: 10, refresh: "10"}
rollout: {subsets: 4, train_steps: 2}
curves: {eval_steps: 2, every: 3, num_images: 10, final_images: 10, repeats: 3}
save_every: 10
snapshot_every: 10
"""


@dataclass(frozen=True)
class Figure:
    """A row of the table; `goal` is the number that `value` should be at most, or at least."""

    name: str
    value: float
    goal: float | None = None
    at_least: bool = False
    digits: int = 0
    what: tuple[str, ...] = ()  # the things counted, where they can be named

    @property
    def goal_text(self) -> str:
        """Such as "<= 16"."""
        sign = ">=" if self.at_least else "<="
        return "" if self.goal is None else f"{sign} {self.goal:,.{self.digits}f}"

    @property
    def verdict(self) -> str:
        """Whether the goal is reached; nothing without a goal."""
        if self.goal is None:
            return ""
        reached = self.value >= self.goal if self.at_least else self.value <= self.goal
        return "reached" if reached else "missed"


# ------------------------------------------------------------------------------ from the source


def size_figures(modules: Mapping[str, source.Module], root: Path) -> list[Figure]:
    """Modules, lines, folders and long files."""
    lines = sum(module.lines for module in modules.values())
    sizes = source.folder_sizes(modules)
    full, count = sizes.most_common(1)[0]
    long = [f"{m.path.relative_to(root)}: {m.lines}" for m in modules.values()
            if m.lines > MAX_LINES]  # fmt: skip
    longest = max(modules.values(), key=lambda module: module.lines)
    return [
        Figure("modules", len(modules), 175),
        Figure("lines", lines, 31_500),
        Figure("files in the fullest folder", count, 16, what=(str(full.relative_to(root)),)),
        Figure(f"files over {MAX_LINES} lines", len(long), 0, what=tuple(long)),
        Figure("lines of the longest file", longest.lines, MAX_LINES, what=(longest.name,)),
    ]


def cycle_figure(modules: Mapping[str, source.Module]) -> Figure:
    """Import cycles, statements in functions and under TYPE_CHECKING counted."""
    graph = {name: source.imports_of(module, modules) for name, module in modules.items()}
    cycles = source.import_cycles(graph)
    return Figure("import cycles", len(cycles), 0, what=tuple(" - ".join(c) for c in cycles))


def function_figures(modules: Mapping[str, source.Module]) -> list[Figure]:
    """Parameters and lines of functions."""
    functions = [
        (f"{module.name}:{name}", function)
        for module in modules.values()
        for name, function in source.functions_of(module.tree)
    ]
    most = max(functions, key=lambda item: source.parameters(item[1]))
    many = [f"{n}: {source.parameters(f)}" for n, f in functions
            if source.parameters(f) > MAX_PARAMETERS]  # fmt: skip
    long = [f"{n}: {source.length(f)}" for n, f in functions if source.length(f) > MAX_FUNCTION]
    lengths = sorted(source.length(function) for _, function in functions)
    return [
        Figure("parameters of the longest function", source.parameters(most[1]), MAX_PARAMETERS,
               what=(most[0],)),
        Figure(f"functions with over {MAX_PARAMETERS} parameters", len(many), 0, what=tuple(many)),
        Figure(f"functions over {MAX_FUNCTION} lines", len(long), 0, what=tuple(long)),
        Figure("lines of the median function", lengths[len(lengths) // 2]),
    ]  # fmt: skip


def docstring_figure(modules: Mapping[str, source.Module]) -> Figure:
    """Share of the public definitions that have a docstring, in percent."""
    found = [item for module in modules.values() for item in source.public_definitions(module)]
    bare = tuple(name for name, documented in found if not documented)
    share = 100 * (1 - len(bare) / len(found))
    return Figure("public definitions with a docstring, %", share, 98, True, 1, bare)


def source_figures(root: Path, tests: Path) -> list[Figure]:
    """All that can be read from the files of a package and of its tests."""
    modules = source.read_package(root)
    lines = sum(module.lines for module in modules.values())
    return [
        *size_figures(modules, root),
        cycle_figure(modules),
        *function_figures(modules),
        docstring_figure(modules),
        Figure("lines of tests a line of source", source.lines_below(tests) / lines, 0.9, digits=2),
    ]


# ---------------------------------------------------------------------------- from running it


def command(*arguments: str | Path) -> None:
    """Run `mergerl ARGUMENTS` in this process; RuntimeError with what it said if it fails."""
    main = import_module("merge_rl.__main__").main
    before, sys.argv = sys.argv, ["mergerl", *map(str, arguments)]
    said = io.StringIO()
    code: Any = 0
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    if code:
        raise RuntimeError(f"mergerl {arguments[0]} ended with {code}: {said.getvalue()[-2000:]}")


def visit_figures(folder: Path) -> list[Figure]:
    """Files that a round, a step and the way to the search visit; works below `folder`."""
    command("demo", folder / "digits")
    for name, text in (("search.yaml", SEARCH), ("finetune.yaml", FINETUNE)):
        (folder / name).write_text(text, encoding="utf-8")
    with Visits(SOURCE, search_mark) as search:
        command("optimize", folder / "digits/edm2", "--config", folder / "search.yaml",
                "--out", folder / "search")  # fmt: skip
    with Visits(SOURCE, step_mark) as steps:
        command("finetune", folder / "digits/sit", "--config", folder / "finetune.yaml",
                "--out", folder / "finetune")  # fmt: skip
    return [
        _visited("files of one round of the search", search.between("told", "told"), 20),
        _visited("of these, files from theta to reward", search.between("asked", "told"), 20),
        _visited("files of one fine-tuning step", steps.between("step", "step"), 20),
        _visited("files of optimize until it searches", search.between("begin", "asking"), 50),
    ]


def _visited(name: str, files: set[str], goal: int) -> Figure:
    return Figure(name, len(files), goal, what=tuple(sorted(files)))


# ---------------------------------------------------------------------------------- the table


def print_table(figures: list[Figure], before: Mapping[str, float]) -> None:
    """One line a figure: before (where there is one), now, goal."""
    print(f"{'figure':<40} {'before':>9} {'now':>9} {'goal':>10}")
    for figure in figures:
        old = f"{before[figure.name]:,.{figure.digits}f}" if figure.name in before else ""
        now = f"{figure.value:,.{figure.digits}f}"
        row = f"{figure.name:<40} {old:>9} {now:>9} {figure.goal_text:>10} {figure.verdict}"
        print(row.rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description="Structure of the package.")
    parser.add_argument("--before", type=Path, help="JSON of an earlier run, for its column")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = [*source_figures(SOURCE, TESTS), *visit_figures(Path(name).resolve())]
    before = {}
    if given.before:
        rows = json.loads(given.before.read_text(encoding="utf-8"))["figures"]
        before = {row["name"]: row["value"] for row in rows}
    print_table(figures, before)
    if given.out:
        rows = [{"name": f.name, "value": f.value, "goal": f.goal, "at_least": f.at_least,
                 "what": f.what} for f in figures]  # fmt: skip
        given.out.write_text(json.dumps({"figures": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
