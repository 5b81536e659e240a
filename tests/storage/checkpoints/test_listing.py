"""Which files form a set, what they are called, and where what is known of a model comes from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_rl.errors import CheckpointError, IncompatibleCheckpointError, UnknownNameError
from merge_rl.storage.checkpoints import listing as listings
from merge_rl.storage.checkpoints.catalogue import load_catalogue
from merge_rl.storage.checkpoints.checkpoint_set import open_checkpoints
from merge_rl.storage.checkpoints.listing import (
    by_progress,
    find_origin,
    list_folder,
    newest_model,
    read_headers,
    select_entries,
)
from merge_rl.storage.checkpoints.manifest import (
    CheckpointEntry,
    Manifest,
    read_manifest,
    write_manifest,
)
from merge_rl.storage.checkpoints.recorded import licence_beside
from merge_rl.storage.files import save_tensors

MODEL = {"model": "edm2", "img_resolution": 4}


def save(path: Path, value: float = 1.0, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {"w": torch.tensor([value, 2.0])}, metadata)
    return path


def entry(name: str, **facts: Any) -> CheckpointEntry:
    return CheckpointEntry(file=f"{name}.safetensors", **facts)


def listed(folder: Path, *entries: CheckpointEntry, **facts: Any) -> Path:
    """A folder with a manifest of these files, whose weights differ."""
    for index, item in enumerate(entries):
        save(folder / item.file, float(index))
    manifest = Manifest(**{"model": {}, "checkpoints": entries, **facts})
    write_manifest(folder / "checkpoints_manifest.yaml", manifest)
    return folder


@pytest.fixture
def tracks(tmp_path: Path) -> Path:
    return listed(
        tmp_path / "set",
        entry("raw/a", nimg=2000, track="raw"),
        entry("ema/a", nimg=2000, ema_std=0.1, track="ema"),
        entry("ema/b", nimg=1000, ema_std=0.1, track="ema", licence="mit"),
        licence="cc-by-4.0",
        name="both",
    )


def test_folders_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    known = load_catalogue().names[0]
    absent = str(tmp_path / "x")
    for name, hint in ((known, True), ("user/repo", True), ("here/repo", False),
                       ("a/b/c", False), ("some", False), (absent, False)):  # fmt: skip
        told = f"; `mergerl fetch {name} DIR` gets it, if it is published" if hint else ""
        with pytest.raises(CheckpointError) as caught:
            list_folder(Path(name))
        assert str(caught.value) == f"{name}: no such folder{told}"
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file: expected a folder of checkpoints, found a fi"):
        list_folder(tmp_path / "file")


def test_folders_of_files_to_convert_say_so(tmp_path: Path) -> None:
    def told() -> str:
        with pytest.raises(CheckpointError) as caught:
            list_folder(tmp_path)
        return str(caught.value).removeprefix(f"{tmp_path}: ")

    (tmp_path / "a.txt").touch()
    assert told() == "no .safetensors files"
    for name in ("a.pkl", "b.pt"):
        (tmp_path / name).touch()
    makes = "no .safetensors files; `mergerl convert` makes them from the"
    assert told() == f"{makes} 2 .pkl, .pt files there"
    (tmp_path / "c.ckpt").touch()
    assert told() == f"{makes} 3 .ckpt, .pkl, .pt files there"


def test_files_to_convert_a_folder_deeper_are_said_to_be_there(tmp_path: Path) -> None:
    for name in ("50.ckpt/nnet.pth", "100.ckpt/nnet.pth", "logs/log.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    makes = (
        "no .safetensors files; `mergerl convert` makes them from what lies in 50.ckpt, 100.ckpt"
    )
    with pytest.raises(CheckpointError, match=f"{makes}$"):
        list_folder(tmp_path)


def test_weights_a_folder_deeper_are_found_or_said_to_be_there(tmp_path: Path) -> None:
    for name in ("step_500/m", "step_2000/m", "other/a", "other/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_tensors(tmp_path / f"{name}.safetensors", {"w": torch.zeros(1)})
    # One of one name in every folder of a checkpoint is its network.
    assert list_folder(tmp_path).names == ("step_500/m", "step_2000/m")
    (tmp_path / "step_500/m.safetensors").rename(tmp_path / "step_500/n.safetensors")
    lie = "no .safetensors files; some lie in other, step_500, step_2000: name the folder"
    with pytest.raises(CheckpointError, match=lie):
        list_folder(tmp_path)


def test_a_link_to_nothing_is_no_checkpoint_less(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {"w": torch.zeros(1)})
    (tmp_path / "b.safetensors").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"b\.safetensors: a link to nothing"):
        list_folder(tmp_path)


def test_a_folder_of_a_set_is_as_the_manifest_above_says(tracks: Path) -> None:
    # By names alone a folder of non-commercial weights would make a merge without a licence.
    manifest = read_manifest(tracks)
    for folder in ("raw", "ema"):
        part, whole = list_folder(tracks / folder), list_folder(tracks)
        known = [entry for entry in whole.entries if entry.file.startswith(folder)]
        assert part.manifest is None
        assert list(part.entries) == [
            dataclasses.replace(
                entry, file=Path(entry.file).name, licence=entry.licence or manifest.licence
            )
            for entry in known
        ]
    (tracks / "raw/later.safetensors").write_bytes((tracks / "raw/a.safetensors").read_bytes())
    assert list_folder(tracks / "raw").entries[1].licence is None


def test_a_merge_has_the_licence_of_its_recipe(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors")
    for text, licence in (("licence: mit\nsources: []", "mit"), ("licence: [", None), ("a", None)):
        (tmp_path / "merge.yaml").write_text(text)
        assert list_folder(tmp_path).entries[0].licence == licence
        assert licence_beside(tmp_path / "model.safetensors") == licence


def test_a_file_beside_shards_of_its_name_has_its_whole_name(tmp_path: Path) -> None:
    save_tensors(tmp_path / "model.safetensors", {"w": torch.zeros(1)})
    save_tensors(tmp_path / "model-00001-of-00001.safetensors", {"w": torch.ones(1)})
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {*list_folder(tmp_path).names} == {"model.safetensors", "model.safetensors.index.json"}


def test_a_selection_keeps_the_order(tracks: Path) -> None:
    whole = list_folder(tracks)
    assert whole.names == ("b", "raw/a", "ema/a")
    assert whole.path(0) == tracks / "ema/b.safetensors"
    ema = select_entries(whole, track="ema", select=None)
    assert (ema.names, [item.nimg for item in ema.entries]) == (("b", "ema/a"), [1000, 2000])
    two = select_entries(whole, track=None, select=["ema/a", "b"])
    assert (two.names, [item.file[:5] for item in two.entries]) == (
        ("b", "ema/a"),
        ["ema/b", "ema/a"],
    )
    assert select_entries(whole, track="ema", select=["b"]).names == ("b",)
    for track, select, told in (("x", None, "track"), (None, ["b", "x"], "checkpoint"),
                                ("raw", ["b"], "checkpoint")):  # fmt: skip
        with pytest.raises(UnknownNameError, match=f"unknown {told}"):
            select_entries(whole, track=track, select=select)
    with pytest.raises(CheckpointError, match="set: the selection of checkpoints is empty"):
        select_entries(whole, track=None, select=[])


def test_files_in_folders_of_networks_are_called_by_those(tmp_path: Path) -> None:
    for step in (500, 1000):
        for part in ("unet", "unet_ema"):
            save(tmp_path / f"a/checkpoint-{step}/{part}/diffusion_pytorch_model.safetensors", step)
    found = list_folder(tmp_path / "a")
    assert sorted(found.names) == sorted(
        f"checkpoint-{step}/{part}" for step in (500, 1000) for part in ("unet", "unet_ema")
    )
    assert {item.track for item in found.entries} == {"raw", "ema"}
    assert all((item.track == "ema") == ("unet_ema" in item.file) for item in found.entries)
    for step in (500, 1000):
        save(tmp_path / f"b/checkpoint-{step}/unet/diffusion_pytorch_model.safetensors", step)
    alone = list_folder(tmp_path / "b")
    assert alone.names == ("checkpoint-500", "checkpoint-1000")
    assert {item.track for item in alone.entries} == {None}


def test_sets_are_in_the_order_of_training_of_width_of_exponent() -> None:
    entries = (
        entry("a", nimg=2, ema_gamma=5.0),
        entry("b", nimg=2, ema_gamma=-0.5),
        entry("c", nimg=2, ema_std=0.1),
        entry("d", nimg=1, ema_std=0.2),
        entry("e", nimg=0, ema_std=0.2),
    )
    assert [item.file[0] for item in by_progress(entries)] == list("edbac")
    assert listings.progress(entry("f")) == (0, 0.0, 0.0)
    assert listings.progress(entries[0]) == (2, 0.0, 5.0)
    unknown = (entry("x/s_10"), entry("x/s_9", nimg=3))  # one series, by its numbers
    assert [item.file for item in by_progress(unknown)] == [
        "x/s_9.safetensors",
        "x/s_10.safetensors",
    ]
    several = (entry("t_10"), entry("s_9"))
    assert by_progress(several) == several


def test_what_differs_from_the_first_is_told(tmp_path: Path) -> None:
    two, one = torch.ones(2), torch.ones(1)
    cases: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "fewer": (
            {"w": two},
            r"tensor 'v' is missing, expected float32 \[1\] as in a.safetensors$",
        ),
        "more": (
            {"v": one, "w": two, "x": one},
            r"tensor 'x' is float32 \[1\], expected no such te",
        ),
        "other": ({"v": two, "w": one}, r"'v' is float32 \[2\], .*; 1 more tensors differ$"),
    }
    for name, (tensors, told) in cases.items():
        (tmp_path / name).mkdir()
        save_tensors(tmp_path / name / "a.safetensors", {"v": one, "w": two})
        save_tensors(tmp_path / name / "b.safetensors", tensors)
        with pytest.raises(IncompatibleCheckpointError, match=f"b.safetensors: .*{told}"):
            read_headers(list_folder(tmp_path / name))
    save_tensors(tmp_path / "a.safetensors", {})
    with pytest.raises(CheckpointError, match="a.safetensors: holds no tensors"):
        read_headers(list_folder(tmp_path))


def test_a_config_is_looked_for_from_the_manifest_to_those_above(tmp_path: Path) -> None:
    def config(folder: Path) -> dict[str, Any] | None:
        return read_headers(list_folder(folder))[1]

    plain = save(tmp_path / "plain/a.safetensors").parent
    assert config(plain) is None
    told = save(tmp_path / "told/a.safetensors", config=json.dumps({"a": 1})).parent
    assert config(told) == {"a": 1}
    (told / "config.json").write_text('{"a": 2}')
    assert config(told) == {"a": 2}
    assert config(listed(tmp_path / "known", entry("a"), model={"model": "x"})) == {"model": "x"}
    (tmp_path / "known/config.json").write_text('{"a": 2}')
    assert config(tmp_path / "known") == {"model": "x"}
    within = save(tmp_path / "run/unet/diffusion_pytorch_model.safetensors").parent
    (within / "config.json").write_text('{"a": 3}')
    assert config(tmp_path / "run") == {"a": 3}
    listed(tmp_path / "above", entry("ema/a"), model={"model": "y"})
    assert config(tmp_path / "above/ema") == {"model": "y"}


def test_what_is_known_of_a_model(tracks: Path) -> None:
    for name, licence, nimg in (("ema/b", "mit", 1000), ("ema/a", "cc-by-4.0", 2000)):
        origin = find_origin(tracks / f"{name}.safetensors", network="m:f")
        assert (origin.name, origin.licence, origin.nimg) == ("both", licence, nimg)
        assert (origin.config, origin.source, origin.metadata) == ({"model": "m:f"}, None, {})
    with pytest.raises(
        CheckpointError, match="b.safetensors: the model config is not known; .*--net"
    ):
        find_origin(tracks / "ema/b.safetensors")
    # Beside the set, but none of its files: its name and licence are those of the folder.
    config = json.dumps(MODEL)
    beside = find_origin(save(tracks / "ema/c.safetensors", config=config))
    assert (beside.config, beside.name, beside.licence, beside.nimg) == (
        MODEL,
        "both",
        "cc-by-4.0",
        None,
    )
    assert beside.metadata == {"config": config}
    far = find_origin(save(tracks / "ema/x/c.safetensors", config=config))
    assert (far.name, far.licence) == ("c", None)


def test_the_newest_of_a_set_is_its_last(tracks: Path, tmp_path: Path) -> None:
    assert newest_model(tracks) == tracks / "ema/a.safetensors"
    assert newest_model(tracks, track="raw") == tracks / "raw/a.safetensors"
    file = tracks / "ema/b.safetensors"
    assert newest_model(file) == file
    one = save(tmp_path / "one/a-2.safetensors").parent
    assert newest_model(one) == one  # the folder of one model
    save(one / "a-10.safetensors")
    assert newest_model(one) == one / "a-10.safetensors"
    with pytest.raises(CheckpointError, match="a track is a series of a set; expected its folder"):
        newest_model(file, track="ema")


def test_averages_begin_at_one_time(tmp_path: Path) -> None:
    def start(*entries: CheckpointEntry) -> float:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        return open_checkpoints(listed(place, *entries)).ema_start

    assert start(entry("a", nimg=1), entry("b", nimg=2)) == 0.0
    assert start(entry("a", nimg=1, ema_start=7.0), entry("b", nimg=2)) == 0.0  # raw
    assert start(entry("a", nimg=1, ema_std=0.1, ema_start=7.0)) == 7.0
    assert start(entry("a", nimg=1, ema_gamma=5.0, ema_start=7.0), entry("b", nimg=2)) == 7.0
    with pytest.raises(
        CheckpointError, match="began at 0 and at 7 images; expected those of one run"
    ):
        start(entry("a", nimg=1, ema_std=0.1, ema_start=7.0), entry("b", nimg=2, ema_std=0.1))


def test_exponents_are_those_stated_or_follow_from_widths(tmp_path: Path) -> None:
    # A width of sqrt((g + 1) / ((g + 2)^2 (g + 3))): of g = 6.94, 0.1 (Karras et al., 2024).
    opened = open_checkpoints(
        listed(tmp_path / "a", entry("a", nimg=1, ema_std=0.1), entry("b", nimg=2, ema_gamma=3.0),
               entry("c", nimg=3))
    )  # fmt: skip
    width, stated, raw = opened.ema_gamma
    assert (stated, raw) == (3.0, None)
    assert width == pytest.approx(6.94, abs=0.005)


def test_a_set_says_its_licences_and_its_newest(tracks: Path, tmp_path: Path) -> None:
    opened = open_checkpoints(tracks)
    assert (opened.licences, opened.licence) == (["mit", "cc-by-4.0"], "mit, cc-by-4.0")
    assert (opened.tracks, opened.newest, opened.duplicates, opened.notes) == (
        ["ema", "raw"],
        2,
        {},
        [],
    )
    assert opened.paths[1] == tracks / "raw/a.safetensors"
    unknown = open_checkpoints(listed(tmp_path / "a", entry("s", nimg=9), entry("t")))
    assert (unknown.newest, unknown.licence) == (1, None)  # the last, where one is unknown
    with pytest.raises(CheckpointError, match="a.safetensors: no tensor 'ww'; did you mean 'w'"):
        opened.read_tensor(1, "ww")
    assert opened.read_tensor(1, "w").tolist() == [0.0, 2.0]


def test_files_of_the_series_in_another_format_are_not_left_out_in_silence(tmp_path: Path) -> None:
    for number, name in enumerate(("step_1.safetensors", "step_20.safetensors")):
        save(tmp_path / name, float(number))
    for name in ("step_1.pt", "optimizer.pt", "step_20.txt"):  # made into one, and of no series
        (tmp_path / name).touch()
    assert open_checkpoints(tmp_path).notes == []
    for name in ("step_10.pt", "step_3.pth.tar", "step_5.ckpt"):
        (tmp_path / name).touch()
    told = f"{tmp_path}: left out step_3.pth.tar, step_5.ckpt, step_10.pt, of the same series; "
    assert open_checkpoints(tmp_path).notes == [f"{told}`mergerl convert` makes a set of all"]
    (tmp_path / "step_4.pkl").touch()
    (note,) = open_checkpoints(tmp_path).notes
    assert "left out step_3.pth.tar, step_4.pkl, step_5.ckpt ..., of the same" in note
