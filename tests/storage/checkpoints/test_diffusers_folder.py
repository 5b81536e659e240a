"""What a folder of diffusers says of its network: options, schedule, classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from merge_rl.errors import CheckpointError
from merge_rl.storage.checkpoints.diffusers_folder import (
    find_scheduler,
    is_network_config,
    is_of_library,
    library_documents,
    network_config,
)
from merge_rl.storage.checkpoints.model_file import folder_config, library_document

UNET, DIT = {"_class_name": "UNet2DModel"}, {"_class_name": "DiTTransformer2DModel"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a network, in a checkpoint of a run."""
    path = tmp_path / "run/checkpoint-1/unet"
    path.mkdir(parents=True)
    return path


def schedule(file: Path, **facts: object) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"_diffusers_version": "0.30", **facts}))


def test_only_networks_of_known_classes_are_meant() -> None:
    assert is_network_config(UNET)
    assert is_network_config(DIT)
    assert not is_network_config({})
    assert not is_network_config({"_class_name": "UNet3D"})
    assert not is_network_config({"model": "edm2", **UNET})
    assert is_of_library({"model": "diffusers"})
    assert not is_of_library({"model": "sit"})
    assert not is_of_library(None)


def test_a_schedule_lies_in_the_folder_or_up_to_two_above(folder: Path, tmp_path: Path) -> None:
    assert find_scheduler(folder) is None
    with pytest.raises(
        CheckpointError, match="unet: the network's betas and prediction are not kno"
    ):
        network_config(UNET, folder)
    schedule(tmp_path / "scheduler_config.json", at=0)  # three above
    assert find_scheduler(folder) is None
    places = [
        tmp_path / "run/scheduler/scheduler_config.json",
        folder.parent / "scheduler_config.json",
        folder / "scheduler/scheduler_config.json",
        folder / "scheduler_config.json",
    ]
    for number, place in enumerate(places):  # the nearest of them counts
        schedule(place, at=number)
        assert find_scheduler(folder) == {"_diffusers_version": "0.30", "at": number}


def test_options_are_those_of_the_network_alone(folder: Path) -> None:
    schedule(folder / "scheduler_config.json", beta_start=0.1)
    document = {**UNET, "sample_size": 8, "_diffusers_version": "0.30", "decay": 0.99}
    config = network_config(document, folder)
    assert config == {
        "model": "diffusers",
        "network": {**UNET, "sample_size": 8},
        "scheduler": {"beta_start": 0.1},
        "num_classes": 0,
    }
    assert library_documents(config) == ({**UNET, "sample_size": 8}, {"beta_start": 0.1})
    assert network_config(document, folder, num_classes=7)["num_classes"] == 7


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        (UNET, 0),
        ({**UNET, "num_class_embeds": None}, 0),
        ({**UNET, "num_class_embeds": 1}, 1),
        ({**UNET, "num_class_embeds": 2}, 1),  # the last row is the null class
        ({**UNET, "num_class_embeds": 10}, 10),
        ({**UNET, "num_class_embeds": 11}, 10),
        ({**UNET, "num_class_embeds": 1000}, 1000),
        (DIT, 1000),
        ({**DIT, "num_embeds_ada_norm": 7}, 7),
        ({**DIT, "num_embeds_ada_norm": None}, 0),
    ],
)
def test_classes_follow_from_the_table_of_labels(
    options: dict[str, Any], classes: int, folder: Path
) -> None:
    schedule(folder / "scheduler_config.json")
    assert network_config(options, folder)["num_classes"] == classes


def test_the_config_of_a_folder_is_in_our_words_where_its_schedule_is_known(folder: Path) -> None:
    assert (folder_config(folder), library_document(folder)) == (None, None)
    config = folder / "config.json"
    config.write_text(json.dumps(UNET))
    assert folder_config(folder) is None  # without a schedule
    assert library_document(folder) == UNET
    schedule(folder / "scheduler_config.json")
    assert folder_config(folder) == network_config(UNET, folder)
    for ours in ({"model": "edm2"}, {"model": "edm2", **UNET}, {"a": 1}):
        config.write_text(json.dumps(ours))
        assert (folder_config(folder), library_document(folder)) == (ours, None)
