"""What `mergerl` refuses: one sentence on stderr, exit code 1, and nothing left behind."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import merge_rl as mrl
from merge_rl.storage.checkpoints.listing import list_folder
from merge_rl.storage.checkpoints.manifest import MANIFEST_NAME
from merge_rl.storage.files.atomic import save_tensors
from tests.children import Child

pytestmark = pytest.mark.usefixtures("no_network_here")


class Ended(NamedTuple):
    """How a command ended, as the fixture `mergerl` gives it."""

    code: int
    out: str
    err: str


Mergerl = Callable[..., Ended]
Fork = Callable[..., Child]

SMALL: list[object] = [
    "--track", "raw", "--budget", 140, "--pool", 40, "--subset", 10, "--population", 4,
    "--set", "reward.refresh_size=10", "--final-images", 20,
]  # fmt: skip


def everything_in(folder: Path) -> dict[str, str]:
    """Relative path -> hash; "/" for folders."""
    return {
        str(p.relative_to(folder)): "/"
        if p.is_dir()
        else hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
    }


def spoil(path: Path, value: float) -> None:
    """The last value of a half-precision file becomes NaN or infinity, and so on disk."""
    half = torch.tensor([value], dtype=torch.float16).view(torch.uint8).numpy().tobytes()
    path.write_bytes(path.read_bytes()[:-2] + half)
    forget_hashes(path.parent.parent)


def forget_hashes(tiny: Path) -> None:
    edit(tiny, lambda text: "".join(x for x in text.splitlines(True) if "sha256" not in x))


def edit(tiny: Path, change: Callable[[str], str]) -> None:
    manifest = tiny / MANIFEST_NAME
    text = manifest.read_text()
    assert change(text) != text
    manifest.write_text(change(text))


def other_architecture(tiny: Path) -> None:
    opened = mrl.open_checkpoints(tiny)
    weights = {**opened.read(0), "unet.out_gain": torch.ones(3, dtype=torch.float16)}
    save_tensors(tiny / "raw/tiny-0000200.safetensors", weights)


def raw2(tiny: Path) -> Path:
    return tiny / "raw/tiny-0000200.safetensors"


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda tiny: raw2(tiny).write_bytes(raw2(tiny).read_bytes()[:-100]),
        r"tiny-0000200\.safetensors: not a valid .*, or truncated \(it has \d+ bytes\)",
    ),
    "cut in the header": (
        lambda tiny: raw2(tiny).write_bytes(raw2(tiny).read_bytes()[:200]),
        r"tiny-0000200\.safetensors: ",
    ),
    "empty file": (lambda tiny: raw2(tiny).write_bytes(b""), r"tiny-0000200\.safetensors: "),
    "not safetensors": (
        lambda tiny: raw2(tiny).write_bytes(b"PK\x03\x04" + bytes(500)),
        r"tiny-0000200\.safetensors: ",
    ),
    "another architecture": (
        other_architecture,
        r"'unet.out_gain' is float16 \[3\], expected float16 \[\] as in tiny-0000100",
    ),
    "NaN": (lambda tiny: spoil(raw2(tiny), float("nan")), "holds NaN or infinity in 1 of"),
    "infinity": (lambda tiny: spoil(raw2(tiny), float("inf")), "holds NaN or infinity in 1 of"),
    "wrong hash": (
        lambda tiny: raw2(tiny).write_bytes((tiny / "raw/tiny-0000100.safetensors").read_bytes()),
        r"SHA-256 is [0-9a-f]{64}, but the manifest records [0-9a-f]{64}",
    ),
    "missing file": (lambda tiny: raw2(tiny).unlink(), "listed in .* no such file"),
    "malformed manifest": (
        lambda tiny: edit(tiny, lambda text: text + "  - ["), "not readable YAML: .*line"
    ),
    "unknown key": (
        lambda tiny: edit(tiny, lambda text: text.replace("licence:", "license:")),
        "unknown key 'license'; did you mean 'licence'",
    ),
    "python tag": (
        lambda tiny: edit(
            tiny, lambda text: text.replace("name: tiny", "name: !!python/name:os.system")
        ),
        "not readable YAML: could not determine a constructor for the tag",
    ),
    "path outside": (
        lambda tiny: edit(tiny, lambda text: text.replace("file: raw/", "file: ../raw/", 1)),
        r"expected a path inside the folder .*found '\.\./raw/tiny-0000100",
    ),
    "path from the root": (
        lambda tiny: edit(tiny, lambda text: text.replace("file: raw/", "file: /raw/", 1)),
        "expected a path relative to the folder, found '/raw/tiny-0000100",
    ),
    "another network": (
        lambda tiny: edit(
            tiny, lambda text: text.replace("model_channels: 8", "model_channels: 16")
        ),
        "not the tensors of the edm2 network that its config describes: .*: found .*, expected",
    ),
    "no such network": (
        lambda tiny: edit(tiny, lambda text: text.replace("model: edm2", "model: edm3")),
        "unknown model 'edm3'; did you mean 'edm2'",
    ),
    "no such option": (
        lambda tiny: edit(tiny, lambda text: text.replace("label_dim", "label_dims")),
        "edm2 network does not take this config: .*label_dim",
    ),
}  # fmt: skip


def require_one_sentence(found: Ended, message: str) -> None:
    """One line on stderr that begins with "error:" and matches; nothing on stdout; exit code 1.

    Of wrong usage, whose line names the command's help, the exit code is 2.
    """
    code = 2 if found.err.endswith(" --help)\n") else 1
    assert (found.code, found.out) == (code, "")
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    assert found.err.endswith("\n")
    assert "unexpected" not in found.err
    assert re.search(message, found.err), found.err


@pytest.mark.parametrize("kind", SPOILT)
def test_spoilt_sets(kind: str, tiny: Path, mergerl: Mergerl, tmp_path: Path) -> None:
    change, message = SPOILT[kind]
    change(tiny)
    before = everything_in(tmp_path)
    require_one_sentence(mergerl("optimize", tiny, "--out", "run", *SMALL), message)
    require_one_sentence(mergerl("merge", tiny, "out", "--track", "raw", "--uniform"), message)
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pool", 40, "--subset", 41],
         r"subset of 41 images is larger than the pool of 40; expected subset_size <= pool_size"),
        (["--budget", 89], r"89 images does not pay for one round: .* expected at least 90$"),
        (["--map", "afine"], "unknown coefficient map 'afine'; did you mean 'affine'"),
        (["--searcher", "policy-gradeint"], "unknown searcher .*; did you mean 'policy-gradient'"),
        (["--reward", "fid-subst"], "unknown reward 'fid-subst'; did you mean 'fid-subset'"),
        (["--extractor", "digit"], "unknown extractor 'digit'; did you mean 'digits'"),
        (["--solver", "huen"], "unknown solver 'huen'; did you mean 'heun'"),
        (["--policy", "dirct"], "unknown policy 'dirct'; did you mean 'direct'"),
        (["--track", "rwa"], "unknown track 'rwa'; did you mean 'raw'"),
        (["--start", "newset"], "unknown checkpoint 'newset'; did you mean 'newest'"),
        (["--set", "budgt=5"], "unknown setting in config 'budgt'; did you mean 'budget'"),
        (["--set", "search.popultion=5"],
         r"unknown setting in config\.search 'popultion'; did you mean 'population'"),
        (["--set", "merge.scale=much"], r"config\.merge\.scale: expected float, found str 'much'"),
        (["--set", "merge.scale=[1"], r"--set merge\.scale=\[1: not readable YAML"),
        (["--set", "budget"], "expected NAME=VALUE, got 'budget'"),
        (["--guidance", 2.0], "guidance 2 needs a guide network; 1 switches guidance off"),
        (["--solver", "dopri5"], "dopri5 chooses its steps by the whole batch"),
        (["--set", "sampler.compile=true"],
         "sampler.compile is for accelerators, got the device cpu"),
        (["--guidance", 2.0, "--guide", "nowhere"], "nowhere: no such file or folder"),
        (["--repeats", 2], "expected repeats >= 3, got 2"),
        (["--final-images", 1], "expected num_images >= 2, got 1"),
        (["--population", 1], "expected population >= 2, got 1"),
        (["--batch", 0], "expected batch >= 1, got 0"),
        (["--num-steps", 0], "expected num_steps >= 1, got 0"),
        (["--num-steps", 1], "need num_steps >= 2 for EDM noise levels, got 1"),
        (["--refresh", "never"], """expected refresh "rolling" or a number .*, got 'never'"""),
        (["--scale", -1], r"expected scale finite and > 0, got -1\.0"),
        (["--scale", "wide"], r"Invalid value for '--scale'.*optimize --help"),
        (["--group", "enc=("], r"expected a regular expression for group 'enc', got '\('"),
        (["--group", "a=nothing"], "'nothing' of group 'a' to take at least one tensor, got 0"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--config", "."], r"\.: expected a file, found a folder"),
        (["--reference", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["--bugdet", 5], "No such option: --bugdet .*--budget.*optimize --help"),
    ],
)  # fmt: skip
def test_bad_options_of_optimize(
    arguments: list[object], message: str, tiny: Path, mergerl: Mergerl, tmp_path: Path
) -> None:
    before = everything_in(tmp_path)
    require_one_sentence(mergerl("optimize", tiny, "--out", "run", *SMALL, *arguments), message)
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"budget: [", "settings.yaml: not readable YAML"),
        (b"\xff\xfe\x00", "settings.yaml: expected text, found bytes that are not UTF-8"),
        (b"- 1", "settings.yaml: expected a mapping, found list"),
        (b"", "settings.yaml: expected a mapping, found nothing"),
        (b"budget: !!python/object/apply:os.getcwd []", "settings.yaml: not readable YAML"),
        (b"budgt: 5", "'budgt'; did you mean 'budget'"),
        (b"search: 5", r"config\.search: expected a mapping, found int"),
        (b"seed: 1.5", r"config\.seed: expected int, found float 1\.5"),
    ],
)
def test_settings_that_cannot_be_read(
    data: bytes, message: str, tiny: Path, mergerl: Mergerl, tmp_path: Path
) -> None:
    (tmp_path / "settings.yaml").write_bytes(data)
    before = everything_in(tmp_path)
    found = mergerl("optimize", tiny, "--out", "run", "--config", "settings.yaml")
    require_one_sentence(found, message)
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimize", "nowhere"], "nowhere: no such folder"),
        (["optimize", "empty"], r"empty: no \.safetensors files"),
        (["optimize", "elsewhere"], "names no default for an extractor; pass --extractor"),
        (["optimise", "tiny"], r"No such command 'optimise'\. Did you mean 'optimize'\?"),
        (["optimize"], r"Missing argument 'CKPTS'\. \(see .*optimize --help\)"),
        (["resume", "nowhere"], "nowhere: no such run directory"),
        (["resume", "tiny"], r"tiny: expected a run, found set \("),
        (["inspect", "nowhere"], "nowhere: no such file or folder"),
        (["inspect", "empty"], r"empty: no \.safetensors files"),
        (["inspect", "tiny/checkpoints_manifest.yaml"], r"expected a \.safetensors file"),
        (["merge", "tiny", "tiny", "--uniform"], "tiny exists already; choose another folder"),
        (["merge", "tiny", "empty", "--uniform"], "empty exists already; choose another folder"),
        (["merge", "tiny", "out"], "expected exactly one of --coefficients, .* got 0"),
        (["merge", "tiny", "out", "--uniform", "--ema-std", 0.1], "expected exactly one .* got 2"),
        (["merge", "tiny", "out", "--coefficients", "0.5,0.5"],
         "expected 8 coefficients, one for each checkpoint, got 2"),
        (["merge", "tiny", "out", "--coefficients", "a,b"], "expected numbers .*, got 'a,b'"),
        (["merge", "tiny", "out", "--track", "raw", "--coefficients", "nan,0,0,1"],
         "expected finite coefficients"),
        (["merge", "tiny", "out", "--track", "raw", "--ema-std", 0.1],
         "needs nimg and ema_std of every checkpoint; 'tiny-0000100' and 3 more have none"),
        (["merge", "tiny", "out", "--track", "ema", "--ema-std", 0.5], r"ema_std < .*got \[0\.5\]"),
        (["merge", "tiny", "out", "--recipe", "nowhere"], "nowhere: no such file"),
        (["merge", "tiny", "out", "--uniform", "--base", "oldest"], "unknown checkpoint 'oldest'"),
        (["merge", "tiny", "out", "--uniform", "--dtype", "float8"], "one of float32, .* 'float8'"),
        (["sample", "tiny/evaluation"], "a model, a set or a run, found 3 .safetensors"),
        (["push", "empty", "a/b", "--dry-run"], "expected a model, a set or a run, found nothing"),
        (["sample", "MODEL", "--num-images", 0], "expected num_images >= 1, got 0"),
        (["sample", "MODEL", "--class", 10], r"expected --class in 0\.\.9, got 10"),
        (["sample", "MODEL", "--batch", 0], "expected batch >= 1, got 0"),
        (["sample", "MODEL", "--columns", -1], "Invalid value for '--columns'"),
        (["sample", "MODEL", "--zoom", 0], "Invalid value for '--zoom'"),
        (["sample", "MODEL", "--solver", "eular"], "unknown solver 'eular'; did you mean 'euler'"),
        (["sample", "MODEL", "--num-steps", 0], "expected num_steps >= 1, got 0"),
        (["sample", "MODEL", "--guidance", 2], "guidance 2 needs a guide network; 1 switches"),
        (["sample", "MODEL", "--solver", "sde-euler", "--diffusion", "sbdm"],
         r"the diffusion form 'sbdm' belongs to paths"),
        (["sample", "MODEL", "--set", "sampler.compile=true"],
         "sampler.compile is for accelerators, got the device cpu"),
        (["sample", "MODEL", "--set", "sampler.path=liner"], "unknown path 'liner'.* 'linear'"),
        (["sample", "MODEL", "--set", "sampler.pth=vp"],
         r"unknown setting in config\.sampler 'pth'; .*'path'"),
        (["sample", "MODEL", "--set", "sampler.rho=[1"],
         r"--set sampler\.rho=\[1: not readable YAML"),
        (["evaluate", "MODEL", "--num-images", 1], "at least 2 images, got 1"),
        (["evaluate", "MODEL", "--repeats", 1], "at least 2 repeats, got 1"),
        (["evaluate", "MODEL", "--metrics", "fid,kod"], "unknown metric 'kod'"),
        (["evaluate", "MODEL", "--metrics", "fdi"], "unknown metric 'fdi'; did you mean 'fid'"),
        (["evaluate", "MODEL", "--extractor", "digets"],
         "unknown extractor 'digets'; did you mean 'digits'"),
        (["evaluate", "MODEL", "--extractor-weights", "tiny/raw/tiny-0000100.safetensors"],
         "not weights of extractor 'digits'"),
        (["evaluate", "MODEL", "--reference", "tiny/raw/tiny-0000100.safetensors"],
         "expected reference statistics, found other tensors"),
        (["evaluate", "alone.safetensors"], "names a reference; pass --reference"),
        (["evaluate", "nowhere"], "nowhere: no such file or folder"),
        (["finetune", "nowhere", "--out", "x"], "nowhere: no such file or folder"),
        (["plan", "tiny", "--devices", "8,1e9"], "expected --devices as numbers <= 100000, got"),
        (["inspect", ""], "got the empty argument '' after inspect: is a variable of the shell"),
        (["merge", "tiny", "--out="], "got the empty argument '--out=': is a variable"),
        (["demo", "tiny/checkpoints_manifest.yaml"], "expected a folder to write to, found a file"),
    ],
)  # fmt: skip
def test_bad_input(
    arguments: list[object], message: str, tiny: Path, mergerl: Mergerl, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(tiny / "raw", tmp_path / "elsewhere")
    (tmp_path / "elsewhere/config.json").write_text("{}")
    model = "tiny/raw/tiny-0000400.safetensors"
    (tmp_path / "alone.safetensors").write_bytes((tmp_path / model).read_bytes())
    before = everything_in(tmp_path)
    given = [model if argument == "MODEL" else argument for argument in arguments]
    require_one_sentence(mergerl(*given), message)
    assert everything_in(tmp_path) == before


def test_an_existing_run_directory_is_not_touched(
    tiny: Path, mergerl: Mergerl, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    before = everything_in(tmp_path)
    found = mergerl("optimize", tiny, "--out", run, *SMALL)
    require_one_sentence(found, r"run exists already; choose another")
    assert everything_in(tmp_path) == before


def test_json_goes_with_errors_on_stderr(mergerl: Mergerl) -> None:
    for command in ("optimize", "resume", "inspect"):
        require_one_sentence(mergerl(command, "nowhere", "--json"), "nowhere: no such")


def test_debug_shows_where_it_happened(mergerl: Mergerl, fork: Fork) -> None:
    process = fork("--debug", "inspect", "nowhere")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("Traceback")
    assert err.rstrip().endswith("nowhere: no such file or folder")


def test_what_nobody_thought_of_is_one_sentence_too(
    tiny: Path, mergerl: Mergerl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("nobody\nthought of it")

    monkeypatch.setattr("merge_rl.own_code._packages", set())  # in which tests are, after some
    monkeypatch.setattr("merge_rl.storage.checkpoints.open_checkpoints", fail)
    code, out, err = mergerl("inspect", tiny)
    assert (code, out) == (1, "")
    assert err == (
        "error: unexpected ZeroDivisionError: nobody thought of it (run with --debug for more)\n"
    )


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 8000000000000 bytes. Error code 12 (Cannot allocate memory)"
)])  # fmt: skip
def test_numbers_too_large_for_the_memory_are_called_so(
    error: Exception, tiny: Path, mergerl: Mergerl, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("merge_rl.storage.checkpoints.open_checkpoints", fail)
    code, out, err = mergerl("inspect", tiny)
    asked = (
        "" if isinstance(error, MemoryError) else ": 8,000,000,000,000 bytes were asked for at once"
    )
    assert (code, out, err) == (1, "", f"error: out of memory{asked}; smaller numbers need less\n")


def test_a_search_opens_its_set_once(
    tiny: Path, mergerl: Mergerl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    listed = []

    def counted(folder: Path, *rest: Any, **named: Any) -> Any:
        listed.append(folder)
        return list_folder(folder, *rest, **named)

    monkeypatch.setattr("merge_rl.storage.checkpoints.checkpoint_set.list_folder", counted)
    assert mergerl("optimize", tiny, *SMALL, "--out", tmp_path / "run").code == 0
    assert listed == [tiny]


def test_a_full_disk_is_one_sentence(
    tiny: Path, mergerl: Mergerl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("merge_rl.storage.files.shards.write_header", full)
    before = everything_in(tmp_path)
    found = mergerl("merge", tiny, "out", "--track", "raw", "--uniform")
    require_one_sentence(found, r"model\.safetensors: cannot be written: No space left on device")
    assert everything_in(tmp_path) == before


def test_where_the_current_folder_is_gone_nothing_is_done(
    mergerl: Mergerl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    ended = mergerl("inspect", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == "error: the current folder is there no more; change to one that is\n"
