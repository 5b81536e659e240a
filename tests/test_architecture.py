"""The plan of the house, read from the sources: one order of packages, and faces between them.

A package imports only packages that stand before it in ORDER, and only what their `__init__`
offers. Whatever a statement's place (module, function, TYPE_CHECKING), it is bound by this, and no
circle of imports is allowed. Only statements that run at import count for what the command line
loads before it has parsed its arguments.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

import merge_rl
from benchmarks.source_figures import functions_of, length

PACKAGE = "merge_rl"
ROOT = Path(merge_rl.__file__).parent

ORDER = (  # noqa: SIM905
    "late errors version own_code untrusted config rng interfaces progress parallel core registry "
    "files pickles checkpoints convert runs hub "
    "models features searchers demo "
    "rollout reference rewards report assembly evaluate export optimize compare plan finetune "
    "cli"
).split()
# Their sub-packages are units of their own.
PARENTS = {"storage", "workflows"}
# Imported by file: a face would load torch for all that need one function (core), or for a process
# that is alone (parallel).
BY_FILE = {"core", "parallel"}
MOST_FILES, LEAST_FILES, MOST_LINES = 16, 3, 300
LONGEST_FUNCTION = 60
# The front doors: the public names, and `python -m`.
TOP = {"", "__main__"}
THIRD_PARTY_HOMES: dict[str, set[str]] = {
    "scipy": {"core", "searchers"},
    "torchdiffeq": {"core"},
    "triton": {"core"},
    "safetensors": {"files"},
    "PIL": {"files"},
    "huggingface_hub": {"hub", "export"},
    "nevergrad": {"searchers"},
    "cmaes": {"searchers"},
    "diffusers": {"models", "features"},
    "transformers": {"models", "features"},
    "peft": {"models"},
    "matplotlib": {"report"},
    "tensorboard": {"runs"},
    "wandb": {"runs"},
    "trackio": {"runs"},
    "typer": {"cli"},
    "rich": {"cli"},
}

FULL_NAMES = {
    unit: f"{PACKAGE}.{parent}.{unit}"
    for parent, units in {
        "storage": "files pickles checkpoints convert runs hub",
        "workflows": "rollout reference rewards assembly evaluate export optimize compare report "
        "plan finetune",
    }.items()
    for unit in units.split()
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
    """The unit of ORDER that a module belongs to; "" for the package itself.

    A parent's own `__init__` belongs to the parent, which is no unit.
    """
    parts = [*module.split(".")[1:], "", ""]
    return parts[1] or parts[0] if parts[0] in PARENTS else parts[0]


def face_of(module: str) -> str:
    """Full name of the package that a module belongs to: what others import from."""
    parts = module.split(".")
    return ".".join(parts[: 3 if parts[1] in PARENTS else 2])


def check_order(sources: Sources) -> list[str]:
    """A line for every import of a package that does not stand before the importing one."""
    problems = []
    for module in sources:
        unit = unit_of(module)
        if unit in TOP | PARENTS:
            continue
        if unit not in ORDER:
            problems.append(f"{module} has no place in the order")
            continue
        for item in imports_of(module, sources):
            target = unit_of(item.module)
            if item.module.split(".")[0] != PACKAGE or target == unit:
                continue
            if target not in ORDER or ORDER.index(target) > ORDER.index(unit):
                problems.append(f"{module} imports {item.module}")
    return problems


def check_faces(sources: Sources) -> list[str]:
    """A line for every import across packages that reaches behind a face."""
    problems = []
    for module in sources:
        unit = unit_of(module)
        for item in imports_of(module, sources):
            inside = item.module.split(".")[0] == PACKAGE and item.module in sources
            target = unit_of(item.module)
            if not inside or target in TOP | PARENTS | BY_FILE | {unit}:
                continue
            if item.module != face_of(item.module) and item.module not in offered(
                face_of(item.module), sources
            ):
                problems.append(f"{module} imports {item.module}, past its face")
    return problems


def exported(source: str) -> list[str] | None:
    """The names of `__all__`; None where a module has none."""
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "__all__":
            names: list[str] = ast.literal_eval(node.value)  # type: ignore[attr-defined]
            return names
    return None


def check_hidden(sources: Sources) -> list[str]:
    """A line for every name that a face offers in place of the file of that name.

    The file could then be imported by its full name alone.
    """
    problems = []
    for module, source in sources.items():
        for node in ast.parse(source).body if exported(source) else ():
            if isinstance(node, ast.ImportFrom) and node.module != module:
                names = {alias.asname or alias.name for alias in node.names}
                problems += [f"{module} hides {n}" for n in names if f"{module}.{n}" in sources]
    return problems


def offered(face: str, sources: Sources) -> set[str]:
    """Modules that a package offers whole: those that its `__all__` names."""
    return {f"{face}.{name}" for name in exported(sources[face]) or []} & set(sources)


def check_folders(sources: Sources) -> list[str]:
    """A line for a folder of too many or too few files, a file too long, a face without words.

    Files are counted without `__init__`; a folder of folders alone has no files to count.
    """
    problems = []
    folders: dict[str, int] = {}
    for module, source in sources.items():
        lines = source.count("\n")
        if lines > MOST_LINES:
            problems.append(f"{module} has {lines} lines, more than {MOST_LINES}")
        if any(name.startswith(f"{module}.") for name in sources):
            if not ast.get_docstring(ast.parse(source)):
                problems.append(f"{module} does not say what lives there")
            faceless = module == PACKAGE or unit_of(module) in BY_FILE | PARENTS
            if not faceless and exported(source) is None:
                problems.append(f"{module} has no __all__")
        else:
            parent = module.rpartition(".")[0]
            folders[parent] = folders.get(parent, 0) + 1
    problems += [
        f"{folder} has {count} files, expected {LEAST_FILES} to {MOST_FILES}"
        for folder, count in folders.items()
        if not LEAST_FILES <= count <= MOST_FILES
    ]
    return problems


def check_functions(sources: Sources) -> list[str]:
    """A line for every function that is too long."""
    return [
        f"{module}.{name} has {length(function)} lines, more than {LONGEST_FUNCTION}"
        for module, source in sources.items()
        for name, function in functions_of(ast.parse(source))
        if length(function) > LONGEST_FUNCTION
    ]


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


def import_graph(sources: Sources, *, at_import: bool = False) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports anywhere, or only when it is imported."""
    graph: dict[str, set[str]] = {}
    for module in sources:
        edges = {
            item.module for item in imports_of(module, sources) if item.at_import or not at_import
        }
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
    graph, seen, waiting = import_graph(sources, at_import=True), set[str](), [start]
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


def test_packages_import_only_earlier_ones(sources: dict[str, str]) -> None:
    assert check_order(sources) == []


def test_packages_are_imported_by_their_faces(sources: dict[str, str]) -> None:
    assert check_faces(sources) == []


def test_no_name_hides_a_file(sources: dict[str, str]) -> None:
    assert check_hidden(sources) == []
    face = '__all__ = ["a"]\nfrom merge_rl.config.{} import a'
    inner = {"merge_rl.config.a": "", "merge_rl.config.b": ""}
    for name in "ab":
        found = check_hidden({"merge_rl.config": face.format(name), **inner})
        assert found == ["merge_rl.config hides a"]
    whole = '__all__ = ["a"]\nfrom merge_rl.config import a'
    assert check_hidden({"merge_rl.config": whole, **inner}) == []


def test_folders_and_files_are_of_a_size_to_read(sources: dict[str, str]) -> None:
    assert check_folders(sources) == []


def test_functions_are_of_a_size_to_read(sources: dict[str, str]) -> None:
    assert check_functions(sources) == []


def test_third_parties_stay_at_home(sources: dict[str, str]) -> None:
    assert check_third_parties(sources) == []


def test_modules_do_not_import_each_other_in_a_circle(sources: dict[str, str]) -> None:
    assert find_cycle(import_graph(sources)) == []


def test_torch_is_loaded_by_commands_only(sources: dict[str, str]) -> None:
    fronts = [name for name in sources if unit_of(name) in TOP | {"cli"}]
    assert len(fronts) >= 3
    assert [line for name in fronts for line in check_lazy(sources, name, "torch")] == []


def test_the_order_has_a_place_for_every_module(sources: dict[str, str]) -> None:
    assert {unit_of(name) for name in sources} == {*ORDER} | TOP | PARENTS
    assert len(ORDER) == len(set(ORDER))


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
        ("config__c", "from merge_rl.rng import stream"),
        ("core__a", "from merge_rl.storage.files import c"),
        ("core__a", "from merge_rl import registry"),
        ("core__a", "from merge_rl.registry import MODELS"),
        ("core__a", "from ..storage.files import c"),
        ("core__a", "from ..storage import files"),
        ("core__a", "def f():\n    import merge_rl.workflows.rollout"),
        ("core__a", "if TYPE_CHECKING:\n    from merge_rl.workflows.rollout import W"),
        ("core__a", "try:\n    import merge_rl.models\nexcept ImportError:\n    pass"),
        ("core__a", "class A:\n    from merge_rl.models import M"),
        ("core__a", "from merge_rl import sample"),
        ("core__a", "from merge_rl.storage import files"),
        ("storage__files__b", "from merge_rl.storage.pickles import c"),
        ("registry", "from merge_rl.models import M"),
        ("workflows__rollout__r", "from merge_rl.cli import main"),
        ("workflows__rollout__r", "from merge_rl import optimize"),
        ("storage__files", "from merge_rl.workflows.rollout import W"),
    ],
)
def test_imports_of_later_packages_are_found(module: str, text: str) -> None:
    sources = package(
        errors="", version="", config__c="", rng="", core__a="", registry="", models__m="",
        storage__files__b="", storage__pickles__p="", workflows__rollout__r="", cli__c="",
    )  # fmt: skip
    assert check_order(sources) == []
    problems = check_order({**sources, f"{PACKAGE}.{module.replace('__', '.')}": text})
    assert len(problems) == 1
    assert " imports merge_rl" in problems[0]


@pytest.mark.parametrize(
    ("module", "text", "found"),
    [
        ("core__a", "from merge_rl.config import C\nfrom merge_rl.core.b import d", 0),
        ("core__a", "from . import b\nfrom .b import d\nfrom ..errors import E", 0),
        ("core__a", "from merge_rl.config.c import C", 1),
        ("storage__pickles__p", "from merge_rl.core.a import A", 0),
        ("storage__pickles__p", "from merge_rl.storage.files import b", 1),
        ("storage__pickles__p", "from merge_rl.storage.files import whole", 0),
        ("storage__pickles__p", "from merge_rl.storage.files.b import B", 1),
        ("storage__pickles__p", "from merge_rl.storage.files import B", 0),
        ("registry", "from merge_rl.errors import E\nX = 'merge_rl.models.m:M'", 0),
        ("cli__c", "def f():\n    from merge_rl.storage.files.b import B", 1),
        ("__main__", "from merge_rl.cli.c import main", 1),
    ],
)
def test_imports_past_a_face_are_found(module: str, text: str, found: int) -> None:
    sources = package(
        errors="", config__c="", core__a="", core__b="", models__m="", storage__pickles__p="",
        storage__files__b="", storage__files__whole="", cli__c="", registry="",
    )  # fmt: skip
    sources["merge_rl.storage.files"] = '__all__ = ["B", "whole"]'
    name = f"{PACKAGE}.{module if module == '__main__' else module.replace('__', '.')}"
    assert check_order({**sources, name: text}) == []
    assert len(check_faces({**sources, name: text})) == found


def test_a_module_without_a_place_is_found() -> None:
    assert check_order(package(helpers="")) == ["merge_rl.helpers has no place in the order"]


def test_functions_that_are_too_long_are_found() -> None:
    body = "    pass\n" * (LONGEST_FUNCTION - 1)
    kept = {"merge_rl.a": f"def f():\n{body}"}
    assert check_functions(kept) == []
    longer = {"merge_rl.a": f"class C:\n  def f(self):\n{body}    pass\n"}
    told = f"merge_rl.a.C.f has {LONGEST_FUNCTION + 1} lines, more than {LONGEST_FUNCTION}"
    assert check_functions(longer) == [told]


def test_folders_and_files_of_the_wrong_size_are_found() -> None:
    face = '"""Words."""\n__all__ = ["a"]\n'
    some = package(**{f"searchers__s{i}": "" for i in range(3)})
    some |= {"merge_rl": '"""Words."""', "merge_rl.searchers": face}
    some |= {f"merge_rl.{name}": "" for name in ("errors", "rng")}
    some["merge_rl.version"] = "\n" * MOST_LINES
    assert check_folders(some) == []
    assert check_folders({**some, "merge_rl.rng": "\n" * (MOST_LINES + 1)}) == [
        f"merge_rl.rng has {MOST_LINES + 1} lines, more than {MOST_LINES}"
    ]
    many = {**some, **{f"merge_rl.searchers.t{i}": "" for i in range(MOST_FILES - 2)}}
    few = {name: text for name, text in some.items() if name != "merge_rl.searchers.s2"}
    for sources, count in ((many, MOST_FILES + 1), (few, 2)):
        assert check_folders(sources) == [
            f"merge_rl.searchers has {count} files, expected {LEAST_FILES} to {MOST_FILES}"
        ]
    assert check_folders({**some, "merge_rl.searchers": '"""Words."""'}) == [
        "merge_rl.searchers has no __all__"
    ]
    assert check_folders({**some, "merge_rl.searchers": '__all__ = ["a"]'}) == [
        "merge_rl.searchers does not say what lives there"
    ]


@pytest.mark.parametrize("library", sorted(THIRD_PARTY_HOMES))
@pytest.mark.parametrize(
    "text", ["import {}", "from {}.inner import x", "def f():\n    import {}.y"]
)
def test_strayed_libraries_are_found(library: str, text: str) -> None:
    homes = THIRD_PARTY_HOMES[library]
    for unit in {*ORDER, "__main__"}:
        name = face_of(FULL_NAMES.get(unit, f"{PACKAGE}.{unit}"))
        problems = check_third_parties({name: text.format(library)})
        expected = [] if unit in homes else [f"{name} imports {library}"]
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
    for later in (
        "def f():\n    {}",
        "if TYPE_CHECKING:\n    {}",
        "if typing.TYPE_CHECKING:\n    {}",
        "if TYPE_CHECKING:\n    pass\nelse:\n    {}",
    ):
        text = later.format("import merge_rl.core.a")
        circle = {**sources, "merge_rl.core.c": text}
        assert find_cycle(import_graph(circle)) == expected
        at_import = expected if "else" in later else []
        assert find_cycle(import_graph(circle, at_import=True)) == at_import


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


@pytest.mark.parametrize(
    "package",
    [
        ".".join(face.parent.relative_to(ROOT.parent).parts)
        for face in sorted(ROOT.rglob("__init__.py"))
        if "offered(" in face.read_text(encoding="utf-8")
    ],
)
def test_names_that_are_imported_on_use_are_where_they_are_said_to_be(package: str) -> None:
    face = import_module(package)
    for name in face.__all__:
        assert getattr(face, name) is not None, name
