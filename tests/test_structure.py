"""The benchmark of the package's structure, on packages made by hand."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import source_figures as source
from benchmarks import structure
from benchmarks.visited_files import Visits, search_mark, step_mark

LONG = "def long(a, /, b, *rest, c=1, **options):\n" + "    a = b\n" * 60 + "    return a\n"
FILES = {
    "__init__.py": '"""Top."""\nfrom typing import TYPE_CHECKING\n',
    "alone.py": '"""Nothing."""\nimport os\nfrom shapes.parts import left\n',
    "parts/__init__.py": "",
    "parts/left.py": '"""L."""\nfrom shapes.parts.right import x\n\n\n' + LONG,
    "parts/right.py": '"""R."""\n\n\ndef x():\n    """Late."""\n    from . import far\n',
    "parts/far.py": "if TYPE_CHECKING:\n    from ..parts.left import long\n",
    "parts/_hidden.py": "from shapes import alone\n\n\ndef bare(): pass\n",
    "classes.py": '''"""C."""


class A:
    """One."""

    def told(self): "Yes."
    def bare(self, x, y): ...
    def _own(self): ...
    class B: ...


@typing.overload
def after(*, x: int): ...


class _Hidden:
    def bare(self): ...


if True:
    @decorated(
        by=1,
    )
    async def after(*, x): def_inside = lambda: 0
''',
}


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    root = tmp_path / "shapes"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_sizes_are_those_of_the_files(shapes: Path) -> None:
    modules = source.read_package(shapes)
    assert set(modules) == {
        "shapes", "shapes.alone", "shapes.classes", "shapes.parts", "shapes.parts.left",
        "shapes.parts.right", "shapes.parts.far", "shapes.parts._hidden",
    }  # fmt: skip
    assert modules["shapes.parts.left"].lines == 4 + 62
    assert source.folder_sizes(modules) == {shapes: 3, shapes / "parts": 5}
    figures = {figure.name: figure for figure in structure.size_figures(modules, shapes)}
    assert figures["files in the fullest folder"].value == 5
    assert figures["files in the fullest folder"].what == ("parts",)
    assert figures["lines of the longest file"].value == 66
    assert figures["files over 300 lines"].value == 0
    assert source.lines_below(shapes) == figures["lines"].value


def test_a_file_is_long_from_301_lines_on(shapes: Path) -> None:
    for lines, expected in ((300, 0), (301, 1)):
        (shapes / "alone.py").write_text("x = 1\n" * lines, encoding="utf-8")
        figures = structure.size_figures(source.read_package(shapes), shapes)
        assert {f.name: f.value for f in figures}["files over 300 lines"] == expected


def test_imports_count_wherever_they_stand(shapes: Path) -> None:
    modules = source.read_package(shapes)
    graph = {name: source.imports_of(module, modules) for name, module in modules.items()}
    assert graph["shapes.parts.left"] == {"shapes.parts.right"}
    assert graph["shapes.parts.right"] == {"shapes.parts.far"}
    assert graph["shapes.parts.far"] == {"shapes.parts.left"}
    assert graph["shapes.alone"] == {"shapes.parts.left"}
    figure = structure.cycle_figure(modules)
    assert figure.value == 1
    assert figure.what == ("shapes.parts.far - shapes.parts.left - shapes.parts.right",)
    assert figure.verdict == "missed"


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}, "c": {"a"}}, [["a", "b"]]),
        ({"a": {"b"}, "b": {"a", "c"}, "c": {"d"}, "d": {"c"}}, [["a", "b"], ["c", "d"]]),
        # Two circles through b are one group.
        ({"a": {"b"}, "b": {"a", "c"}, "c": {"b"}}, [["a", "b", "c"]]),
        # c is done when d looks at it: no circle.
        ({"a": {"b", "d"}, "b": {"c"}, "c": set(), "d": {"c"}}, []),
    ],
)
def test_cycles_are_strongly_connected(
    graph: dict[str, set[str]], expected: list[list[str]]
) -> None:
    assert source.import_cycles(graph) == expected


def test_parameters_and_lines_of_functions(shapes: Path) -> None:
    modules = source.read_package(shapes)
    functions = dict(source.functions_of(modules["shapes.classes"].tree))
    assert list(functions) == ["A.told", "A.bare", "A._own", "after", "_Hidden.bare"]
    assert {n: source.parameters(f) for n, f in functions.items()} == {
        "A.told": 0, "A.bare": 2, "A._own": 0, "_Hidden.bare": 0, "after": 1,
    }  # fmt: skip
    assert source.length(functions["after"]) == 1  # without its decorator
    figures = {f.name: f for f in structure.function_figures(modules)}
    assert figures["parameters of the longest function"].value == 5
    assert figures["parameters of the longest function"].what == ("shapes.parts.left:long",)
    assert figures["functions over 60 lines"].what == ("shapes.parts.left:long: 62",)
    assert figures["functions with over 12 parameters"].value == 0


def test_public_definitions_are_counted_with_their_docstrings(shapes: Path) -> None:
    modules = source.read_package(shapes)
    assert dict(source.public_definitions(modules["shapes.classes"])) == {
        "shapes.classes": True,
        "shapes.classes.A": True,
        "shapes.classes.A.told": True,
        "shapes.classes.A.bare": False,
        "shapes.classes.A.B": False,
        "shapes.classes.after": False,
    }
    names = [name for name, _ in source.public_definitions(modules["shapes.classes"])]
    assert names.count("shapes.classes.after") == 1  # not its overload
    assert list(source.public_definitions(modules["shapes.parts._hidden"])) == []
    # Beside those of classes: shapes, alone, left, right and x have one; parts, far, long have not.
    figure = structure.docstring_figure(modules)
    assert figure.value == pytest.approx(100 * 8 / 14)
    assert set(figure.what) >= {"shapes.parts", "shapes.parts.far", "shapes.parts.left.long"}


# --------------------------------------------------------------------------------------- visits

TRACED = {
    "loop.py": """
        from tracedpkg import searcher
        from tracedpkg.pool import Pool

        def run(rounds, tracker):
            found = searcher.Searcher()
            for index in range(rounds):
                thetas = found.ask()
                from tracedpkg.late import reward
                found.tell(thetas, reward(Pool(index), index))
                tracker.event({"kind": "step", "step": index})
        """,
    "pool.py": """
        from dataclasses import dataclass

        @dataclass
        class Pool:
            rows: int
        """,
    "late.py": """
        import threading
        from tracedpkg.early import at_import
        from tracedpkg import more

        VALUE = at_import()

        def reward(pool, index):
            thread = threading.Thread(target=more.work)
            thread.start()
            thread.join()
            return more.second() if index == 1 else index
        """,
    "early.py": "def at_import(): return 1",
    "more.py": """
        def work(): pass
        def second():
            from tracedpkg.extra import only_once
            return only_once()
        """,
    "extra.py": "def only_once(): return 7",
    "searcher.py": """
        from tracedpkg import asks

        class Searcher:
            def ask(self): return asks.one()
            def tell(self, thetas, rewards): pass
        """,
    "asks.py": "def one(): return [0.0]",
    "screen.py": """
        from tracedpkg.bar import draw

        class Screen:
            def phase(self, name, total): draw()
            def advance(self, count): draw()
            def event(self, event): draw()
        """,
    "bar.py": "def draw(): pass",
}


@pytest.fixture
def traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    root = tmp_path / "tracedpkg"
    root.mkdir()
    (root / "__init__.py").touch()
    for name, text in TRACED.items():
        lines = text.strip("\n").splitlines()
        indent = len(lines[0]) - len(lines[0].lstrip())
        (root / name).write_text("\n".join(line[indent:] for line in lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield root
    for name in [name for name in sys.modules if name.partition(".")[0] == "tracedpkg"]:
        del sys.modules[name]


def part(name: str) -> ModuleType:
    return import_module(f"tracedpkg.{name}")


def test_files_from_theta_to_reward_are_counted(traced: Path) -> None:
    with Visits(traced, search_mark) as visits:
        part("loop").run(3, part("screen").Screen())
    # From asking to telling: what asking visits is not counted, nor what an import runs; threads
    # and the methods that dataclasses make are. The second round is the fullest.
    assert visits.between("asked", "told") == {"late.py", "more.py", "pool.py", "extra.py"}
    assert visits.between("told", "told") == {
        "late.py", "more.py", "pool.py", "extra.py", "searcher.py", "asks.py",
    }  # fmt: skip
    assert visits.between("begin", "asking") == {"loop.py"}
    assert sys.getprofile() is None
    assert threading.getprofile() is None


def test_steps_are_told_apart_by_their_events(traced: Path) -> None:
    with Visits(traced, step_mark) as visits:
        part("loop").run(3, part("screen").Screen())
    assert [stretch.name for stretch in visits.stretches] == ["begin", "step", "step", "step"]
    # bar.py runs inside of the tracker alone.
    assert visits.between("step", "step") == {
        "late.py", "more.py", "pool.py", "extra.py", "searcher.py", "asks.py",
    }  # fmt: skip


def test_a_mark_that_never_came_is_refused(traced: Path) -> None:
    with Visits(traced, search_mark) as visits:
        part("asks").one()
    assert visits.stretches[0].files == {"asks.py"}
    with pytest.raises(LookupError, match="from a mark 'asked' to a mark 'told'"):
        visits.between("asked", "told")


# --------------------------------------------------------------------------------------- the table


def test_the_table_has_before_now_and_goal(capsys: pytest.CaptureFixture[str]) -> None:
    figures = [
        structure.Figure("modules", 1200, 175),
        structure.Figure("documented, %", 98.04, 98, at_least=True, digits=1),
        structure.Figure("median", 6),
    ]
    structure.print_table(figures, {"modules": 1300})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["modules", "1,300", "1,200", "<=", "175", "missed"],
        ["documented,", "%", "98.0", ">=", "98.0", "reached"],
        ["median", "6"],
    ]
