"""Where the bounds of manifests and catalogues lie, and what is written of what is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from merge_rl.errors import ManifestError
from merge_rl.storage.checkpoints.catalogue import KnownSet, read_catalogue
from merge_rl.storage.checkpoints.manifest import (
    Manifest,
    SetDefaults,
    parse_stem,
    read_manifest,
    relative_inside,
    relative_name,
    write_manifest,
)

ENTRY = {"file": "a.safetensors"}
WHERE = "x"


def manifest(folder: Path, entry: dict[str, Any], **changes: Any) -> Manifest:
    document = {"version": 1, "model": {}, "checkpoints": [{**ENTRY, **entry}], **changes}
    (folder / "checkpoints_manifest.yaml").write_text(yaml.safe_dump(document))
    return read_manifest(folder)


@pytest.mark.parametrize(
    ("key", "accepted", "refused"),
    [
        ("ema_std", [1e-7, 0.2889], [0, 0.99e-7, 1e-320, -0.1, 0.289]),
        ("ema_gamma", [-0.9, 0, 999_999], [-1, -1.5, 1e6]),
        ("ema_start", [0, 0.5, 1e300], [-1, float("inf")]),
        ("sha256", ["0" * 64, "aF" * 32], ["0" * 63, "0" * 65, "g" * 64, ""]),
        ("file", ["b.SafeTensors", "a/b.safetensors"], ["a.pkl", "safetensors"]),
    ],
)
def test_facts_of_a_checkpoint(
    key: str, accepted: list[Any], refused: list[Any], tmp_path: Path
) -> None:
    for value in accepted:
        (entry,) = manifest(tmp_path, {key: value}).checkpoints
        assert getattr(entry, key) == (value.lower() if key == "sha256" else value)
    for value in refused:
        with pytest.raises(ManifestError, match=rf"checkpoints\[0\].*{key}"):
            manifest(tmp_path, {key: value})


def test_an_average_has_a_width_or_an_exponent(tmp_path: Path) -> None:
    with pytest.raises(
        ManifestError, match="ema_gamma: expected an exponent of -1 to .*without ema"
    ):
        manifest(tmp_path, {"ema_std": 0.1, "ema_gamma": 5})


def test_what_a_manifest_names(tmp_path: Path) -> None:
    assert manifest(tmp_path, {}, model={"model": "edm2"}).model == {"model": "edm2"}
    for model in ({"a": 1}, {"model": 1}):
        with pytest.raises(
            ManifestError, match="model: expected a key 'model' that names the netw"
        ):
            manifest(tmp_path, {}, model=model)
    assert manifest(tmp_path, {}, defaults={"extractor": "a-b_9"}).defaults.extractor == "a-b_9"
    with pytest.raises(ManifestError, match="extractor: expected the name of a registered extract"):
        manifest(tmp_path, {}, defaults={"extractor": "a:b"})
    with pytest.raises(ManifestError, match="a catalogue of known sets, not the manifest"):
        manifest(tmp_path, {}, sets=[])
    with pytest.raises(ManifestError, match="version: expected 1, found 2"):
        manifest(tmp_path, {}, version=2)
    with pytest.raises(ManifestError, match="checkpoints: expected at least one entry"):
        manifest(tmp_path, {}, checkpoints=[])
    with pytest.raises(
        ManifestError, match=r"checkpoints\[1\], file: 'a.safetensors' is listed twi"
    ):
        manifest(tmp_path, {}, checkpoints=[ENTRY, {"file": "./a.safetensors"}])


def test_what_is_not_given_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints_manifest.yaml"
    given = manifest(
        tmp_path, {"nimg": 0}, name="n", defaults={"reference": "r.npz", "sampler": {"a": 1}}
    )
    write_manifest(path, given)
    assert yaml.safe_load(path.read_text()) == {
        "version": 1,
        "model": {},
        "name": "n",
        "defaults": {"reference": "r.npz", "sampler": {"a": 1}},
        "checkpoints": [{**ENTRY, "nimg": 0}],
    }
    assert read_manifest(path) == given
    write_manifest(path, Manifest(model={}, checkpoints=given.checkpoints))
    assert sorted(yaml.safe_load(path.read_text())) == ["checkpoints", "model", "version"]


def test_paths_of_defaults_lie_under_the_folder() -> None:
    found = SetDefaults(reference=Path("r.npz"), extractor="e").resolved(Path("f"))
    assert (found.reference, found.heldout, found.extractor) == (Path("f/r.npz"), None, "e")
    assert SetDefaults(sampler={"guide": 3}).resolved(Path("f")).sampler == {"guide": 3}


@pytest.mark.parametrize("name", ["a", "a/b", "a" * 255, "é" * 127, "a..b/..c"])
def test_names_inside_a_folder(name: str, tmp_path: Path) -> None:
    assert relative_name(f"./{name}", WHERE) == name
    assert relative_inside(tmp_path, name, WHERE) == name


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("/a", "relative to the folder"),
        ("c:a", "relative to the folder"),
        ("\\a", "relative to the folder"),
        ("../a", "inside the folder"),
        ("a/../b", "inside the folder"),
        ("a\\b", "inside the folder"),
        ("a\0b", "inside the folder"),
        (".", "inside the folder"),
        ("", "inside the folder"),
        ("a" * 256, "of names of at most 255 bytes"),
        ("é" * 128, "of names of at most 255 bytes"),  # of two bytes each
    ],
)
def test_names_outside_a_folder(name: str, told: str) -> None:
    with pytest.raises(ManifestError, match=f"x: expected a path {told}"):
        relative_name(name, WHERE)


def test_links_may_not_lead_out_of_what_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/out").symlink_to(tmp_path)
    (tmp_path / "in/loop").symlink_to("loop")
    (tmp_path / "in/stays").symlink_to("other")
    assert relative_inside(tmp_path / "in", "stays/a", WHERE) == "stays/a"
    for name in ("out/a", "out"):
        with pytest.raises(ManifestError, match=f"x: '{name}' is a link that leaves the folder"):
            relative_inside(tmp_path / "in", name, WHERE)


@pytest.mark.parametrize(
    ("stem", "found"),
    [
        ("net", (None, None)),
        ("net-0002097", (2_097_152, None)),  # 2^21, which 2097 thousand stands for
        ("net-0002097-0.050", (2_097_152, 0.05)),
        ("net-0000042", (42_000, None)),  # between 41 * 1024 and 42 * 1024: of other steps
        ("net-0001000-0.288", (977 * 1024, 0.288)),  # the first of 1000 thousand
        ("net-0001000-0.289", (None, None)),
        ("net-0001000-0.0", (None, None)),
    ],
)
def test_progress_and_width_in_names(stem: str, found: tuple[int | None, float | None]) -> None:
    assert parse_stem(stem) == found


SET = {"name": "s", "family": "f", "kind": "k", "dataset": "d", "resolution": 8, "licence": "l"}


def known(tmp_path: Path, **changes: Any) -> KnownSet:
    path = tmp_path / "catalogue.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "sets": [{**SET, **changes}]}))
    return read_catalogue(path).find("s")


def test_a_known_set_names_its_files(tmp_path: Path) -> None:
    nimg = {"first": 1000, "last": 3000, "every": 2000}
    pattern = "n-{kimg:07d}-{ema_std:.3f}.pkl"
    found = known(tmp_path, pattern=pattern, base_url="u/", nimg=nimg, ema_std=[0.05, 0.1])
    assert (found.nimg, found.kimg) == ((1000, 3000), (1, 3))
    names = [
        "n-0000001-0.050.pkl",
        "n-0000001-0.100.pkl",
        "n-0000003-0.050.pkl",
        "n-0000003-0.100.pkl",
    ]
    assert found.file_names() == tuple(names)
    assert found.urls() == {name: f"u/{name}" for name in names}
    raw = known(tmp_path, pattern="n-{kimg}.pkl", nimg=[0, 2000])
    assert (raw.nimg, raw.file_names(), raw.urls()) == ((0, 2000), ("n-0.pkl", "n-2.pkl"), {})
    one = known(tmp_path, pattern="n.pt", links={"n.pt": "v"})
    assert (one.file_names(), one.urls()) == (("n.pt",), {"n.pt": "v"})
    bare = known(tmp_path)
    assert (bare.file_names(), bare.urls(), bare.model, bare.links, bare.embedded) == (
        (),
        {},
        None,
        None,
        False,
    )
    assert known(tmp_path, embedded=True, model={"model": "sit"}).embedded
    every = known(tmp_path, nimg={"first": 0, "last": 3, "every": 1})
    assert every.nimg == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"resolution": 0}, "resolution: expected a positive whole number"),
        ({"nimg": {"first": 1, "last": 2, "every": 0}}, "every: expected a positive whole number"),
        ({"nimg": [1, -1]}, "nimg: expected whole numbers"),
        ({"nimg": [1, "a"]}, "nimg: expected whole numbers"),
        ({"ema_std": [0.1, "a"]}, "ema_std: expected numbers"),
        ({"published": [{"metric": "fid", "value": None}]}, "value"),
    ],
)
def test_malformed_sets(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=told):
        known(tmp_path, **changes)


def test_scores_are_measured_under_their_own_conditions_or_those_of_the_set(tmp_path: Path) -> None:
    scores = [{"metric": "fid", "value": 2, "guidance": 1.5, "file": "a"},
              {"metric": "fid", "value": 1, "conditions": "own"}]  # fmt: skip
    first, second = known(tmp_path, published=scores, conditions="common").published
    assert (first.value, first.guidance, first.file, first.conditions) == (2.0, 1.5, "a", "common")
    assert (second.value, second.guidance, second.file, second.conditions) == (
        1.0,
        None,
        None,
        "own",
    )
