"""The run directory: what is there after a crash at any point, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import torch

from merge_rl.config.optimize import OptimizeConfig, RewardConfig, SearchConfig
from merge_rl.errors import ConfigError, RunError
from merge_rl.storage.files.atomic import save_tensors
from merge_rl.storage.runs.lifecycle import require_same_inputs
from merge_rl.storage.runs.run_dir import FinetuneRun, RunDir

CONFIG = OptimizeConfig(
    checkpoints="/data/ckpts", budget=777, seed=3, reward=RewardConfig(pool_size=50, subset_size=7),
    search=SearchConfig(betas=(0.25, 0.75)),
)  # fmt: skip
INPUTS = {"hashes": {"reference": "abc", "checkpoints": {"a": "1f"}}}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "runs/a", CONFIG, INPUTS)


def test_settings_that_cannot_be_recorded_leave_no_folder(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, checkpoints=os.fsdecode(b"/data/\xff"))
    with pytest.raises(ConfigError, match="/data/.: cannot be recorded, .* so rename it"):
        RunDir.create(tmp_path / "a", config, INPUTS)
    assert not (tmp_path / "a").exists()


def test_create_and_open(run: RunDir) -> None:
    opened = RunDir.open(str(run.path))
    assert opened.config() == CONFIG
    assert opened.read("inputs.json") == INPUTS
    assert opened.read("result.json") is None
    assert opened.events() == []
    assert opened.load_state() is None
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "inputs.json"]


def test_a_run_that_says_no_rules_goes_on_by_the_first(run: RunDir) -> None:
    said = f"rules: {run.config().rules}"
    lines = run.config_path.read_text().splitlines()
    assert run.config().rules > 1
    assert said in lines
    run.config_path.write_text("\n".join(line for line in lines if line != said))
    assert run.config().rules == 1


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_existing_path_is_never_written_into(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"a exists already; choose another --out, or resume"):
        RunDir.create(path, CONFIG, INPUTS)
    assert [p.name for p in tmp_path.rglob("*")] == ["a"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match=r"run: cannot be made: (Not a directory|File exists)"):
        RunDir.create(tmp_path / "file/run", CONFIG, INPUTS)


def test_what_is_no_run(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="none: no such run directory"):
        RunDir.open(tmp_path / "none")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="file: expected a run directory, found a file"):
        RunDir.open(tmp_path / "file")
    with pytest.raises(RunError, match="runs: not a run directory, config.yaml is missing"):
        RunDir.open(tmp_path / "runs")
    run.config_path.write_text("checkpoints: x\nbudgt: 5\n")
    with pytest.raises(ConfigError, match="did you mean 'budget'"):
        RunDir.open(run.path).config()


def test_results_round_trip(run: RunDir) -> None:
    result = {"coefficients": [[0.1, -1 / 3, 1e-300]], "name": "größer", "none": None}
    run.write("result.json", result)
    assert run.read("result.json") == result
    run.write("result.json", {"coefficients": []})
    assert run.read("result.json") == {"coefficients": []}
    with pytest.raises(ValueError, match="JSON"):
        run.write("result.json", {"score": math.nan})
    assert run.read("result.json") == {"coefficients": []}  # the old one is still whole


@pytest.mark.parametrize("data", [b'{"a": 1', b"", b"\xff\xfe", b"[1]"])
def test_damaged_results(data: bytes, run: RunDir) -> None:
    (run.path / "result.json").write_bytes(data)
    with pytest.raises(RunError, match=r"result.json: damaged: "):
        run.read("result.json")


NO_NUMBERS: list[object] = [
    *(1, "x", None, [1], {}),
    *({"reference": odd} for odd in ("x", True, [1], math.nan, -math.inf, 10**400)),
]


@pytest.mark.parametrize("entry", NO_NUMBERS)
def test_scores_that_are_no_numbers_are_refused(entry: object, run: RunDir) -> None:
    assert run.scores() == {}
    known = {"start/0": {"reference": 1.5, "heldout": None, "count": 2}}
    run.write("scores.json", known)
    assert run.scores() == known
    (run.path / "scores.json").write_text(json.dumps(known | {"end/0": entry}))
    with pytest.raises(RunError, match=r"scores.json: damaged in 'end/0': expected numbers"):
        run.scores()


def test_scores_have_the_names_of_the_references(run: RunDir) -> None:
    known = {"a/0": {"reference": 1.0, "heldout": None}, "second/a/0": {"reference": 1.0}}
    run.write("scores.json", known | {"failed/a/0": {"count": 3}})
    assert len(run.scores(["reference", "heldout"])) == 3
    run.write("scores.json", known | {"b/0": {"reference": 1.0}})
    with pytest.raises(RunError, match=r"damaged in 'b/0': .*, found a mapping without heldout$"):
        run.scores(["reference", "heldout"])


@pytest.mark.parametrize(
    ("step", "point", "told"),
    [
        *(("3", {"sde": entry}, "in '3/sde': expected numbers by name") for entry in NO_NUMBERS),
        *(("3", point, "expected curves by step, found") for point in NO_NUMBERS[:5]),
        *((step, {"sde": {"a": 1}}, f"expected curves by step, found a mapping at '{step[:20]}")
          for step in ("x", "-1", "1.5", " 1", "01", "\u0661", "9" * 13, "9" * 5000, "")),
    ],
)  # fmt: skip
def test_curves_are_numbers_by_step_and_name(
    step: str, point: object, told: str, tmp_path: Path
) -> None:
    run = FinetuneRun(tmp_path)
    assert run.curves() == {}
    known = {"sde": {"a": 1.5, "b": None}}
    for document, found in (({"0": known, "12": known}, {0: known, 12: known}), ({}, {})):
        run.write("curves.json", document)
        assert run.curves() == found
    (tmp_path / "curves.json").write_text(json.dumps({"0": known, step: point}))
    with pytest.raises(RunError, match=f"curves.json: damaged:? {told}"):
        run.curves()


@pytest.mark.parametrize("recorded", [[1], {"hashes": "x"}, {"hashes": {"reference": 1}}, {}])
def test_inputs_of_another_kind_are_changed_ones(recorded: object, run: RunDir) -> None:
    run.write("inputs.json", recorded)
    with pytest.raises(RunError, match=r"inputs have changed.*: reference|damaged: expected"):
        require_same_inputs(run, {"reference": "ab"})


def events(count: int) -> list[dict[str, object]]:
    return [{"kind": "round", "round": i, "rewards": [-0.1 * i, None]} for i in range(count)]


def test_events_are_appended(run: RunDir) -> None:
    for event in events(3):
        run.append_event(event)
    assert run.events() == RunDir.open(run.path).events() == events(3)
    with pytest.raises(ValueError, match="JSON"):
        run.append_event({"rewards": [math.nan]})
    assert run.events() == events(3)


@pytest.mark.parametrize("cut", [1, 2, 10, 40])
def test_a_last_line_cut_short_is_left_out(cut: int, run: RunDir) -> None:
    for event in events(3):
        run.append_event(event)
    whole = run.events_path.read_bytes()
    run.events_path.write_bytes(whole[:-cut])
    # Without its newline alone the last line is still whole.
    expected = events(3) if cut == 1 else events(2)
    assert run.events() == expected
    # What a resumed run does: drop the rest of the line, then go on.
    run.keep_events_before(2)
    run.append_event({"round": 2, "again": True})
    assert run.events() == [*events(2), {"round": 2, "again": True}]
    lines = run.events_path.read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"round": 1, "text": "\xff"}', "not readable JSON: 'utf-8' codec"),
        (b'{"round": 1, ', "not readable JSON"),
        (b"[1]", "expected a JSON object, found a list of 1"),
        (b'{"round": "1"}', "expected round as a whole number, found the text '1'"),
        (b'{"step": null}', "expected step as a whole number, found nothing"),
    ],
)
def test_a_damaged_line_among_events_is_named(line: bytes, why: str, run: RunDir) -> None:
    for event in events(3):
        run.append_event(event)
    first, _, last = run.events_path.read_bytes().splitlines(keepends=True)
    run.events_path.write_bytes(first + line + b"\n" + last)
    for read in (run.events, lambda: run.keep_events_before(2)):
        with pytest.raises(RunError, match=f"events.jsonl: damaged in line 2: {why}"):
            read()
    # A crash may have cut the last line within a letter.
    run.events_path.write_bytes(first + line)
    assert run.events() == events(1)


@pytest.mark.parametrize("keep", [0, 1, 3, 9])
def test_events_of_a_repeated_round_are_dropped(keep: int, run: RunDir) -> None:
    for event in events(3):
        run.append_event(event)
    run.keep_events_before(keep)
    assert run.events() == events(3)[:keep]


def test_dropping_events_of_a_run_without_any(run: RunDir) -> None:
    run.keep_events_before(0)
    assert run.events() == []


def test_state_round_trip(run: RunDir, generator: torch.Generator) -> None:
    tensors = {
        "pool.features": torch.randn(5, 3, generator=generator),
        "pool.cov": torch.randn(3, 3, generator=generator, dtype=torch.float64),
        "pool.labels": torch.tensor([4, 0, 2**40]),
        "step": torch.tensor(7.0),
    }
    scalars = {"round_index": 4, "searcher": {"damping": 0.1 + 0.2, "seed_check": 2**62 - 1}}
    run.save_state({"old": torch.ones(1)}, {})
    run.save_state(tensors, scalars)
    loaded = run.load_state()
    assert loaded is not None
    found, numbers = loaded
    assert numbers == scalars
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    # A resumed run writes into what it has read.
    found["pool.features"].add_(1)


def test_a_failed_save_keeps_the_old_state(run: RunDir) -> None:
    run.save_state({"a": torch.ones(2)}, {"round_index": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        run.save_state({"a": torch.zeros(2)}, {"round_index": object()})
    loaded = run.load_state()
    assert loaded is not None
    assert loaded[1] == {"round_index": 1}
    assert torch.equal(loaded[0]["a"], torch.ones(2))


@pytest.mark.parametrize("cut", [1, 30, 10_000])
def test_a_damaged_state_is_refused(cut: int, run: RunDir) -> None:
    run.save_state({"a": torch.ones(8)}, {"round_index": 1})
    data = run.state_path.read_bytes()
    run.state_path.write_bytes(data[:-cut])
    with pytest.raises(RunError, match=r"state.safetensors: damaged resume point: ") as refusal:
        run.load_state()
    assert str(refusal.value).count(str(run.state_path)) == 1


@pytest.mark.parametrize(
    "metadata", [{}, *({"state": text} for text in ("{", "[1]", "[" * 9999, '{"a": 1, "a": 2}'))]
)
def test_a_state_without_its_numbers_is_refused(metadata: dict[str, str], run: RunDir) -> None:
    save_tensors(run.state_path, {"a": torch.ones(1)}, metadata)
    with pytest.raises(RunError, match=r"state.safetensors: damaged resume point: "):
        run.load_state()
