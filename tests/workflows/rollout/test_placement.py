"""Where checkpoints lie: the first place with room, and what the system says is free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import merge_rl as mrl
from merge_rl.errors import ConfigError
from merge_rl.workflows.rollout import device as placement
from merge_rl.workflows.rollout.device import choose_place, free_memory

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize(
    ("needed", "device", "free_device", "free_memory", "expected"),
    [
        (60, "cuda:0", 100, 1000, "cuda:0"),
        (61, "cuda:0", 100, 1000, "cpu"),
        (600, "cuda:0", 100, 1000, "cpu"),
        (601, "cuda:0", 100, 1000, "disk"),
        (600, "cpu", None, 1000, "cpu"),
        (601, "cpu", None, 1000, "disk"),
        (1, "mps", None, 1000, "cpu"),
    ],
)
def test_the_first_place_with_room(
    needed: int, device: str, free_device: int | None, free_memory: int, expected: str
) -> None:
    found = choose_place(needed, device, free_device=free_device, free_memory=free_memory)
    assert found == expected


def test_what_is_asked_for_is_taken() -> None:
    for given in ("cpu", "disk", "cuda:1"):
        found = choose_place(10**15, "cuda:1", free_device=1, free_memory=1, given=given)
        assert found == given
    with pytest.raises(ConfigError, match="expected weights_device cpu, cpu or disk, got 'tape'"):
        choose_place(1, "cpu", free_device=None, free_memory=1, given="tape")


def test_memory_as_the_system_tells(tmp_path: Path) -> None:
    proc, group = tmp_path / "meminfo", tmp_path / "group"
    proc.write_text("MemTotal:  100 kB\nMemFree:  1 kB\nMemAvailable:  40 kB\n")
    assert free_memory(proc, group) == 40 * 1024
    group.mkdir()
    (group / "memory.current").write_text("30000\n")
    (group / "memory.stat").write_text("anon 10000\ninactive_file 5000\n")
    (group / "memory.max").write_text("max\n")
    assert free_memory(proc, group) == 40 * 1024
    # 35000 granted, 30000 used, of which 5000 can be given back.
    (group / "memory.max").write_text("35000\n")
    assert free_memory(proc, group) == 10000
    (group / "memory.max").write_text("20000\n")
    assert free_memory(proc, group) == 0
    # Neither is told: something positive all the same.
    assert free_memory(tmp_path / "none", tmp_path / "none") > 10**6


def test_a_run_is_the_same_wherever_its_checkpoints_lie(
    shared_tiny: Path, tiny_config: Any, outcome: Any, tmp_path: Path, monkeypatch: Any,
    no_network: None,
) -> None:  # fmt: skip
    kept = {}
    for place in (None, "disk"):
        out = tmp_path / str(place)
        config = tiny_config(shared_tiny, weights_device=place)
        mrl.optimize(shared_tiny, out=out, config=config)
        found = outcome(out)
        found.pop("merged/merge.yaml")  # holds the settings, this one too
        kept[place] = found
    assert kept[None] == kept["disk"]
    # Without memory to spare a run maps the files by itself.
    monkeypatch.setattr(placement, "free_memory", lambda: 1)
    seen: list[int] = []
    original = mrl.CheckpointSet.mapped

    def watched(self: mrl.CheckpointSet, index: int) -> Any:
        seen.append(index)
        return original(self, index)

    monkeypatch.setattr(mrl.CheckpointSet, "mapped", watched)
    mrl.optimize(shared_tiny, out=tmp_path / "full", config=tiny_config(shared_tiny))
    assert seen == [0, 1, 2, 3]
