"""Imports point downwards: the table of layers, read from the import statements.

Whatever a statement's place (module, function, TYPE_CHECKING), it is bound by the table. Only
statements that run at import count for cycles and for what the command line loads before it has
parsed its arguments.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import merge_rl

PACKAGE = "merge_rl"
ROOT = Path(merge_rl.__file__).parent

LAYER_OF_UNIT = {
    "errors": 0, "version": 0,
    "config": 1, "rng": 1, "parallel": 1, "interfaces": 1,
    "core": 2,
    "models": 3, "features": 3, "storage": 3, "search": 3, "demo": 3,
    "registry": 4,
    "workflows": 5,
    "cli": 6,
}  # fmt: skip
ALLOWED_LAYERS: dict[int, set[int]] = {
    0: set(), 1: {0}, 2: {0, 1}, 3: {0, 1, 2}, 4: {0, 1}, 5: {0, 1, 2, 3, 4}, 6: {0, 1, 2, 3, 4, 5},
}  # fmt: skip
# The front doors: the public names, and `python -m`.
TOP = {"", "__main__"}
THIRD_PARTY_HOMES: dict[str, set[str]] = {
    "scipy": {"core", "search"},
    "torchdiffeq": {"core"},
    "triton": {"core"},
    "safetensors": {"storage"},
    "PIL": {"storage"},
    "huggingface_hub": {"storage"},
    "nevergrad": {"search"},
    "cmaes": {"search"},
    "diffusers": {"models", "features"},
    "transformers": {"models", "features"},
    "peft": {"models"},
    "matplotlib": {"workflows"},
    "tensorboard": {"workflows"},
    "wandb": {"workflows"},
    "trackio": {"workflows"},
    "typer": {"cli"},
    "rich": {"cli"},
}

Sources = Mapping[str, str]
"""Module name -> source; a package's own name stands for its __init__.py."""


@dataclass(frozen=True)
class Import:
    """One imported module, by full name, and whether the statement runs at import."""

    module: str
    at_import: bool


def read_sources() -> dict[str, str]:
    sources = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = (PACKAGE, *path.relative_to(ROOT).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name] = path.read_text(encoding="utf-8")
    return sources


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node: ast.AST, at_import: bool = True) -> Iterator[tuple[ast.stmt, bool]]:
    """Import statements below `node`, and whether they run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, at_import
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from statements(child, False)
        elif isinstance(child, ast.If) and is_type_checking(child.test):
            for part in child.body:
                yield from statements(ast.Module([part], []), False)
            for part in child.orelse:
                yield from statements(ast.Module([part], []), at_import)
        else:
            yield from statements(child, at_import)


@functools.cache
def statements_of(source: str) -> list[tuple[ast.stmt, bool]]:
    """Those of a whole module; parsed once, however often it is asked about."""
    return list(statements(ast.parse(source)))


def imports_of(module: str, sources: Sources) -> list[Import]:
    """What a module imports; `from package import name` is the submodule where there is one."""
    is_package = any(name.startswith(f"{module}.") for name in sources)
    found = []
    for statement, at_import in statements_of(sources[module]):
        if isinstance(statement, ast.Import):
            found += [Import(alias.name, at_import) for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            parts = module.split(".") if is_package else module.split(".")[:-1]
            above = parts[: len(parts) - statement.level + 1] if statement.level else []
            base = ".".join([*above, *([statement.module] if statement.module else [])])
            for alias in statement.names:
                inner = f"{base}.{alias.name}"
                found.append(Import(inner if inner in sources else base, at_import))
    return found


def unit_of(module: str) -> str:
    """First name below the package; "" for the package itself."""
    return [*module.split("."), ""][1]


def check_layers(sources: Sources) -> list[str]:
    """A line for every import that the table of layers forbids."""
    problems = []
    for module in sources:
        unit = unit_of(module)
        if unit in TOP:
            continue
        if unit not in LAYER_OF_UNIT:
            problems.append(f"{module} belongs to no layer")
            continue
        layer = LAYER_OF_UNIT[unit]
        for item in imports_of(module, sources):
            target = unit_of(item.module)
            if item.module.split(".")[0] != PACKAGE or target == unit:
                continue
            if target in TOP or LAYER_OF_UNIT.get(target) not in ALLOWED_LAYERS[layer]:
                problems.append(f"{module} (layer {layer}) imports {item.module}")
    return problems


def check_third_parties(sources: Sources) -> list[str]:
    """A line for every import of a library outside of the part that it belongs to."""
    problems = []
    for module in sources:
        for item in imports_of(module, sources):
            library = item.module.split(".")[0]
            homes = THIRD_PARTY_HOMES.get(library)
            if homes is not None and unit_of(module) not in homes:
                problems.append(f"{module} imports {library}")
    return problems


def import_graph(sources: Sources) -> dict[str, set[str]]:
    """Module -> modules of ours that importing it runs. Parent packages run too, and first."""
    graph: dict[str, set[str]] = {}
    for module in sources:
        edges = {item.module for item in imports_of(module, sources) if item.at_import}
        graph[module] = {name for name in edges if name in sources and name != module}
    return graph


def find_cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules of one import cycle, in order; empty if there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph[module]):
            cycle = visit(target, [*path, module])
            if cycle:
                return cycle
        done.add(module)
        return []

    return next((cycle for module in sorted(graph) if (cycle := visit(module, []))), [])


def check_lazy(sources: Sources, start: str, library: str) -> list[str]:
    """The modules through which importing `start` loads `library`; a line for each."""
    graph, seen, waiting = import_graph(sources), set[str](), [start]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        parents = module.split(".")[:-1]
        packages = {".".join(parents[: i + 1]) for i in range(len(parents))}
        waiting += [*graph[module], *(packages & sources.keys())]
    return [
        f"{start} loads {library} through {module}"
        for module in sorted(seen)
        for item in imports_of(module, sources)
        if item.at_import and item.module.split(".")[0] == library
    ]


# ---------------------------------------------------------------------------- the package itself


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    found = read_sources()
    assert len(found) > 30
    return found


def test_imports_point_downwards(sources: dict[str, str]) -> None:
    assert check_layers(sources) == []


def test_third_parties_stay_at_home(sources: dict[str, str]) -> None:
    assert check_third_parties(sources) == []


def test_modules_do_not_import_each_other_in_a_circle(sources: dict[str, str]) -> None:
    assert find_cycle(import_graph(sources)) == []


def test_torch_is_loaded_by_commands_only(sources: dict[str, str]) -> None:
    fronts = [name for name in sources if unit_of(name) in TOP | {"cli"}]
    assert len(fronts) >= 3
    assert [line for name in fronts for line in check_lazy(sources, name, "torch")] == []


def test_the_table_has_a_place_for_every_module(sources: dict[str, str]) -> None:
    assert {unit_of(name) for name in sources} <= LAYER_OF_UNIT.keys() | TOP
    assert set(LAYER_OF_UNIT.values()) == ALLOWED_LAYERS.keys()


# ------------------------------------------------------------------- the checks can themselves fail


def package(**modules: str) -> dict[str, str]:
    """Sources by name below the package, `__` for a dot; every folder has an empty __init__."""
    sources = {PACKAGE: ""}
    for name, text in modules.items():
        full = f"{PACKAGE}.{name.replace('__', '.')}"
        sources.setdefault(full.rpartition(".")[0], "")
        sources[full] = text
    return sources


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("errors", "import merge_rl.version"),
        ("config", "from merge_rl.rng import stream"),
        ("core__a", "from merge_rl.storage.b import c"),
        ("core__a", "from merge_rl import registry"),
        ("core__a", "from merge_rl.registry import MODELS"),
        ("core__a", "from ..storage.b import c"),
        ("core__a", "from ..storage import b"),
        ("core__a", "def f():\n    import merge_rl.workflows.w"),
        ("core__a", "if TYPE_CHECKING:\n    from merge_rl.workflows.w import W"),
        ("core__a", "try:\n    import merge_rl.models.m\nexcept ImportError:\n    pass"),
        ("core__a", "class A:\n    from merge_rl.models.m import M"),
        ("core__a", "from merge_rl import sample"),
        ("models__m", "from merge_rl.storage.b import c"),
        ("search__s", "import merge_rl.features.f as f"),
        ("demo__d", "from merge_rl.storage import b"),
        ("registry", "from merge_rl.core.a import A"),
        ("registry", "from merge_rl.models.m import M"),
        ("workflows__w", "from merge_rl.cli.c import main"),
        ("workflows__w", "from merge_rl import optimize"),
        ("storage", "from merge_rl.workflows.w import W"),
    ],
)
def test_upward_and_sideways_imports_are_found(module: str, text: str) -> None:
    sources = package(
        errors="", version="", config="", rng="", core__a="", models__m="", features__f="",
        storage__b="", search__s="", demo__d="", registry="", workflows__w="", cli__c="",
    )  # fmt: skip
    assert check_layers(sources) == []
    problems = check_layers({**sources, f"{PACKAGE}.{module.replace('__', '.')}": text})
    assert len(problems) == 1
    assert " imports merge_rl" in problems[0]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("core__a", "from merge_rl.config import C\nfrom merge_rl.core.b import d\nimport torch"),
        ("core__a", "from . import b\nfrom .b import d\nfrom ..errors import E"),
        ("storage__b", "from merge_rl.core.a import FeatureStats"),
        ("registry", "from merge_rl.errors import E\nX = 'merge_rl.models.m:M'"),
        ("workflows__w", "from merge_rl import registry\nfrom merge_rl.search.s import S"),
        ("workflows__w", "from merge_rl.workflows import x"),
        ("cli__c", "from merge_rl.workflows.w import W\nfrom merge_rl.errors import E"),
        ("__main__", "from merge_rl.cli.c import main"),
    ],
)
def test_downward_imports_pass(module: str, text: str) -> None:
    sources = package(
        errors="", config="", core__b="", models__m="", search__s="", workflows__x="", cli__c=""
    )
    name = module if module == "__main__" else module.replace("__", ".")
    assert check_layers({**sources, f"{PACKAGE}.{name}": text, f"{PACKAGE}.registry": ""}) == []


def test_a_module_without_a_layer_is_found() -> None:
    assert check_layers(package(helpers="")) == ["merge_rl.helpers belongs to no layer"]


@pytest.mark.parametrize("library", sorted(THIRD_PARTY_HOMES))
@pytest.mark.parametrize(
    "text", ["import {}", "from {}.inner import x", "def f():\n    import {}.y"]
)
def test_strayed_libraries_are_found(library: str, text: str) -> None:
    homes = THIRD_PARTY_HOMES[library]
    for unit in set(LAYER_OF_UNIT) | {"__main__"}:
        problems = check_third_parties({f"{PACKAGE}.{unit}": text.format(library)})
        expected = [] if unit in homes else [f"merge_rl.{unit} imports {library}"]
        assert problems == expected


def test_names_that_only_begin_like_a_library_pass() -> None:
    assert check_third_parties(package(core__a="import richer\nfrom safetensors_x import y")) == []


def test_cycles_are_found() -> None:
    sources = package(
        core__a="from merge_rl.core.b import x",
        core__b="from . import c",
        core__c="import merge_rl.core.a",
    )
    expected = [f"merge_rl.core.{x}" for x in "abca"]
    assert find_cycle(import_graph(sources)) == expected
    # Imports inside functions and for types alone run later, when all modules are there.
    for later in (
        "def f():\n    {}",
        "if TYPE_CHECKING:\n    {}",
        "if typing.TYPE_CHECKING:\n    {}",
    ):
        text = later.format("import merge_rl.core.a")
        assert find_cycle(import_graph({**sources, "merge_rl.core.c": text})) == []
    text = "if TYPE_CHECKING:\n    pass\nelse:\n    import merge_rl.core.a"
    assert find_cycle(import_graph({**sources, "merge_rl.core.c": text})) == expected


def test_loading_through_others_is_found() -> None:
    sources = package(
        cli__c="from merge_rl.config import C\ndef f():\n    import torch",
        config="from merge_rl.errors import E",
        errors="",
        core__a="",
    )
    assert check_lazy(sources, "merge_rl.cli.c", "torch") == []
    message = "merge_rl.cli.c loads torch through merge_rl."
    for module, text in (("config", "import torch.nn"), ("errors", "from torch import Tensor")):
        found = check_lazy({**sources, f"merge_rl.{module}": text}, "merge_rl.cli.c", "torch")
        assert found == [message + module]
    # Importing a submodule runs its package first.
    package_text = {**sources, "merge_rl.cli": "import torch"}
    assert check_lazy(package_text, "merge_rl.cli.c", "torch") == [message + "cli"]
