"""`mergerl` as users meet it: what the commands print, write and return."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import string
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import typer.main
import yaml
from PIL import Image

import merge_rl as mrl
from merge_rl.cli import main as main_module
from merge_rl.storage.runs import RunDir
from merge_rl.version import __version__
from merge_rl.workflows.optimize.state import SearchState
from tests.children import Child
from tests.fixtures import RAW


class Ended(NamedTuple):
    """How a command ended, as the fixture `mergerl` gives it."""

    code: int
    out: str
    err: str


Mergerl = Callable[..., Ended]
Launch = Callable[..., "subprocess.Popen[str]"]
Fork = Callable[..., Child]
RunOutcome = Callable[[Path], dict[str, object]]

COMMANDS = [
    "demo", "optimize", "resume", "compare", "report", "merge", "sample", "evaluate", "reference",
    "inspect",
]  # fmt: skip
SMALL: list[object] = [
    "--track", "raw", "--budget", 140, "--pool", 40, "--subset", 10, "--population", 4,
    "--final-images", 10, "--repeats", 3, "--set", "evaluation.selection_images=10",
    "--set", "reward.refresh_size=10", "--set", "reward.max_gap=1e9",
]  # fmt: skip


def everything_in(folder: Path) -> dict[str, str]:
    """Relative path -> hash; "/" for folders."""
    return {
        str(p.relative_to(folder)): "/"
        if p.is_dir()
        else hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
    }


def png_size(data: bytes) -> tuple[int, int, bytes]:
    """(width, height, pixels) of an 8-bit grey PNG, every check sum verified."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position, pixels, size = 8, b"", (0, 0)
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        kind, body = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        (check,) = struct.unpack(">I", data[position + 8 + length : position + 12 + length])
        assert check == zlib.crc32(kind + body)
        if kind == b"IHDR":
            size = struct.unpack(">II", body[:8])
            assert body[8:] == bytes([8, 0, 0, 0, 0])
        if kind == b"IDAT":
            pixels += body
        position += 12 + length
    assert kind == b"IEND"
    return *size, zlib.decompress(pixels)


# ------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps(command: str, mergerl: Mergerl) -> None:
    for flag in ("--help", "-h"):
        code, out, err = mergerl(command, flag)
        assert (code, err) == (0, "")
        assert f"mergerl {command}" in out
        assert "--json" in out
        assert set(out) <= {*string.printable, *"╭─╮│╰╯"}  # ":factory:" would be a picture


def test_the_commands_are_listed(mergerl: Mergerl) -> None:
    for arguments in (["--help"], []):
        code, out, err = mergerl(*arguments)
        assert (code, err) == (0, "")
        for command in COMMANDS:
            assert f"│ {command} " in out


def test_each_command_is_registered_where_it_is_said_to_be() -> None:
    for home, names in main_module.COMMANDS.items():
        alone = typer.main.get_command(main_module.command_line(home))
        assert list(alone.commands) == list(names)  # type: ignore[attr-defined]
        for command in alone.commands.values():  # type: ignore[attr-defined]
            assert "\n" not in command.help.replace("\n\n", "")  # lines of the source
    everything = typer.main.get_command(main_module.command_line())
    assert set(COMMANDS) <= set(everything.commands)  # type: ignore[attr-defined]


def test_the_version(mergerl: Mergerl) -> None:
    assert mergerl("--version") == (0, f"merge_rl {__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["optimize", "--help"], ["--version"]])
def test_help_does_without_torch(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        f"sys.argv = ['mergerl', *{arguments!r}]\n"
        "from merge_rl.cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'numpy', 'scipy', 'yaml', 'nevergrad'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


def test_the_list_of_commands_is_that_of_the_commands(
    mergerl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = mergerl("--help").out
    assert "optimize" in shown
    whole = main_module.command_line()
    monkeypatch.setattr(main_module, "command_line", lambda *_, **__: whole)
    assert mergerl("--help").out == shown


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, main_module.SPINS),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_threads_that_wait_give_their_core_away(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))  # restored whatever becomes of it
    monkeypatch.setattr(sys, "argv", ["mergerl", "--version"])
    with pytest.raises(SystemExit) as end:
        main_module.main()
    assert end.value.code == 0
    assert os.environ.get("GOMP_SPINCOUNT") == expected


# --------------------------------------------------------------------------------- whole commands


def test_optimize_from_end_to_end(
    tiny: Path, launch: Launch, mergerl: Mergerl, tmp_path: Path
) -> None:
    process = launch("optimize", tiny, "--out", "run", *SMALL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert "search (140 images)" in err
    assert err.count("round 1 ") == err.count("round 2 ") == 1
    assert "FID, N = 10, 3 repeats" in out
    for entry in ("start", "uniform", "best single (tiny-", "result"):
        assert entry in out
    assert "searched with 140 images; merged model in run/merged" in out
    # The same in this process, as JSON: the same numbers.
    code, out, err = mergerl("optimize", tiny, "--out", "again", "--json", *SMALL)
    assert code == 0
    document = json.loads(out)
    expected = json.loads((tmp_path / "run/result.json").read_text())
    assert document["comparison"] == expected["comparison"]
    assert document["coefficients"] == expected["coefficients"]
    assert document["search_images"] == 140
    assert document["merged"] == "again/merged"
    assert "round 2 " in err


@pytest.mark.usefixtures("no_network")
def test_the_default_run_directory_is_named_after_set_and_seed(
    tiny: Path, mergerl: Mergerl, tmp_path: Path
) -> None:
    code, out, _ = mergerl("optimize", tiny, "--seed", 3, "--json", *SMALL)
    assert code == 0
    assert json.loads(out)["run_dir"] == "runs/tiny-seed3"
    assert (tmp_path / "runs/tiny-seed3/result.json").is_file()


@pytest.mark.usefixtures("no_network")
def test_options_override_the_file_and_set_overrides_options(
    tiny: Path, mergerl: Mergerl, tmp_path: Path
) -> None:
    settings = {"seed": 8, "budget": 90, "sampler": {"rho": 5}, "merge": {"map": "free"}}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    code, _, err = mergerl(
        "optimize", tiny, "--out", "run", "--config", "settings.yaml", *SMALL, "--budget", 95,
        "--scale", 0.2, "--set", "merge.scale=0.1", "--group", "enc=\\.enc\\.",
        "--set", "search.betas=[0.3, 0.8]",
    )  # fmt: skip
    assert code == 0, err
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (written["seed"], written["budget"]) == (8, 95)
    assert written["merge"] == {
        "map": "free", "start": "auto", "scale": 0.1, "groups": {"enc": "\\.enc\\."},
        "grouping": None, "max_abs": None, "l2": 0.0, "freeze": [],
    }  # fmt: skip
    # One setting of the sampler in the file; the set's own stay.
    assert (written["sampler"]["rho"], written["sampler"]["num_steps"]) == (5.0, 2)
    assert written["search"]["betas"] == [0.3, 0.8]


@pytest.mark.usefixtures("no_network")
def test_a_preset_lies_under_everything_else(tiny: Path, mergerl: Mergerl, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({"search": {"clip": 0.3}}))
    code, out, err = mergerl(
        "optimize", tiny, "--out", "run", "--preset", "paper", "--config", "settings.yaml", *SMALL,
        "--l2", 0.01, "--max-abs", 4, "--only", "tiny-0000100", "--only", "tiny-0000400", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert len(json.loads(out)["coefficients"][0]) == 2
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (written["search"]["policy"], written["search"]["update"]) == ("mlp", "adam")
    assert (written["search"]["clip"], written["search"]["top_fraction"]) == (0.3, 0.25)
    assert written["reward"]["refresh"] == "10"
    assert (written["merge"]["l2"], written["merge"]["max_abs"]) == (0.01, 4.0)
    assert written["select"] == ["tiny-0000100", "tiny-0000400"]
    code, _, err = mergerl("optimize", tiny, "--out", "other", "--preset", "papr", *SMALL)
    assert code == 1
    assert "unknown preset 'papr'; did you mean 'paper'" in err


@pytest.mark.parametrize("track", ["raw", "ema"])
@pytest.mark.usefixtures("no_network")
def test_every_map_by_option(track: str, tiny: Path, mergerl: Mergerl, tmp_path: Path) -> None:
    maps = {"raw": ["free", "softmax"], "ema": ["ema", "affine"]}[track]
    small = [track if x == "raw" else 90 if x == 140 else x for x in SMALL]
    for kind in maps:
        code, out, err = mergerl("optimize", tiny, "--out", kind, "--map", kind, "--json", *small)
        assert code == 0, err
        assert len(json.loads(out)["coefficients"][0]) == 4
        config = yaml.safe_load((tmp_path / kind / "config.yaml").read_text())
        assert (config["merge"]["map"], config["track"]) == (kind, track)


@pytest.mark.usefixtures("no_network")
def test_the_tables_are_printed_whole(
    tiny: Path, mergerl: Mergerl, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 80 columns, as where there is no terminal: nothing may be cut.
    monkeypatch.setenv("COLUMNS", "80")
    mergerl("merge", tiny, "out", "--track", "raw", "--uniform")
    for path in ("out", tiny, tiny / "evaluation/reference.safetensors"):
        code, out, _ = mergerl("inspect", path)
        assert code == 0
        assert "…" not in out
    _, out, _ = mergerl("inspect", "out")
    for word in ("kind", "tensors", "values", "dtypes", "config"):
        assert re.search(f"^{word} ", out, flags=re.MULTILINE), word


@pytest.mark.usefixtures("no_network")
def test_names_are_printed_as_they_are(tiny: Path, mergerl: Mergerl, tmp_path: Path) -> None:
    # Brackets and colons mean something to the library that prints.
    odd = tmp_path / "[bold]a:smile:b"
    code, out, _ = mergerl("inspect", odd)
    assert code == 1
    code, _, err = mergerl("merge", tiny, odd / "x", "--recipe", odd)
    assert err == f"error: {odd}: no such file\n"
    code, out, err = mergerl("merge", tiny, odd.name, "--track", "raw", "--uniform")
    assert (code, err) == (0, "")
    assert odd.name in out


# ------------------------------------------------------------------------------------------ merge


def test_merge_by_coefficients(tiny: Path, mergerl: Mergerl) -> None:
    code, out, err = mergerl(
        "merge", tiny, "out", "--track", "raw", "--coefficients", "0.5, -0.25,0 0.75", "--json"
    )  # fmt: skip
    assert (code, err) == (0, "")
    names = [f"tiny-0000{i}00" for i in (1, 2, 3, 4)]
    rows = dict(zip(names, [[0.5], [-0.25], [0.0], [0.75]], strict=True))
    assert json.loads(out) == {"out": "out", "coefficients": rows}
    expected = mrl.merge(mrl.open_checkpoints(tiny, track="raw"), [0.5, -0.25, 0, 0.75])
    state = mrl.load_model("out").state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("no_network")
def test_merge_by_recipe_is_the_same_to_the_last_bit(
    tiny: Path, mergerl: Mergerl, tmp_path: Path
) -> None:
    mergerl("optimize", tiny, "--out", "run", *SMALL, "--group", "enc=\\.enc\\.")
    weights = (tmp_path / "run/merged/model.safetensors").read_bytes()
    # With and without the track: the recipe names what it needs.
    for out, extra in (("a", ["--track", "raw"]), ("b", [])):
        code, _, err = mergerl("merge", tiny, out, "--recipe", "run/merged/merge.yaml", *extra)
        assert (code, err) == (0, "")
        assert (tmp_path / out / "model.safetensors").read_bytes() == weights
    # A merge has a recipe of its own.
    code, _, _ = mergerl("merge", tiny, "c", "--recipe", "a/merge.yaml")
    assert (tmp_path / "c/model.safetensors").read_bytes() == weights


def test_a_width_needs_no_track(tiny: Path, mergerl: Mergerl) -> None:
    code, out, _ = mergerl("merge", tiny, "all", "--ema-std", 0.1, "--json")
    assert code == 0
    found = json.loads(out)["coefficients"]
    code, out, _ = mergerl("merge", tiny, "track", "--track", "ema", "--ema-std", 0.1, "--json")
    assert json.loads(out)["coefficients"] == found


def test_a_recipe_keeps_the_dtype(tiny: Path, mergerl: Mergerl, tmp_path: Path) -> None:
    mergerl("merge", tiny, "half", "--track", "raw", "--uniform", "--dtype", "float16")
    code, _, err = mergerl("merge", tiny, "again", "--recipe", "half/merge.yaml")
    assert (code, err) == (0, "")
    halves = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("half", "again")]
    assert halves[0] == halves[1]
    mergerl("merge", tiny, "full", "--recipe", "half/merge.yaml", "--dtype", "float32")
    assert (tmp_path / "full/model.safetensors").stat().st_size > 1.8 * len(halves[0]) - 20_000


def test_merge_by_width(tiny: Path, mergerl: Mergerl) -> None:
    code, out, _ = mergerl("merge", tiny, "out", "--track", "ema", "--ema-std", 0.1, "--json")
    assert code == 0
    assert list(json.loads(out)["coefficients"].values()) == [[0.0], [0.0], [0.0], [1.0]]
    code, out, _ = mergerl("merge", tiny, "between", "--track", "ema", "--ema-std", 0.07, "--json")
    rows = [value for (value,) in json.loads(out)["coefficients"].values()]
    assert sum(rows) == pytest.approx(1)
    assert 0 < rows[2] < 1


def test_merge_prints_a_table(tiny: Path, mergerl: Mergerl, tmp_path: Path) -> None:
    code, out, err = mergerl(
        "merge", tiny, "out", "--track", "raw", "--uniform", "--dtype", "float16"
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert out.count("+0.2500") == 4
    size = (tmp_path / "out/model.safetensors").stat().st_size
    mergerl("merge", tiny, "full", "--track", "raw", "--uniform")
    assert size < 0.7 * (tmp_path / "full/model.safetensors").stat().st_size


# ----------------------------------------------------------------------------------------- sample


def test_samples_are_a_picture(tiny: Path, mergerl: Mergerl, tmp_path: Path) -> None:
    model = tiny / "raw/tiny-0000400.safetensors"
    code, out, _ = mergerl("sample", model, "--num-images", 20, "--out", "a.png", "--zoom", 3)
    assert code == 0
    assert out == "wrote 20 images, seeds 0-19, to a.png\n"
    one = mergerl("sample", model, "--num-images", 1, "--seed", 5, "--out", "one.png")
    assert one.out == "wrote 1 image, seed 5, to one.png\n"
    # Two rows of ten 8-pixel images with a pixel between and around: 91 x 19, enlarged.
    width, height, pixels = png_size((tmp_path / "a.png").read_bytes())
    assert (width, height) == (3 * 91, 3 * 19)
    assert len(pixels) == height * (width + 1)
    assert len(set(pixels)) > 5
    # Other pictures of the same seeds: the batch plays no part, the column count moves images.
    for batch in (1, 7, 20):
        mergerl(
            "sample", model, "--num-images", 20, "--out", "b.png", "--zoom", 3, "--batch", batch,
            "--force",
        )  # fmt: skip
        assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    mergerl("sample", model, "--num-images", 20, "--out", "b.png", "--columns", 4, "--zoom", 1,
            "--force")  # fmt: skip
    assert png_size((tmp_path / "b.png").read_bytes())[:2] == (37, 46)


def test_seeds_and_classes_choose_the_images(tiny: Path, mergerl: Mergerl, tmp_path: Path) -> None:
    model = tiny / "raw/tiny-0000400.safetensors"

    def sample(*arguments: object) -> tuple[list[int], bytes]:
        code, out, err = mergerl(
            "sample", model, "--out", "a.png", "--columns", 1, "--zoom", 1, "--json", "--force",
            *arguments,
        )  # fmt: skip
        assert (code, err) == (0, "")
        document = json.loads(out)
        assert document["out"] == "a.png"
        return document["labels"], png_size((tmp_path / "a.png").read_bytes())[2]

    row = 9 * 11  # nine lines of a filter byte and ten pixels
    labels, three = sample("--num-images", 3, "--seed", 5)
    assert labels == [0, 1, 2]
    labels, last = sample("--num-images", 1, "--seed", 7, "--class", 2)
    assert labels == [2]
    assert three[2 * row :] == last
    assert sample("--num-images", 1, "--seed", 8, "--class", 2)[1] != last
    assert sample("--num-images", 1, "--seed", 7, "--class", 3)[1] != last
    assert sample("--num-images", 1, "--seed", 7, "--class", 2, "--num-steps", 3)[1] != last
    assert sample("--num-images", 1, "--seed", 7, "--class", 2, "--solver", "euler")[1] != last


def test_several_models_are_shown_on_equal_seeds(
    tiny: Path, mergerl: Mergerl, tmp_path: Path
) -> None:
    raw = tiny / "raw"
    old, new = raw / "tiny-0000100.safetensors", raw / "tiny-0000400.safetensors"
    rest = ("--num-images", 20, "--zoom", 3)
    code, out, err = mergerl("sample", old, new, old, "--out", "all.png", *rest)
    assert (code, out) == (0, "wrote 20 images of each of 3 models, seeds 0-19, to all.png\n"), err
    assert [name in err for name in ("sample tiny-0000100 (", "sample tiny-0000400 (")] == [
        True
    ] * 2
    mergerl("sample", new, "--out", "new.png", *rest)
    pictures = []
    for name in ("all", "new"):
        with Image.open(tmp_path / f"{name}.png") as image:
            pictures.append(np.asarray(image.convert("RGB")))
    shown, alone = pictures
    height, width = alone.shape[:2]
    assert shown.shape[1] == 3 * width + 4 * 14
    grids = [shown[-height - 14 : -14, i * (width + 14) + 14 :][:, :width] for i in range(3)]
    assert (grids[1] == alone).all()
    assert (grids[0] == grids[2]).all()
    assert (grids[0] != grids[1]).any()
    captions = [shown[: -height - 14, i * (width + 14) + 14 :][:, :width] for i in range(3)]
    assert all((caption < 128).any() for caption in captions)
    assert (captions[0] != captions[1]).any()


def test_the_name_says_the_kind_of_picture_and_must_be_free(
    tiny: Path, mergerl: Mergerl, tmp_path: Path
) -> None:
    command = ("sample", tiny / "raw/tiny-0000400.safetensors", "--num-images", 2, "--out")
    for name, kind in (("a.jpg", "JPEG"), ("a.WEBP", "WEBP"), ("a.png", "PNG")):
        assert mergerl(*command, name).code == 0
        with Image.open(tmp_path / name) as image:
            assert image.format == kind
    code, _, err = mergerl(*command, "a.svg")
    assert (code, err.count("\n")) == (1, 1)
    assert "a.svg: expected the name of a picture, ending in .png, .jpg, .webp, " in err
    (tmp_path / "a.png").write_bytes(b"mine")
    code, _, err = mergerl(*command, "a.png")
    assert code == 1
    assert "a.png exists already; expected another --out, or --force" in err
    assert (tmp_path / "a.png").read_bytes() == b"mine"
    assert mergerl(*command, "a.png", "--force").code == 0
    assert (tmp_path / "a.png").read_bytes() != b"mine"


@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("file/a.png", "file/a.png: expected a folder to write to, found a file"),
        ("/proc/a.png", "/proc/a.png: cannot be made or written: No such file or directory"),
        ("folder.png", "folder.png: expected a picture to write, found a folder"),
    ],
)
def test_a_picture_that_cannot_be_written_is_told_before_images_are_made(
    out: str, told: str, tiny: Path, mergerl: Mergerl, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    code, _, err = mergerl("sample", tiny / f"raw/{RAW[0]}.safetensors", "--out", out, "--force")
    assert (code, err) == (1, f"error: {told}\n")  # nor is a phase announced


def test_a_guided_run_is_sampled_and_scored_with_its_guide(
    tiny: Path, mergerl: Mergerl, tmp_path: Path
) -> None:
    guide = tiny / "raw/tiny-0000100.safetensors"
    guided = ["--guidance", 1.5, "--guide", guide]
    code, out, err = mergerl("optimize", tiny, "--out", "run", "--json", *SMALL, *guided)
    assert code == 0, err
    code, _, err = mergerl("sample", "run/merged", "--num-images", 4, "--out", "guided.png")
    assert code == 0, err
    code, out, err = mergerl("evaluate", "run/merged", "--num-images", 10, "--json")
    assert code == 0, err
    assert json.loads(out)["sampler"]["guidance"] == 1.5
    mergerl("merge", tiny, "plain", "--recipe", "run/merged/merge.yaml")
    mergerl("sample", "plain", "--num-images", 4, "--out", "plain.png", "--num-steps", 2)
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in ("guided", "plain")]
    assert pictures[0] != pictures[1]


# --------------------------------------------------------------------------------------- evaluate


def test_evaluate_a_model_of_a_set(tiny: Path, mergerl: Mergerl) -> None:
    model = tiny / "raw/tiny-0000400.safetensors"
    code, out, _ = mergerl("evaluate", model, "--num-images", 10, "--repeats", 4, "--seed", 3)
    assert code == 0
    assert "N = 10, 4 repeats, seed 3, heun with 2 steps" in out
    for name in ("reference", "heldout"):
        assert f"│ fid, {name} " in out
    code, out, err = mergerl("evaluate", model, "--num-images", 10, "--repeats", 4, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["model"] == str(model)
    assert document["sampler"]["num_steps"] == 2
    assert len(document["fid"]["reference"]["values"]) == 4
    assert err == ""


def test_evaluate_against_given_statistics(tiny: Path, mergerl: Mergerl) -> None:
    model, evaluation = tiny / "raw/tiny-0000400.safetensors", tiny / "evaluation"
    code, out, _ = mergerl(
        "evaluate", model, "--reference", evaluation / "heldout.safetensors", "--num-images", 10,
        "--json",
    )  # fmt: skip
    assert code == 0
    given = json.loads(out)["fid"]
    assert list(given) == ["reference"]  # the set's held-out data belong to its own reference
    _, out, _ = mergerl("evaluate", model, "--num-images", 10, "--json")
    assert json.loads(out)["fid"]["heldout"] == given["reference"]


# ---------------------------------------------------------------------------------------- inspect


def test_inspect_a_set(tiny: Path, mergerl: Mergerl) -> None:
    code, out, err = mergerl("inspect", tiny, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["kind"] == "checkpoint set"
    assert document["tracks"] == ["raw", "ema"]
    assert document["newest"] == "tiny-0000400-0.100"
    assert len(document["checkpoints"]) == 8
    assert all(checkpoint["error"] is None for checkpoint in document["checkpoints"])
    assert (document["model"]["model"], document["licence"]) == ("edm2", "MIT")
    code, out, _ = mergerl("inspect", tiny, "--track", "raw")
    assert code == 0
    title = " ".join(out.split("┏")[0].split())
    assert title == "4 checkpoints of edm2, 8,150 values in 34 tensors each, 0.1 MB, licence MIT"
    assert out.count(" ok ") == 4


def test_inspect_a_folder_with_a_config_is_a_set_too(tiny: Path, mergerl: Mergerl) -> None:
    config = mrl.open_checkpoints(tiny).config
    (tiny / "raw/config.json").write_text(json.dumps(config))
    code, out, err = mergerl("inspect", tiny / "raw", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert (document["kind"], len(document["checkpoints"])) == ("checkpoint set", 4)
    assert document["model"] == config


def test_an_unsound_set_is_an_error_after_the_report(tiny: Path, mergerl: Mergerl) -> None:
    path = tiny / "raw/tiny-0000200.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\xff\xff")
    code, out, err = mergerl("inspect", tiny, "--track", "raw")
    assert code == 1
    assert (out.count(" ok "), out.count("FAILED")) == (3, 1)
    assert err.startswith("error: 1 of 4 checkpoints are not sound; first: ")
    assert err.count("\n") == 1
    code, out, err = mergerl("inspect", tiny, "--json")
    assert code == 1
    errors = {c["name"]: c["error"] for c in json.loads(out)["checkpoints"]}
    assert "SHA-256" in errors["tiny-0000200"]
    assert errors["tiny-0000100"] is None
    assert mergerl("inspect", tiny, "--quick").code == 0  # headers only


@pytest.mark.usefixtures("no_network")
def test_inspect_a_run(tiny: Path, mergerl: Mergerl, tmp_path: Path) -> None:
    mergerl("optimize", tiny, "--out", "run", *SMALL)
    code, out, _ = mergerl("inspect", "run", "--json")
    assert code == 0
    document = json.loads(out)
    assert (document["kind"], document["state"]) == ("run", "finished")
    assert (document["rounds"], document["images"]) == (2, 140)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert document["comparison"] == result["comparison"]
    code, out, _ = mergerl("inspect", "run")
    assert "heldout FID, N = 10" in out
    (tmp_path / "run/result.json").unlink()
    code, out, _ = mergerl("inspect", "run")
    assert code == 0
    assert "unfinished" in out
    assert "go on with: mergerl resume run" in out


def test_inspect_files(tiny: Path, mergerl: Mergerl) -> None:
    code, out, _ = mergerl("inspect", tiny / "evaluation/heldout.safetensors", "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["kind"], document["count"]) == ("reference", 150)
    mergerl("merge", tiny, "out", "--track", "raw", "--uniform")
    for path in ("out", "out/model.safetensors"):
        code, out, _ = mergerl("inspect", path, "--json")
        document = json.loads(out)
        assert (document["kind"], document["values"]) == ("model", 8150)
        assert document["dtypes"] == ["float32"]


# ---------------------------------------------------------------------------------- interruptions


def test_interrupted_before_there_is_anything_to_keep(
    tiny: Path, mergerl: Mergerl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("merge_rl.workflows.optimize.run.build_job", interrupt)
    before = everything_in(tmp_path)
    code, out, err = mergerl("optimize", tiny, "--out", "run", *SMALL)
    assert (code, out) == (1, "")
    assert err.strip() == "error: interrupted"
    assert everything_in(tmp_path) == before


@pytest.mark.usefixtures("no_network")
def test_a_full_disk_is_told_with_the_way_to_go_on(
    tiny: Path, mergerl: Mergerl, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, left = SearchState.save, [1]

    def full(state: SearchState, run: RunDir) -> None:
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device", "state.safetensors")
        left.pop()
        save(state, run)

    with monkeypatch.context() as patch:
        patch.setattr(SearchState, "save", full)
        code, _, err = mergerl("optimize", tiny, "--out", "a run", *SMALL)
    assert code == 1
    assert err.splitlines()[-2:] == [
        "note: finished rounds are saved. Go on with: mergerl resume 'a run'",
        "error: state.safetensors: No space left on device",
    ]
    assert mergerl("resume", "a run").code == 0


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_runs_go_on(
    number: signal.Signals, tiny: Path, fork: Fork, mergerl: Mergerl, tmp_path: Path,
    outcome: RunOutcome,
) -> None:  # fmt: skip
    process = fork("optimize", tiny, "--out", "run", *SMALL, disturbed=(number, "run/events.jsonl"))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert "Traceback" not in err
    assert err.rstrip().endswith(
        "stopped; finished rounds are saved. Go on with: mergerl resume run"
    )
    assert not (tmp_path / "run/result.json").exists()
    assert len((tmp_path / "run/events.jsonl").read_text().splitlines()) == 1
    code, out, err = mergerl("resume", "run", "--json")
    assert code == 0, err
    assert mergerl("optimize", tiny, "--out", "whole", *SMALL).code == 0
    expected = outcome(tmp_path / "whole")
    assert outcome(tmp_path / "run") == expected
    result = json.loads((tmp_path / "whole/result.json").read_text())
    assert json.loads(out)["comparison"] == result["comparison"]
    # Once more changes nothing.
    assert mergerl("resume", "run").code == 0
    assert outcome(tmp_path / "run") == expected
