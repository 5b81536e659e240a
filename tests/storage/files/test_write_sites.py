"""Every place that writes is known, and a disk that is full there leaves nothing half-written."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
import torch

import merge_rl as mrl
from benchmarks.campaign_disk import FullDisk
from merge_rl.config import FinetuneConfig, OptimizeConfig
from merge_rl.errors import MergeRLError
from merge_rl.storage.checkpoints.merging import keep_states
from merge_rl.storage.convert import convert
from merge_rl.storage.files import WeightStream, locked_output, new_folder, write_json, write_png
from merge_rl.storage.files.atomic import WorkFolder, save_tensors, write_state, write_yaml
from merge_rl.storage.files.shards import write_weights
from merge_rl.storage.runs import FinetuneRun, RunDir
from tests.finetuning import sit_weights

SITES: Final = {
    # What `disks` of the campaign and the writers below run into.
    "demo:_copy", "demo:_write", "storage/checkpoints/merging:keep_states",
    "storage/convert/run:write_stream", "storage/files/atomic:atomic_path",
    "storage/files/atomic:new_folder", "storage/files/atomic:save_tensors",
    "storage/files/atomic:write", "storage/files/atomic:write_text", "storage/files/images:_write",
    "storage/files/locks:_acquire", "storage/files/locks:_open", "storage/files/shards:tensor_file",
    "storage/hub/download:_append", "storage/hub/download:begin", "storage/hub/download:fetch_url",
    "storage/hub/download:finish", "storage/hub/fetch:_download", "storage/runs/run_dir:create",
    "storage/runs/run_dir:append_event", "workflows/finetune/snapshots:_beside",
    "workflows/report/figures:drawing",
    # A folder in a work folder, a file in a folder made for it, folders that go by themselves, and
    # what swallows all.
    "cli/main:_write_anything",
    "workflows/optimize/function:_keep_statistics", "storage/runs/trackers:__init__",
    "storage/hub/fetch_sources:_hub_manifest", "workflows/export/publish:publishable",
    "workflows/plan/calibration:time_write", "workflows/export/folder:_write_papers",
    "workflows/export/folder:save_merge",
    "workflows/export/merged_model:push_to_hub",
}  # fmt: skip
ALWAYS: Final = {
    "write_bytes", "mkdir", "makedirs", "rename", "symlink_to", "hardlink_to", "touch", "copyfile",
    "copytree", "move", "savez", "mkstemp", "mkdtemp", "TemporaryDirectory", "NamedTemporaryFile",
    "SummaryWriter",
}  # fmt: skip


def writes(call: ast.Call) -> bool:
    """Whether a call takes room on a disk by its own means, not by those of another function."""
    own = call.func
    name = own.attr if isinstance(own, ast.Attribute) else getattr(own, "id", "")
    if name in ALWAYS:
        return True
    if name not in ("open", "fdopen", "replace", "save", "savefig", "write_text"):
        return False
    text, method = ast.unparse(call), isinstance(own, ast.Attribute)
    modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    opened = name in ("open", "fdopen") and (
        "O_CREAT" in text or any(len(mode) < 4 and set(mode) & set("wax+") for mode in modes)
    )
    # Of two words one is text's; of a picture's the second, without a name, lies in memory.
    moved = method and name == "replace" and len(call.args) == 1 and "dataclasses" not in text
    drawn = name in ("save", "savefig") and "temporary" in text
    return opened or moved or drawn or (method and name == "write_text")


def functions(package: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    for file in package.rglob("*.py"):
        module = file.relative_to(package).with_suffix("").as_posix()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield f"{module}:{node.name}", node


def test_every_place_that_writes_is_known() -> None:
    package = Path(mrl.__file__).parent
    found = {
        name
        for name, node in functions(package)
        if any(isinstance(call, ast.Call) and writes(call) for call in ast.walk(node))
    }
    assert found == SITES


# ------------------------------------------------------------------------------- a full disk

TENSORS: Final = {"a": torch.ones(3, 2), "b": torch.zeros(2)}


def in_new_folder(place: Path) -> None:
    with new_folder(place / "out") as folder:
        write_yaml(folder / "a.yaml", {"a": 1})
        save_tensors(folder / "a.safetensors", TENSORS)


def in_locked_folder(place: Path) -> None:
    with locked_output(place / "out"):
        write_json(place / "out/a.json", [1])


def a_search(place: Path) -> None:
    run = RunDir.create(place / "out", OptimizeConfig(checkpoints="x"), {"hashes": {}})
    for number in range(2):
        run.append_event({"kind": "round", "round": number})
        run.save_state(TENSORS, {"round_index": number})


def a_conversion(place: Path) -> None:
    source = place.parent / "sit.pt"
    torch.save({"ema": sit_weights()}, source)  # by means that FullDisk leaves alone
    convert(source, place / "out", num_heads=2)


def fine_tuning(place: Path) -> None:
    run = FinetuneRun.create(place / "out", FinetuneConfig(model="x"), {"hashes": {}})
    for step in range(3):
        run.save_state(step, TENSORS, {"step": step}, keep=1)


WRITERS: Final[dict[str, Callable[[Path], object]]] = {
    "document": lambda place: write_json(place / "out/a.json", {"a": 1}),
    "tensors": lambda place: save_tensors(place / "out/a.safetensors", TENSORS),
    "state": lambda place: write_state(place / "out/state.safetensors", TENSORS, {"a": 1}),
    "shards": lambda place: write_weights(
        place / "out", WeightStream.of(TENSORS), {}, max_shard_bytes=16
    ),
    "picture": lambda place: write_png(
        place / "out/a.png", torch.zeros(1, 4, 4, dtype=torch.uint8)
    ),
    "folder": in_new_folder,
    "locked folder": in_locked_folder,
    "unfinished work": lambda place: WorkFolder(place / "out", {"a": 1}).write("a", TENSORS, {}),
    "kept states": lambda place: keep_states(place / "out", {"a": TENSORS, "b": TENSORS}),
    "conversion": a_conversion,
    "search": a_search,
    "fine-tuning": fine_tuning,
}


def fill(write: Callable[[Path], object], places: Path) -> list[str]:
    """What writing into each of the folders "whole", "0", "1" ... says, whose disk is full never,
    at once, after one write ...; "" for what is written whole, with which the numbers end.
    """
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        said: list[str] = []
        os.fsync = lambda fd: None
        try:
            disk = FullDisk(None)
            disk.install()
            for place in ("whole", *map(str, range(200))):
                disk.first, disk.count = None if place == "whole" else int(place), 0
                said.append(refusal(write, places / place))
                if said[1:] and not said[-1]:
                    break
        finally:
            FullDisk.real_write(sending, json.dumps(said).encode())
            os._exit(0)
    os.close(sending)
    with os.fdopen(receiving) as file:
        found: list[str] = json.load(file)
    os.waitpid(pid, 0)
    return found


def refusal(write: Callable[[Path], object], place: Path) -> str:
    try:
        write(place)
    except MergeRLError as error:
        return f"refused: {error}"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return ""


def contents(place: Path) -> dict[str, bytes]:
    files = (file for file in place.rglob("*") if file.is_file())
    return {str(file.relative_to(place)): file.read_bytes() for file in files}


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_full_at_any_write_leaves_whole_files(name: str, tmp_path: Path) -> None:
    whole, *full = fill(WRITERS[name], tmp_path)
    assert whole == full[-1] == ""
    assert len(full) > 2  # there were writes to refuse
    expected = contents(tmp_path / "whole")
    assert expected
    assert contents(tmp_path / str(len(full) - 1)).keys() == expected.keys()
    for first, said in enumerate(full[:-1]):
        place = tmp_path / str(first)
        # The sentence names what was to be written, by the name that it was to have.
        assert "No space left on device" in said
        assert f"{place}/out" in said or str(place) in said
        assert ".tmp-" not in said
        left = contents(place)
        assert not [file for file in left if ".tmp-" in file or file.endswith(".lock")]
        growing = ("events.jsonl", "state.safetensors")  # which a run replaces as it goes on
        for file, data in left.items():
            assert data == expected.get(file, data) or Path(file).name in growing
