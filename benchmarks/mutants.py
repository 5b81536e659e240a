"""Small changes of the code that no test should survive: how many are noticed.

    python -m benchmarks.mutants [--each 10] [--seed 0] [--parts core/merging/ ...] [--workers 1]
                                 [--seconds T] [--out build/mutants.json]

For each part of the package in `PARTS` so many changes are drawn: a comparison, an operator, a
constant, a condition or a refusal, one at a time, in the body of a function. Each is put into the
functions of a forked child that has imported everything, and those of the part's own tests that
call the function run there, the quickest first, until one fails. Which these are is seen in a run
of the unchanged code; tests that fail there are left out. What no test notices is listed, to be
looked at: some changes change nothing that can be seen. What is done is kept in the file: the same
command goes on. What is under way when the time is spent does not count.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import gc
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Final

import pytest

import merge_rl

PACKAGE: Final = Path(merge_rl.__file__).parent
ROOT: Final = PACKAGE.parent
_READERS: Final = [
    "tests/storage/files/test_npz.py", "tests/storage/files/test_image_source.py",
    "tests/storage/files/test_images.py", "tests/storage/files/test_safetensors_file.py",
    "tests/storage/files/test_safetensors_pieces.py", "tests/test_untrusted_bounds.py",
    "tests/test_untrusted.py", "tests/test_pointers.py", "tests/test_properties.py",
]  # fmt: skip
PARTS: Final = {
    "core/distances/": ["tests/core/distances", "tests/test_properties.py"],
    "core/sampling/": ["tests/core/sampling"],
    "core/merging/": ["tests/core/merging", "tests/test_properties.py"],
    "storage/files/npz.py": _READERS,
    "storage/files/archives.py": ["tests/storage/files/test_archives.py"],
    "storage/files/documents.py": ["tests/storage/files/test_documents.py"],
    "storage/files/image": [
        "tests/storage/files/test_images.py", "tests/storage/files/test_image_source.py",
        "tests/storage/files/test_pictures.py",
    ],
    "storage/files/safetensors_": _READERS,
    "storage/files/shards.py": ["tests/storage/files/test_shards.py"],
    "storage/runs/run_dir.py": ["tests/storage/runs"],
    "workflows/reference/f": [
        "tests/workflows/reference/test_features.py", "tests/workflows/reference/test_file.py",
        "tests/workflows/reference/test_formats.py",
    ],
    "workflows/export/recipe.py": [
        "tests/workflows/export/test_recipe.py", "tests/workflows/export/test_merged_model.py",
    ],
    "config/mapping.py": ["tests/config", "tests/workflows/optimize/test_by_name.py"],
    "config/numbers.py": ["tests/config"],
    "untrusted.py": ["tests/test_untrusted.py", "tests/test_untrusted_bounds.py"],
    "storage/pickles/": ["tests/storage/pickles"],
    "storage/convert/": ["tests/storage/convert"],
    "storage/checkpoints/": ["tests/storage/checkpoints"],
    "core/forms.py": ["tests/core/test_forms.py"],
    "core/network.py": ["tests/core/test_network.py"],
    "core/policy.py": ["tests/core/test_policy.py"],
    "core/state_dicts.py": ["tests/core/test_state_dicts.py"],
    "core/step_policy.py": [
        "tests/core/test_step_policy.py", "tests/core/test_training_losses.py",
        "tests/workflows/finetune/test_still_steps.py",
    ],
}  # fmt: skip
SECONDS: Final = 120  # of processor time, for the tests of one change
SWAPPED: Final[dict[type[ast.AST], type[ast.AST]]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
UNCHANGED: Final = "nothing"
_CACHE: Final = type(functools.cache(len))
FORKED: Final = multiprocessing.get_context("fork")
Function = ast.FunctionDef


def bodies(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Functions of a module and of its classes, by qualified name."""
    for node in tree.body:
        if isinstance(node, Function):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, Function):
                    yield f"{node.name}.{inner.name}", inner


def places(function: Function) -> list[ast.AST]:
    """What can be changed in its body, in a fixed order; no words, types or nested defaults."""
    found, waiting = [], list[ast.AST](function.body[::-1])
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.JoinedStr, ast.arguments, ast.Assert)):
            continue
        if changed(copy.deepcopy(node)):
            found.append(node)
        if isinstance(node, ast.AnnAssign):
            waiting += [node.value] if node.value else []
        else:
            waiting += list(ast.iter_child_nodes(node))[::-1]
    return found


def changed(node: Any) -> str:
    """Change a node in place; what was done, "" if nothing can be."""
    before = ast.unparse(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        node.ops[0] = SWAPPED[type(node.ops[0])]()  # type: ignore[call-overload]
    elif isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)) and type(node.op) in SWAPPED:
        node.op = SWAPPED[type(node.op)]()  # type: ignore[assignment]
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        node.value = not node.value
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        number: Any = node.value
        node.value = number + 1 if isinstance(number, int) else 2 * number or 1.0
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        before = ast.unparse(node.test)
        node.test = ast.UnaryOp(ast.Not(), node.test)
        return f"not ({before})"
    elif isinstance(node, ast.Raise):
        node.exc, node.cause = None, None
        node.__class__ = ast.Pass  # type: ignore[assignment]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        node.op = ast.UAdd() if isinstance(node.op, ast.USub) else ast.Not()
        if isinstance(node.op, ast.Not):
            node.operand = ast.UnaryOp(ast.Not(), node.operand)
    else:
        return ""
    return f"{before} -> {ast.unparse(node)}"


def candidates(part: str) -> list[tuple[str, str, int]]:
    """(file, function, number of its place) of all changes of a part."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        if name.startswith(part):
            for function, node in bodies(ast.parse(file.read_text(encoding="utf-8"))):
                found += [(name, function, i) for i in range(len(places(node)))]
    return found


def mutant(file: str, function: str, number: int) -> tuple[CodeType, str]:
    """The function's code after the change, and a line about it."""
    path = PACKAGE / file
    tree = ast.parse(path.read_text(encoding="utf-8"))
    node = places(dict(bodies(tree))[function])[number]
    line = getattr(node, "lineno", 0)
    told = changed(node) if number >= 0 else UNCHANGED
    code = compile(ast.fix_missing_locations(tree), str(path), "exec")
    for part in function.split("."):
        # The last of a name: signatures of other types (`overload`) stand before it.
        code = [c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == part][-1]
    return code, f"{file}:{line}: {' '.join(told.split())[:200]}"


def put(code: CodeType, file: str, function: str) -> int:
    """Give the code to every function of that name which there is; how many there are.

    What was made within one of them before, such as a closure in a table, gets its part of it.
    """
    name, count = str(PACKAGE / file), 0
    changed = dict[int, CodeType]()
    for found in _objects():
        if type(found) is FunctionType:  # what is lazy would import itself if asked
            own = found.__code__
            if (own.co_filename, found.__qualname__) == (name, function) and (
                own.co_firstlineno == code.co_firstlineno
            ):
                changed |= {id(before): after for before, after in _nested(own, code)}
                found.__code__, count = code, count + 1
    for found in _objects():
        if type(found) is FunctionType and id(found.__code__) in changed:
            found.__code__ = changed[id(found.__code__)]
    forget()
    return count


def _nested(before: CodeType, after: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    """What is defined within a function, and what becomes of it."""
    inner = ([c for c in code.co_consts if isinstance(c, CodeType)] for code in (before, after))
    for old, new in zip(*inner, strict=True):
        yield old, new
        yield from _nested(old, new)


def forget() -> None:
    """Empty what functions of the package have kept of their results."""
    for found in _objects():
        if type(found) is _CACHE and found.__module__.startswith(PACKAGE.name):
            found.cache_clear()


def _objects() -> list[Any]:
    gc.unfreeze()  # what tests that were collected without a search for garbage have put aside
    return gc.get_objects()


class Watch:
    """A plugin: how long each test takes, whether it passes, and which functions it calls.

    What a fixture calls counts for all tests of its file.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()
        self.calls: dict[str, set[str]] = {}
        self._now = set[str]()

    def _see(self, frame: Any, event: str, _argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            self._now.add(_key(code.co_filename, code.co_qualname))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._now = self.calls.setdefault(item.nodeid, set())
        forget()  # what is kept calls nothing
        began = time.monotonic()
        sys.setprofile(self._see)
        threading.setprofile(self._see)
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            self.seconds[item.nodeid] = time.monotonic() - began

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, request: pytest.FixtureRequest) -> Iterator[None]:
        before, shared = self._now, request.scope != "function"
        if shared:
            self._now = self.calls.setdefault(request.node.nodeid.split("::")[0], set())
        try:
            return (yield)
        finally:
            self._now = before

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    def chosen(self, function: str) -> list[str]:
        """The tests that pass and call a function, the quickest first; all if none is seen to."""
        passing = [name for name in self.seconds if name not in self.failed]
        calling = [
            name for name in passing
            if function in self.calls[name] | self.calls.get(name.split("::")[0], set())
        ]  # fmt: skip
        return sorted(calling or passing, key=lambda name: self.seconds[name])


@functools.cache
def _key(file: str, function: str) -> str:
    return f"{Path(file).relative_to(PACKAGE).as_posix()}:{function.split('.<locals>')[0]}"


class Chosen:
    """A plugin: only these tests, in this order."""

    def __init__(self, names: list[str]) -> None:
        self._order = {name: place for place, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self._order]
        items.sort(key=lambda item: self._order[item.nodeid])


def tested(tests: list[str], *plugins: object) -> int:
    """Run tests in this process, silently, in a folder of its own."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    with tempfile.TemporaryDirectory() as place:
        quiet = ["-x"] if any(isinstance(plugin, Chosen) for plugin in plugins) else []
        options = [*quiet, "-q", "-p", "no:cacheprovider", f"--basetemp={place}/tests"]
        return int(pytest.main([*tests, *options], plugins=list(plugins)))


def watched(tests: tuple[str, ...]) -> Watch:
    """What tests of the unchanged code do; in a process that ends with it."""
    watch = Watch()
    tested(list(tests), watch)
    return watch


def outcome(tests: list[str], names: list[str], change: tuple[CodeType, str, str]) -> str:
    """What the tests say in a child: "killed", "survived" or "hangs"."""
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            os.setsid()
            spent = int(sum(os.times()[:2]))
            resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, resource.RLIM_INFINITY))
            signal.alarm(3 * SECONDS)
            code = tested(tests, Chosen(names)) if put(*change) else 8
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what its tests have left
    if os.WIFSIGNALED(status):
        return "hangs" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM) else "killed"
    return {0: "survived", 8: "not found"}.get(os.WEXITSTATUS(status), "killed")


def drawn(parts: list[str], each: int, seed: int) -> list[tuple[str, int, str, str, int]]:
    """(part, its changes, file, function, place) of what is drawn, of each part in turns.

    The first of each part changes nothing: what its tests say of that, they say of themselves.
    """
    found = []
    for part in parts:
        everything = candidates(part)
        draw = random.Random(f"{seed} {part}")
        chosen = draw.sample(everything, min(each, len(everything)))
        found += [(turn, part, len(everything), *c) for turn, c in enumerate(chosen)]
        found += [(-1, part, len(everything), *chosen[0][:2], -1)]
    return [row[1:] for row in sorted(found)]


def tried(job: tuple[str, int, str, str, int], watches: dict[str, Watch]) -> dict[str, Any]:
    """A change, and whether it was noticed."""
    part, total, file, function, number = job
    code, told = mutant(file, function, number)
    names = watches[part].chosen(f"{file}:{function}")
    files = list(dict.fromkeys(name.split("::")[0] for name in names))
    began = time.monotonic()
    row = {"part": part, "of": total, "change": told, "tests": len(names)}
    row["outcome"] = outcome(files, names, (code, file, function))
    return {**row, "seconds": round(time.monotonic() - began, 1)}


def in_turns(jobs: list[Any], workers: int, end: float, work: Any) -> Iterator[tuple[Any, Any]]:
    """(job, result) of jobs in forked processes, so many at a time, until the time is spent."""
    waiting, going = jobs[::-1], dict[Any, tuple[Any, Any]]()
    while (waiting or going) and time.monotonic() < end:
        while waiting and len(going) < workers:
            receiving, sending = multiprocessing.Pipe(duplex=False)
            job = waiting.pop()
            process = FORKED.Process(target=_send, args=(sending, work, job))
            process.start()
            sending.close()
            going[receiving] = process, job
        ready: Any
        for ready in wait(list(going), max(0.0, end - time.monotonic())):
            process, job = going.pop(ready)
            with suppress(EOFError):
                yield job, ready.recv()
            process.join()
    for process, _ in going.values():
        process.kill()


def _send(sending: Any, work: Any, job: Any) -> None:
    sending.send(work(job))


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutation testing.")
    parser.add_argument("--each", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="*", default=list(PARTS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e6)
    parser.add_argument("--out", type=Path, default=Path("build/mutants.json"))
    arguments = parser.parse_args()
    began = time.monotonic()
    half, end = began + arguments.seconds / 2, began + arguments.seconds
    out: Path = arguments.out.resolve()
    os.chdir(ROOT)
    done: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"seed {arguments.seed}, {arguments.each} of each part", flush=True)
    pytest.main(["tests/core", "tests/storage", "--collect-only", "-qq"])  # imports all
    suites = list(dict.fromkeys(tuple(PARTS[part]) for part in arguments.parts))
    seen = dict(in_turns(suites, arguments.workers, half, watched))
    watches = {part: seen[tuple(PARTS[part])] for part in arguments.parts
               if tuple(PARTS[part]) in seen}  # fmt: skip
    failed = sorted(set().union(*(watch.failed for watch in watches.values())))
    done |= {"seed": arguments.seed, "left out": failed}
    print(f"left out, as they fail on the unchanged code: {failed}", flush=True)
    jobs = [job for job in drawn(list(watches), arguments.each, arguments.seed)
            if _name(job) not in done]  # fmt: skip
    for job, row in in_turns(
        jobs, arguments.workers, end, functools.partial(tried, watches=watches)
    ):
        done[_name(job)] = row
        out.write_text(json.dumps(done, indent=1) + "\n")
    show(done)


def _name(job: tuple[Any, ...]) -> str:
    return ":".join(map(str, job[2:]))


def show(done: dict[str, Any]) -> None:
    """The table by part, then what survived."""
    known = [row for row in done.values() if isinstance(row, dict)]
    rows = [row for row in known if not row["change"].endswith(UNCHANGED)]
    for row in known:
        if row not in rows and row["outcome"] != "survived":
            print(f"with nothing changed, {row['part']}: {row['outcome']}")
    print(f"{'part':30} {'changes':>8} {'drawn':>6} {'noticed':>8}")
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        noticed = sum(row["outcome"] in ("killed", "hangs") for row in own)
        print(f"{part:30} {own[0]['of']:>8} {len(own):>6} {noticed:>8}")
    total = sum(row["outcome"] in ("killed", "hangs") for row in rows)
    print(f"{total} of {len(rows)} noticed ({100 * total / max(len(rows), 1):.0f} %)")
    for row in rows:
        if row["outcome"] not in ("killed", "hangs"):
            print(f"  {row['outcome']}: {row['change']}")


if __name__ == "__main__":
    main()
