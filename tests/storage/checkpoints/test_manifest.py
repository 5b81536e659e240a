"""Manifests: what is written is read back, and whatever does not fit is refused with facts."""

from __future__ import annotations

from pathlib import Path

import pytest

from merge_rl.errors import ManifestError
from merge_rl.storage.checkpoints.manifest import (
    MANIFEST_NAME,
    CheckpointEntry,
    Manifest,
    SetDefaults,
    has_manifest,
    read_manifest,
    relative_inside,
    write_manifest,
)

HEAD = "version: 1\nmodel: {model: edm2, img_resolution: 8}\n"
ENTRY = "checkpoints:\n  - file: raw/a.safetensors\n"


def write(folder: Path, text: str) -> Path:
    (folder / MANIFEST_NAME).write_text(text, "utf-8")
    return folder / MANIFEST_NAME


def full_manifest() -> Manifest:
    return Manifest(
        model={"model": "edm2", "img_resolution": 8, "channel_mult": [1, 2]},
        name="digits",
        licence="Apache-2.0",
        defaults=SetDefaults(
            extractor="digits",
            extractor_weights=Path("evaluation/extractor.safetensors"),
            heldout=Path("evaluation/heldout.safetensors"),
            sampler={"solver": "heun", "num_steps": 8},
        ),
        checkpoints=(
            CheckpointEntry(
                file="raw/a.safetensors",
                nimg=1024000,
                track="raw",
                sha256="0" * 63 + "1",
                source="trained here",
                licence="MIT",
            ),
            CheckpointEntry(file="ema/a.safetensors", nimg=0, ema_std=0.05, track="ema"),
        ),
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    manifest = full_manifest()
    write_manifest(tmp_path / MANIFEST_NAME, manifest)
    assert read_manifest(tmp_path / MANIFEST_NAME) == manifest
    assert read_manifest(tmp_path) == manifest


def test_a_minimal_manifest_and_null_values(tmp_path: Path) -> None:
    entry = "checkpoints: [{file: ./raw//a.safetensors, ema_std: null, nimg: null}]\n"
    manifest = read_manifest(write(tmp_path, HEAD + entry))
    assert manifest.checkpoints == (CheckpointEntry(file="raw/a.safetensors"),)
    assert manifest.defaults == SetDefaults()
    assert manifest.model == {"model": "edm2", "img_resolution": 8}


def test_hashes_are_read_in_either_case(tmp_path: Path) -> None:
    read = read_manifest(write(tmp_path, f"{HEAD}{ENTRY}    sha256: {'AB' * 32}\n"))
    assert read.checkpoints[0].sha256 == "ab" * 32


def test_defaults_resolve_under_the_folder() -> None:
    defaults = full_manifest().defaults.resolved(Path("/set"))
    assert defaults.extractor_weights == Path("/set/evaluation/extractor.safetensors")
    assert defaults.reference is None
    assert defaults.sampler == {"solver": "heun", "num_steps": 8}


BAD = {
    "empty": ("", "expected a mapping, found nothing"),
    "a list": ("- 1\n- 2\n", "expected a mapping, found a list of 2"),
    "text": ("hello", "expected a mapping, found the text 'hello'"),
    "no model": ("version: 1\n" + ENTRY, "the key 'model' is missing"),
    "no version": ("model: {model: edm2}\n" + ENTRY, "the key 'version' is missing"),
    "null checkpoints": (HEAD + "checkpoints:\n", "the key 'checkpoints' is missing"),
    "version 2": (HEAD.replace("1", "2", 1) + ENTRY, "version: expected 1, found 2"),
    "version text": (HEAD.replace("1", "one", 1) + ENTRY, "version: expected a whole number"),
    "unknown key": (HEAD + "lisence: MIT\n" + ENTRY, "'lisence'; did you mean 'licence'"),
    "model is text": ("version: 1\nmodel: edm2\n" + ENTRY, "model: expected a mapping, found the"),
    "model unnamed": ("version: 1\nmodel: {img_resolution: 8}\n" + ENTRY, "expected a key 'model'"),
    "model with a date": (
        "version: 1\nmodel: {model: edm2, x: 2024-01-02}\n" + ENTRY,
        "model, x: expected text, a number, true, false, a list or a mapping, found datetime",
    ),
    "model with a number as key": (
        "version: 1\nmodel: {model: edm2, y: [{3: 4}]}\n" + ENTRY,
        r"model, y\[0\]: expected text as key, found 3",
    ),
    "no entries": (HEAD + "checkpoints: []\n", "expected at least one entry, found a list of 0"),
    "entries as mapping": (HEAD + "checkpoints: {a: 1}\n", "checkpoints: expected a list, found"),
    "entry as text": (
        HEAD + "checkpoints: [a.safetensors]\n",
        r"checkpoints\[0\]: expected a mapping, found the text 'a.safetensors'",
    ),
    "no file": (HEAD + "checkpoints: [{nimg: 1}]\n", r"\[0\]: the key 'file' is missing"),
    "file as number": (HEAD + "checkpoints: [{file: 3}]\n", "file: expected text, found 3"),
    "pickle": (HEAD + "checkpoints: [{file: a.pkl}]\n", "expected a .safetensors file, found the"),
    "file twice": (
        HEAD + ENTRY + "  - file: ./raw/a.safetensors\n",
        r"checkpoints\[1\], file: 'raw/a.safetensors' is listed twice",
    ),
    "unknown entry key": (
        HEAD + ENTRY + "    ema: 0.1\n",
        r"\[0\]: unknown key 'ema'.*known: file",
    ),
    "negative nimg": (HEAD + ENTRY + "    nimg: -1\n", "nimg: expected a whole number.*found -1"),
    "nimg as text": (HEAD + ENTRY + "    nimg: many\n", "nimg: expected a whole number.*'many'"),
    "nimg as flag": (HEAD + ENTRY + "    nimg: yes\n", "nimg: expected a whole.*found True"),
    "ema_std 0": (
        HEAD + ENTRY + "    ema_std: 0\n",
        "ema_std: expected a width from 1e-07 to below 0.289, found 0",
    ),
    "ema_std 0.289": (HEAD + ENTRY + "    ema_std: 0.289\n", "below 0.289, found 0.289"),
    "ema_std nan": (HEAD + ENTRY + "    ema_std: .nan\n", "below 0.289, found nan"),
    "ema_std denormal": (HEAD + ENTRY + "    ema_std: 1.0e-320\n", "below 0.289, found 1e-320"),
    "ema_std as text": (HEAD + ENTRY + "    ema_std: wide\n", "expected a number, found the text"),
    "short hash": (HEAD + ENTRY + "    sha256: abc\n", "sha256: expected 64 hexadecimal digits"),
    "hash of other letters": (HEAD + ENTRY + f"    sha256: {'g' * 64}\n", "64 hexadecimal digits"),
    "track as list": (HEAD + ENTRY + "    track: [a]\n", "track: expected text, found a list of 1"),
    "blank name": (HEAD + "name: ' '\n" + ENTRY, "name: expected text, found the text ' '"),
    "unknown default": (
        HEAD + "defaults: {refrence: a.npz}\n" + ENTRY,
        "defaults: unknown key 'refrence'; did you mean 'reference'",
    ),
    "default of a wrong type": (
        HEAD + "defaults: {sampler: heun}\n" + ENTRY,
        "sampler: expected a",
    ),
    "key twice": (HEAD + ENTRY + "version: 1\n", "the key 'version' appears twice .line 5"),
    "key twice in an entry": (HEAD + ENTRY + "    nimg: 1\n    nimg: 2\n", "'nimg' appears twice"),
    "two documents": (HEAD + ENTRY + "---\n" + HEAD, "not readable YAML: but found another"),
    "broken": ("version: [1\nmodel: x", "not readable YAML: .*line 2"),
    "impossible date": (HEAD + "name: 2024-99-99\n" + ENTRY, "not readable YAML: month"),
    "empty number": ("version: !!int ''\n", "not readable YAML"),
    "nested": ("[\n" * 100_000, "nested too deeply"),
    "aliases": ("a: &a [1]\nb: [*a, *a]\n", "aliases are not allowed"),
    "a catalogue": ("version: 1\nsets: []\n", "a catalogue of known sets, not the manifest"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_manifests_are_refused_with_place_and_expectation(
    tmp_path: Path, case: str
) -> None:
    text, message = BAD[case]
    path = write(tmp_path, text)
    with pytest.raises(ManifestError, match=message) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("../x.safetensors", r"without '\.\.'"),
        ("raw/../../x.safetensors", r"without '\.\.'"),
        ("/etc/x.safetensors", "expected a path relative to the folder"),
        ("C:/x.safetensors", "expected a path relative to the folder"),
        ("C:x.safetensors", "expected a path relative to the folder"),
        ("raw\\x.safetensors", "backslashes"),
        ("\\\\host\\share\\x.safetensors", "relative to the folder"),
        (".", "expected a path inside the folder"),
    ],
)
@pytest.mark.parametrize("place", ["file", "reference"])
def test_no_path_leaves_its_folder(tmp_path: Path, text: str, message: str, place: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "x.safetensors").write_bytes(b"")
    listed = ENTRY if place == "reference" else f"checkpoints: [{{file: '{text}'}}]\n"
    defaults = f"defaults: {{reference: '{text}'}}\n" if place == "reference" else ""
    with pytest.raises(ManifestError, match=message):
        read_manifest(write(folder, HEAD + listed + defaults))


@pytest.mark.parametrize("inside", [True, False])
def test_links_are_the_users_own(tmp_path: Path, inside: bool) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    home = folder if inside else tmp_path
    (home / "real").mkdir()
    (folder / "raw").symlink_to(home / "real")
    assert read_manifest(write(folder, HEAD + ENTRY)).checkpoints[0].file == "raw/a.safetensors"


def test_nothing_is_written_through_a_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "raw").symlink_to(tmp_path)
    (tmp_path / "set" / "ema").symlink_to(tmp_path / "set")
    with pytest.raises(ManifestError, match="'raw/x' is a link that leaves the folder"):
        relative_inside(tmp_path / "set", "raw/x", "here")
    assert relative_inside(tmp_path / "set", "ema/x", "here") == "ema/x"


@pytest.mark.parametrize(
    "tag", ["object/apply:os.system", "object/new:os.system", "name:os.system"]
)
def test_tags_that_would_run_code_are_refused(tmp_path: Path, tag: str) -> None:
    marker = tmp_path / "ran"
    path = write(tmp_path, f"{HEAD}name: !!python/{tag} ['touch {marker}']\n{ENTRY}")
    with pytest.raises(ManifestError, match="could not determine a constructor"):
        read_manifest(path)
    assert not marker.exists()


def test_large_unreadable_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="larger than 4194304 bytes"):
        read_manifest(write(tmp_path, "#" * (4 * 2**20 + 1)))
    with pytest.raises(ManifestError, match="missing.yaml: no such file"):
        read_manifest(tmp_path / "missing.yaml")
    (tmp_path / MANIFEST_NAME).write_bytes(b"version: \xff")
    with pytest.raises(ManifestError, match=r"found bytes that are not UTF-8 \(byte 9\)"):
        read_manifest(tmp_path)


def test_writing_makes_the_checks_of_reading(tmp_path: Path) -> None:
    bad = Manifest(model={"model": "edm2"}, checkpoints=(CheckpointEntry(file="../a.safetensors"),))
    with pytest.raises(ManifestError, match="inside the folder"):
        write_manifest(tmp_path / MANIFEST_NAME, bad)
    assert not (tmp_path / MANIFEST_NAME).exists()


def test_a_catalogue_is_no_manifest_of_its_folder(tmp_path: Path) -> None:
    assert not has_manifest(tmp_path)
    write(tmp_path, "version: 1\nsets: []\n")
    assert not has_manifest(tmp_path)
    write(tmp_path, HEAD + ENTRY)
    assert has_manifest(tmp_path)


def test_a_guide_lies_under_the_folder_like_all_paths(tmp_path: Path) -> None:
    defaults = SetDefaults(sampler={"num_steps": 4, "guide": "guide/model.safetensors"})
    found = defaults.resolved(tmp_path).sampler
    assert found == {"num_steps": 4, "guide": str(tmp_path / "guide/model.safetensors")}
    with pytest.raises(ManifestError, match="guide"):
        SetDefaults(sampler={"guide": "../elsewhere.safetensors"}).resolved(tmp_path)
