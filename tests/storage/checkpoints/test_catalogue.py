"""The catalogue agrees with the official presets and facts, number by number."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from merge_rl.demo import DATA
from merge_rl.errors import ManifestError, UnknownNameError
from merge_rl.storage.checkpoints.catalogue import KnownSet, load_catalogue, read_catalogue
from merge_rl.storage.checkpoints.manifest import read_manifest
from merge_rl.storage.files.safetensors_header import read_header

ROOT = Path(__file__).parents[3]


@cache
def golden_json(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((ROOT / "tests/golden/edm2" / name).read_text())
    return value


def edm2_sets() -> list[KnownSet]:
    return [known for known in load_catalogue().sets if known.base_url]


def preset_of(known: KnownSet) -> dict[str, Any]:
    dataset = {"ImageNet-512": "img512", "ImageNet-64": "img64"}[known.dataset]
    preset: dict[str, Any] = golden_json("presets.json")["presets"][f"edm2-{dataset}-{known.size}"]
    return {**preset["cond" if known.conditional else "uncond"], **preset["training"]}


def holder(file: str, kind: str = "posthoc") -> KnownSet:
    found = [s for s in load_catalogue().sets if s.kind == kind and file in s.file_names()]
    assert len(found) == 1
    return found[0]


def test_the_copy_of_the_package_is_the_file_of_the_repository() -> None:
    packaged = ROOT / "merge_rl" / "checkpoints_manifest.yaml"
    assert packaged.read_bytes() == (ROOT / "checkpoints_manifest.yaml").read_bytes()
    assert not packaged.is_symlink()


@pytest.mark.parametrize("known", edm2_sets(), ids=lambda known: known.name)
def test_networks_are_the_official_ones(known: KnownSet) -> None:
    preset = preset_of(known)
    assert known.model == {"model": "edm2", **preset["kwargs"]}
    assert known.num_parameters == preset["num_parameters"]
    elements = preset["num_parameters"] + preset["num_buffer_elements"]
    assert (known.dtype, known.tensor_bytes) == ("float16", 2 * elements)
    assert known.licence == "CC-BY-NC-SA-4.0"


@pytest.mark.parametrize("known", edm2_sets(), ids=lambda known: known.name)
def test_training_times_are_exact(known: KnownSet) -> None:
    facts = dict(golden_json("phema/phema.json")["kimg_to_nimg"]["values"])
    for nimg, kimg in zip(known.nimg, known.kimg, strict=True):
        assert nimg == -(-kimg * 1000 // 1024) * 1024
        assert facts.get(kimg, nimg) == nimg
    assert max(known.nimg) <= preset_of(known)["total_nimg"]
    if known.kind == "raw":
        assert max(known.nimg) == preset_of(known)["total_nimg"]


@pytest.mark.parametrize("preset", golden_json("facts.json")["generation_presets"])
def test_every_official_preset_is_there_with_its_score(preset: str) -> None:
    facts = golden_json("facts.json")["generation_presets"][preset]
    known = holder(facts["net"]["file"])
    (score,) = (item for item in known.published if item.preset == preset)
    assert {score.metric: score.value} == facts["reported"]
    assert score.file == facts["net"]["file"]
    assert score.guidance == facts.get("guidance")
    assert score.guide == facts.get("gnet", {}).get("file")
    assert score.conditions is not None
    assert known.conditional == facts["net"]["conditional"]
    assert facts["net"]["ema_std"] in known.ema_std
    if score.guide:
        assert holder(score.guide).conditional == facts["gnet"]["conditional"]


def test_reconstructions_hold_no_file_that_no_preset_uses() -> None:
    presets = golden_json("facts.json")["generation_presets"].values()
    used = {item[net]["file"] for item in presets for net in ("net", "gnet") if net in item}
    known = [s for s in load_catalogue().sets if s.kind == "posthoc"]
    assert {file for item in known for file in item.file_names()} == used


def test_raw_snapshots_of_xs() -> None:
    known = load_catalogue().find("edm2-img512-xs-raw")
    names = known.file_names()
    # 64 times, one every 32 Mi images, two widths each.
    assert len(names) == len(set(names)) == 128
    assert names[:2] == ("edm2-img512-xs-0033554-0.050.pkl", "edm2-img512-xs-0033554-0.100.pkl")
    assert names[-1] == "edm2-img512-xs-2147483-0.100.pkl"
    assert known.nimg[0] == known.nimg[1] - known.nimg[0] == 32 * 2**20
    folder = golden_json("facts.json")["urls"]["raw_snapshots"] + "edm2-img512-xs/"
    assert known.urls()[names[-1]] == folder + names[-1]
    assert known.published[0].value == 3.52


def test_sit_release() -> None:
    known = load_catalogue().find("sit-xl-2-256")
    assert known.file_names() == ("SiT-XL-2-256x256.pt",)
    assert known.urls()["SiT-XL-2-256x256.pt"].startswith("https://")
    assert known.model is not None
    # From the official constructor: 28 blocks of width 1152, 675129632 float32 values in all.
    assert (known.model["depth"], known.model["hidden_size"]) == (28, 1152)
    assert known.tensor_bytes == 4 * 675129632
    assert [score.value for score in known.published if score.metric == "fid"][:2] == [2.06, 8.3]
    assert known.licence == "MIT"


@pytest.mark.parametrize("run", ["edm2", "sit"])
def test_the_embedded_runs_are_what_the_package_holds(run: str) -> None:
    folder = DATA / run
    manifest = read_manifest(folder)
    names: list[str] = []
    for name in (f"digits-{run}", f"digits-{run}-ema"):
        known = load_catalogue().find(name)
        assert known.embedded
        assert known.urls() == {}
        assert known.model == manifest.model
        for file in known.file_names():
            header = read_header(folder / file)
            assert sum(info.nbytes for info in header.tensors.values()) == known.tensor_bytes
        names += known.file_names()
    assert sorted(names) == sorted(entry.file for entry in manifest.checkpoints)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="checkpoint set 'edm2-img512-xs-rw'; did you mean"):
        load_catalogue().find("edm2-img512-xs-rw")


GOOD = "name: a, family: edm2, kind: raw, dataset: d, resolution: 8, licence: MIT"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 2\nsets: []", "version: expected 1, found 2"),
        ("version: 1\nsets: [{name: a}]", r"sets\[0\]: the key 'family' is missing"),
        (f"version: 1\nsets: [{{{GOOD}}}, {{{GOOD}}}]", r"sets\[1\]: the name 'a' is taken"),
        (f"version: 1\nsets: [{{{GOOD}, nimg: [x]}}]", "nimg: expected whole numbers"),
        (f"version: 1\nsets: [{{{GOOD}, ema_std: [x]}}]", "ema_std: expected numbers"),
        (f"version: 1\nsets: [{{{GOOD}, patern: x}}]", "'patern'; did you mean 'pattern'"),
        (
            f"version: 1\nsets: [{{{GOOD}, nimg: {{first: 1, last: 2, every: 0}}}}]",
            "nimg, every: expected a positive whole number, found 0",
        ),
        (
            f"version: 1\nsets: [{{{GOOD}, published: [{{metric: fid, value: low}}]}}]",
            r"published\[0\], value: expected a number, found the text 'low'",
        ),
    ],
)
def test_malformed_catalogues_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "catalogue.yaml"
    path.write_text(text)
    with pytest.raises(ManifestError, match=message):
        read_catalogue(path)
