"""The benchmark that fills the table of a GPU: each figure apart, cut runs still tell."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import TASKS, Task, chosen, run


@dataclass(frozen=True)
class Script(Task):
    """A task that is a line of Python; OUT stands for where the document goes."""

    def command(self, device: str, tiny: bool, out: Path) -> list[str]:
        return [sys.executable, "-c", self.arguments.replace("OUT", repr(str(out)))]


WRITES = 'print(\'made\'); open(OUT, \'w\').write(\'{"rows": [["speed", "3", "7"]]}\')'
SOUND = Script("sound", "", WRITES, "")
BROKEN = Script("broken", "", "print('1 of 2'); raise SystemExit('no such card')", "")
SLOW = Script("slow", "", "print('1 of 2', flush=True); import time; time.sleep(60)", "", limit=1)


def test_a_figure_is_what_its_process_writes() -> None:
    found = run(SOUND, "cpu", False, 60)
    assert found["rows"] == [["speed", "3", "7"]]
    assert found["printed"] == "made\n"
    assert "failed" not in found


def test_what_ends_badly_or_late_says_how_far_it_came() -> None:
    broken, slow = run(BROKEN, "cpu", False, 60), run(SLOW, "cpu", False, 1)
    assert broken["failed"] == "exit code 1: no such card"
    assert slow["failed"] == "more than 1 s: 1 of 2"
    assert broken["rows"] == slow["rows"] == []


def test_the_table_goes_on_after_a_figure_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_a_gpu = Script("card", "", "1 / 0")
    monkeypatch.setattr(gpu, "TASKS", (BROKEN, needs_a_gpu, SOUND))
    gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    assert "| broken | - | not measured: exit code 1: no such card |" in printed
    assert printed[-1] == "| speed | 3 | 7 |"
    figures = json.loads((tmp_path / "gpu.json").read_text())["figures"]
    assert list(figures) == ["broken", "sound"]
    assert figures["sound"]["document"]["rows"] == [["speed", "3", "7"]]
    gpu.main(["--device", "cpu", "--out", str(tmp_path), "--seconds-limit", "0"])
    figures = json.loads((tmp_path / "gpu.json").read_text())["figures"]
    assert {made["failed"] for made in figures.values()} == {"no time was left"}


def test_figures_are_chosen_by_name() -> None:
    assert [task.name for task in chosen("vae,rounds")] == ["vae", "rounds"]
    assert chosen("") == list(TASKS)
    with pytest.raises(SystemExit, match="expected figures among rounds, .*, got speed"):
        chosen("rounds,speed")


def test_rows_of_benchmarks() -> None:
    merge = {"dtype": "float16", "seconds": 0.0036, "floor_seconds": 0.0033, "pinned_seconds": 0.2}
    rollout = {"way": "float32", "seconds": 5.0, "share": 0.0014}
    document = {
        "copy_bytes_per_s": 4e12, "merges": [merge], "images": 50, "rollouts": [rollout],
    }  # fmt: skip
    assert [row[2] for row in gpu.merge_rows(document)] == [
        "3.6 ms, floor 3.3 ms, pinned 200.0 ms", "float32 10.0", "float32 0.14%",
    ]  # fmt: skip
    two = {"images_per_s": {"one stream": 100.0, "two streams": 125.0}, "equal": True}
    assert gpu.overlap_rows(two)[0][2] == "100.0 and 125.0 (1.250x), equal features: True"
    scores = [
        {"precision": name, "mean": 1.0 + off, "low": 0.9, "high": 1.1, "change": off}
        for name, off in (("float32", 0.0), ("tf32", 0.002))
    ]
    (row,) = gpu.precision_rows({"rows": {"sit": scores}})
    assert row[2] == "1.0000 [0.9000, 1.1000]; tf32 +0.0020"
    plans = {"rows": [{"planned": 4.0, "measured": 5.0}, {"planned": 4.5, "measured": 5.2}]}
    assert gpu.plan_rows(plans)[0][1:] == ["2", "4.0 and 5.0; 4.5 and 5.2"]
    peaks = {"memory": {"peaks": {"5": 2**30, "50": 2**30}}}
    assert gpu.training_rows(peaks)[0][2] == "5 steps 1,024 MiB, 50 steps 1,024 MiB"
