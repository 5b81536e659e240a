"""Sets whose files are links: as the Hub's cache keeps them, and as users lay them out."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch

from merge_rl.storage.checkpoints import find_origin, open_checkpoints, open_model_file
from merge_rl.storage.hub.upload import list_model
from merge_rl.workflows.assembly import find_defaults, resolve_config
from merge_rl.workflows.export import save_model
from tests.fixtures import TinyConfig


def as_hub_cache(folder: Path, root: Path) -> Path:
    """models--user--set/snapshots/COMMIT with links into blobs/, which have hashes for names."""
    blobs, snapshot = root / "blobs", root / "snapshots" / ("c0ffee" * 7)[:40]
    blobs.mkdir(parents=True)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        target = snapshot / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        up = "../" * (len(target.relative_to(root).parts) - 1)
        target.symlink_to(f"{up}blobs/{blob.name}")
    return snapshot


def as_linked_folders(folder: Path, root: Path) -> Path:
    """Every folder of the set lies elsewhere, and the set itself is a link."""
    shutil.copytree(folder, root / "store")
    (root / "set").mkdir()
    for inner in (root / "store").iterdir():
        (root / "set" / inner.name).symlink_to(inner)
    (root / "link").symlink_to(root / "set")
    return root / "link"


@pytest.fixture(params=[as_hub_cache, as_linked_folders], ids=["cache", "folders"])
def linked(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Path:
    made: Path = request.param(tiny, tmp_path / "models--user--set")
    return made


def test_a_set_of_links_is_the_set(linked: Path, tiny: Path, tiny_config: TinyConfig) -> None:
    opened, plain = open_checkpoints(linked), open_checkpoints(tiny)
    assert (opened.names, opened.config) == (plain.names, plain.config)
    assert all(check.ok and check.recorded for check in opened.verify())
    resolved = resolve_config(tiny_config(linked), opened)
    # With the names that the manifest gives: an ending says what a file is.
    assert resolved.reference == str(linked / "evaluation/reference.safetensors")
    assert resolved.checkpoints == str(linked)
    model = opened.paths[0]
    assert find_defaults(model).reference == resolved.reference
    assert open_model_file(model).config == plain.config
    assert find_origin(model).nimg == plain.nimg[0]


def test_a_link_from_elsewhere_leads_to_the_set(tiny: Path, tmp_path: Path) -> None:
    opened = open_checkpoints(tiny)
    (tmp_path / "mine.safetensors").symlink_to(opened.paths[1])
    assert open_model_file(tmp_path / "mine.safetensors").config == opened.config
    assert find_origin(tmp_path / "mine.safetensors").nimg == opened.nimg[1]


def test_a_model_in_the_cache_can_be_published(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m", {"w": torch.ones(2)}, {"model": "edm2"})
    found = list_model(as_hub_cache(model, tmp_path / "models--user--m"))
    assert [(file.name, file.size) for file in found] == [
        (file.name, file.size) for file in list_model(model)
    ]
