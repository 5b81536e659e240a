"""Small changes of the code that no test should survive: how many are noticed.

    python -m benchmarks.mutants [--each 10] [--seed 0] [--parts core/merging/ ...]
                                 [--out build/mutants.json]

For each part of the package in `PARTS` so many changes are drawn: a comparison, an operator, a
constant, a condition or a refusal, one at a time, in the body of a function. Each is put into the
functions of a forked child that has imported everything, and that part's own tests run there until
one fails. What no test notices is listed, to be looked at: some changes change nothing that can be
seen. What is done is kept in the file: the same command goes on.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Final

import pytest

import merge_rl

PACKAGE: Final = Path(merge_rl.__file__).parent
ROOT: Final = PACKAGE.parent
PARTS: Final = {
    "untrusted.py": ["tests/test_untrusted.py", "tests/test_pointers.py"],
    "storage/files/npz.py": ["tests/storage/files/test_npz.py"],
    "storage/files/archives.py": ["tests/storage/files/test_npz.py",
                                  "tests/storage/files/test_image_source.py",
                                  "tests/storage/pickles"],
    "storage/files/safetensors_": ["tests/storage/files/test_safetensors_file.py",
                                   "tests/test_properties.py"],
    "storage/pickles/": ["tests/storage/pickles"],
    "core/distances/": ["tests/core/distances", "tests/test_properties.py"],
    "core/merging/": ["tests/core/merging", "tests/test_properties.py"],
    "core/sampling/": ["tests/core/sampling"],
    "core/forms.py": ["tests/core/test_forms.py"],
    "core/state_dicts.py": ["tests/core/test_state_dicts.py"],
}  # fmt: skip
SECONDS: Final = 120  # of processor time, for the tests of one change
SWAPPED: Final[dict[type[ast.AST], type[ast.AST]]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
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
    told = changed(node)
    code = compile(ast.fix_missing_locations(tree), str(path), "exec")
    for part in function.split("."):
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == part)
    return code, f"{file}:{line}: {' '.join(told.split())[:200]}"


def put(code: CodeType, file: str, function: str) -> int:
    """Give the code to every function of that name which there is; how many there are."""
    name, count = str(PACKAGE / file), 0
    for found in gc.get_objects():
        if isinstance(found, FunctionType):
            own = found.__code__
            if (own.co_filename, found.__qualname__) == (name, function) and (
                own.co_firstlineno == code.co_firstlineno
            ):
                found.__code__, count = code, count + 1
    return count


def outcome(tests: list[str], change: tuple[CodeType, str, str] | None) -> str:
    """What the tests say in a child: "killed", "survived" or "hangs"."""
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            spent = int(sum(os.times()[:2]))
            resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, resource.RLIM_INFINITY))
            signal.alarm(10 * SECONDS)
            if change is not None and not put(*change):
                os._exit(8)
            code = int(pytest.main([*tests, "-x", "-q", "-n0", "-p", "no:cacheprovider"]))
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return "hangs" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM) else "killed"
    return {0: "survived", 8: "not found"}.get(os.WEXITSTATUS(status), "killed")


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutation testing.")
    parser.add_argument("--each", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="*", default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("build/mutants.json"))
    arguments = parser.parse_args()
    os.chdir(ROOT)
    out = arguments.out
    done: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    pytest.main(["tests/core", "tests/storage", "--collect-only", "-qq", "-n0"])  # imports all
    for part in arguments.parts:
        everything = candidates(part)
        draw = random.Random(f"{arguments.seed} {part}")
        drawn = draw.sample(everything, min(arguments.each, len(everything)))
        if f"{part} unchanged" not in done:
            done[f"{part} unchanged"] = outcome(PARTS[part], None)
        for file, function, number in drawn:
            key = f"{file}:{function}:{number}"
            if key not in done:
                code, told = mutant(file, function, number)
                began = time.monotonic()
                done[key] = {"part": part, "of": len(everything), "change": told,
                             "outcome": outcome(PARTS[part], (code, file, function)),
                             "seconds": round(time.monotonic() - began, 1)}  # fmt: skip
                out.write_text(json.dumps(done, indent=1) + "\n")
    show(done)


def show(done: dict[str, Any]) -> None:
    """The table by part, then what survived."""
    rows = [row for row in done.values() if isinstance(row, dict)]
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
    odd = [key for key, value in done.items() if isinstance(value, str) and value != "survived"]
    print(f"unchanged, tests fail: {odd}" if odd else "unchanged, all tests pass", file=sys.stdout)


if __name__ == "__main__":
    main()
