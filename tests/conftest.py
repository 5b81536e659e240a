"""What pytest is told of all tests; their fixtures are in `tests/fixtures.py`."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
from collections.abc import Generator
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest

from merge_rl.errors import MissingLibraryError

# Tests run in several processes: more threads than cores would only make them wait. Libraries look
# at this when they are imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where a test has more, those that wait for work leave the processor to the other workers.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
pytest.register_assert_rewrite("tests.fixtures")


SHARED_MEMORY = Path("/dev/shm")
ROOM = 4 * 2**30
"""Bytes that are to be free where tests write: more than all that they ever hold at once."""


def pytest_configure(config: pytest.Config) -> None:
    # Files of tests live for a moment: a disk makes each that takes another's place be written.
    memory = os.access(SHARED_MEMORY, os.W_OK) and shutil.disk_usage(SHARED_MEMORY).free >= ROOM
    if memory and "TMPDIR" not in os.environ:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(SHARED_MEMORY))
    # A process that hands tests out to workers, and runs none, is spared the seconds of torch.
    if config.getoption("dist", "no") == "no" or hasattr(config, "workerinput"):
        config.pluginmanager.import_plugin("tests.fixtures")


NUMERIC = ("core", "features", "models", "searchers")
"""Folders of tests that compare bits or tolerances; elsewhere they bear the marker themselves."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folders = [Path(__file__).parent / name for name in NUMERIC]
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise pytest.UsageError(f"no such folder of tests: {', '.join(missing)}")
    numeric = {path for path in {item.path for item in items} if {*folders} & {*path.parents}}
    for item in items:
        if item.path in numeric:
            item.add_marker("numerics")


def _import_own_share(config: pytest.Config) -> None:
    """Files of tests that this worker imports first, and others do not.

    Every worker imports all files in one order. So each would rewrite the assertions of all of
    them, where nobody has done so before, instead of finding what the others have rewritten.
    """
    worker = getattr(config, "workerinput", None)
    if worker is None or config.args_source is not config.ArgsSource.TESTPATHS:
        return
    files = sorted(Path(__file__).parent.rglob("test_*.py"))
    for file in files[int(worker["workerid"].removeprefix("gw")) :: worker["workercount"]]:
        with suppress(pytest.skip.Exception):
            import_module(".".join(file.relative_to(config.rootpath).with_suffix("").parts))


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    # What is collected stays: looking for garbage in it takes a fifth of the time, and later on.
    # What tests leave lying about is looked for less often than usual: it is little.
    gc.disable()
    try:
        _import_own_share(session.config)
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000, 20, 50)
        gc.enable()


def _skipping_without_library() -> Generator[None, object, object]:
    """A test of an extra that is not installed is skipped, wherever it is that this is noticed."""
    try:
        return (yield)
    except MissingLibraryError as error:
        if importlib.util.find_spec(error.library) is not None:
            raise
        pytest.skip(str(error))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    return (yield from _skipping_without_library())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    return (yield from _skipping_without_library())
