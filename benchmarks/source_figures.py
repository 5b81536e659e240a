"""What the source of a package tells of its structure: sizes, import cycles, docstrings.

Everything is read from the files with `ast`; nothing is imported.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Module:
    """A parsed file; `name` is the module's full name, without `__init__`."""

    name: str
    path: Path
    lines: int
    tree: ast.Module

    @property
    def package(self) -> str:
        """What relative imports start from: the module itself if it is a package."""
        return self.name if self.path.stem == "__init__" else self.name.rpartition(".")[0]


def read_package(root: Path) -> dict[str, Module]:
    """Every module below the folder `root` of a package, by full name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found[name] = Module(name, path, len(text.splitlines()), ast.parse(text))
    return found


def lines_below(folder: Path) -> int:
    """Lines of all Python files below a folder."""
    return sum(len(p.read_text(encoding="utf-8").splitlines()) for p in folder.rglob("*.py"))


def folder_sizes(modules: Mapping[str, Module]) -> Counter[Path]:
    """Files that lie in each folder itself, `__init__.py` among them."""
    return Counter(module.path.parent for module in modules.values())


# ------------------------------------------------------------------------------------- imports


def imports_of(module: Module, modules: Mapping[str, Module]) -> set[str]:
    """Modules of the same package that a module names in import statements.

    Wherever the statement stands: at the top, in a function, under TYPE_CHECKING.
    `from package import name` is the submodule where there is one.
    """
    found = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.package.split(".")[: -(node.level - 1) or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else base for name in inner}
    return (found & modules.keys()) - {module.name}


def import_cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other in a circle, sorted: one list a group.

    The strongly connected components with more than one module (Tarjan, 1972).
    """
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    waiting: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        waiting.append(name)
        for target in sorted(graph[name]):
            if target not in order:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in waiting:
                lowest[name] = min(lowest[name], order[target])
        if lowest[name] == order[name]:
            start = waiting.index(name)
            groups.append(sorted(waiting[start:]))
            del waiting[start:]

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return sorted(group for group in groups if len(group) > 1)


# ----------------------------------------------------------------------------------- functions


def functions_of(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Every function and method, nested ones too, by its dotted name within the module."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, (*FUNCTIONS, ast.ClassDef))
        name = f"{prefix}{node.name}" if named else prefix  # type: ignore[attr-defined]
        if isinstance(node, FUNCTIONS):
            yield name, node
        yield from functions_of(node, f"{name}." if named else prefix)


def parameters(function: Function) -> int:
    """Parameters of a function; `self` and `cls` are none, `*args` and `**options` are one each."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    own = bool(named) and named[0].arg in ("self", "cls")
    return len(named) - own + (given.vararg is not None) + (given.kwarg is not None)


def length(function: Function) -> int:
    """Lines from `def` to the end of the body; decorators are not counted."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


# ---------------------------------------------------------------------------------- docstrings


def public_definitions(module: Module) -> Iterator[tuple[str, bool]]:
    """Names of what is public in a module, the module first, and whether each has a docstring.

    Classes, functions and methods, nested classes too; what is defined inside a function is not
    public, and neither is anything in, or below, a name that starts with an underscore. Of a
    function with overloads the definition alone counts.
    """
    if any(part.startswith("_") for part in module.name.split(".")):
        return
    yield module.name, ast.get_docstring(module.tree) is not None
    yield from _public_below(module.tree, module.name)


def _public_below(tree: ast.AST, prefix: str) -> Iterator[tuple[str, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            if node.name.startswith("_") or _is_overload(node):
                continue
            name = f"{prefix}.{node.name}"
            yield name, ast.get_docstring(node) is not None
            if isinstance(node, ast.ClassDef):
                yield from _public_below(node, name)
        elif isinstance(node, (ast.If, ast.Try)):
            yield from _public_below(node, prefix)


def _is_overload(node: Function | ast.ClassDef) -> bool:
    return any(ast.unparse(d).rpartition(".")[2] == "overload" for d in node.decorator_list)
