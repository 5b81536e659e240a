"""Extractors by name: registered ones, published weights, and modules of the user's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merge_rl.config.optimize import OptimizeConfig
from merge_rl.errors import CheckpointError, ConfigError, MergeRLError, UnknownNameError
from merge_rl.features.digits import DigitsNet
from merge_rl.registry import EXTRACTORS
from merge_rl.storage.files.atomic import save_tensors
from merge_rl.storage.files.documents import sha256_file
from merge_rl.workflows.assembly import extractors
from merge_rl.workflows.assembly import published as public_weights
from merge_rl.workflows.assembly.extractors import (
    DEFAULT_WEIGHTS,
    build_extractor,
    named_by_file,
    require_known,
)
from merge_rl.workflows.assembly.networks import load_weights
from merge_rl.workflows.assembly.published import PublicFile, is_public
from tests.hub_server import FileServer

MODULE = '''
import torch

class Means:
    """Mean of every channel, and a bias from the weights if there are any."""
    name, dim = "means", 3

    def __init__(self, weights=None):
        self.bias = torch.zeros(3) if weights is None else weights["bias"]

    def __call__(self, images):
        return images.double().mean((2, 3)) + self.bias

class Network(torch.nn.Module):
    name, dim = "network", 2

    def __init__(self):
        super().__init__()
        self.drop = torch.nn.Dropout(0.5)
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, images):
        return self.drop(self.layer(images.float().mean((2, 3))))

class Other:
    name, dim = "other", 4
    result = None

    def __call__(self, images):
        return self.result

def wide(): return give(torch.zeros(2, 5))
def whole(): return give(torch.zeros(2, 4, dtype=torch.int64))
def listed(): return give([[0.0] * 4] * 2)
def give(result):
    made = Other()
    made.result = result
    return made

def nameless(): return lambda images: images
def wordy():
    made = Other()
    made.dim = "4"
    return made
def silent():
    class Silent:
        name, dim = "silent", 4
    return Silent()
def broken(): raise OSError("no such disk")

constant = 5
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module in the current folder, new for every test."""
    name = f"own_features_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_bad.py").write_text("import torch\nthis is no Python\n")
    monkeypatch.chdir(tmp_path)
    for known in (name, f"{name}_bad"):
        monkeypatch.delitem(sys.modules, known, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (2, 3, 4, 5), generator=generator).to(torch.uint8)


# ------------------------------------------------------------------------------ registered ones


def test_a_registered_extractor_and_its_digest(shared_tiny: Path) -> None:
    file = shared_tiny / "evaluation/extractor.safetensors"
    extractor, digest = build_extractor("digits", str(file))
    assert isinstance(extractor, DigitsNet)
    assert digest == sha256_file(file)


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_that_torch_saved(legacy: bool, tmp_path: Path) -> None:
    weights = {name: torch.ones_like(t) for name, t in DigitsNet().state_dict().items()}
    torch.save(weights, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    extractor, digest = build_extractor("digits", str(tmp_path / "w.pth"))
    assert isinstance(extractor, DigitsNet)
    assert all(bool((t == 1).all()) for t in extractor.state_dict().values())
    assert digest == sha256_file(tmp_path / "w.pth")


def test_published_weights_are_fetched_where_none_are_given(
    web: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(DigitsNet().state_dict(), tmp_path / "w.pth")
    data = (tmp_path / "w.pth").read_bytes()
    digest = sha256_file(tmp_path / "w.pth")
    public = PublicFile(url=web.put("/w.pth", data), size=len(data), sha256=digest)
    monkeypatch.setitem(public_weights.PUBLIC_FILES, "me/digits", public)
    monkeypatch.setitem(extractors.DEFAULT_WEIGHTS, "digits", "me/digits")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    _, found = build_extractor("digits", None, announce=said.append)
    assert found == digest
    assert len(said) == 1
    # The same by name; a folder of that name would come first.
    assert load_weights("me/digits").sha256 == digest
    Path("me/digits").mkdir(parents=True)
    assert not is_public("me/digits")
    with pytest.raises(CheckpointError, match="me/digits: expected the folder of one model"):
        load_weights("me/digits")


def test_the_defaults_are_public_files() -> None:
    assert set(DEFAULT_WEIGHTS) <= set(EXTRACTORS)
    assert set(DEFAULT_WEIGHTS.values()) <= set(public_weights.PUBLIC_FILES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a state dict, found list"),
        ({}, "expected a state dict, found nothing"),
        ({"model": {"a": torch.ones(1)}}, "not weights of extractor 'digits': 9 tensors do"),
        ({3: torch.ones(1)}, "expected the state dict of one network, found 3"),
        ({"conv0.weight": torch.ones(1)}, "w.pt: not weights of extractor 'digits': 8 tensors do"),
    ],
)
def test_other_torch_files_are_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=message):
        build_extractor("digits", str(tmp_path / "w.pt"))


def test_names_are_known_before_anything_is_built() -> None:
    require_known("inception-clean")
    require_known("nowhere_at_all.module:factory")  # imports nothing
    with pytest.raises(UnknownNameError, match="unknown extractor 'dino'; did you mean 'dinov3'"):
        require_known("dino")
    with pytest.raises(ConfigError, match="expected an extractor as package.module:factory"):
        require_known("a/b.py:f")


def test_unknown_names_and_missing_weights() -> None:
    with pytest.raises(UnknownNameError, match="unknown extractor 'inceptoin'; did you mean 'ince"):
        build_extractor("inceptoin", None)
    with pytest.raises(
        ConfigError, match="'digits' needs a weights file; pass --extractor-weights"
    ):
        build_extractor("digits", None)
    with pytest.raises(CheckpointError, match=r"nowhere.safetensors: no such file"):
        build_extractor("inception", "nowhere.safetensors")


# -------------------------------------------------------------------------- the user's modules


def test_a_module_in_the_current_folder(module: str, images: Tensor) -> None:
    before = list(sys.path)
    extractor, digest = build_extractor(f"{module}:Means", None)
    assert (extractor.name, extractor.dim, digest) == ("means", 3, None)
    found = extractor(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, images.float().mean((2, 3)))
    assert sys.path == before


def test_a_module_with_weights(module: str, images: Tensor, tmp_path: Path) -> None:
    save_tensors(tmp_path / "w.safetensors", {"bias": torch.tensor([1.0, 2.0, 3.0])}, {})
    extractor, digest = build_extractor(f"{module}:Means", str(tmp_path / "w.safetensors"))
    assert digest == sha256_file(tmp_path / "w.safetensors")
    moved = extractor(images) - images.float().mean((2, 3))
    torch.testing.assert_close(moved, torch.tensor([[1.0, 2.0, 3.0]] * 2), rtol=0, atol=1e-4)


def test_a_network_of_the_users_is_used_in_evaluation_mode(module: str, images: Tensor) -> None:
    extractor, _ = build_extractor(f"{module}:Network", None)
    assert torch.equal(extractor(images), extractor(images))
    assert isinstance(extractor, torch.nn.Module)
    assert set(extractor.state_dict()) == {"extractor.layer.weight", "extractor.layer.bias"}


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("wide", r"extractor 'other' returned float32 \(2, 5\); expected a floating tensor \(2, 4"),
        (
            "whole",
            r"extractor 'other' returned int64 \(2, 4\); expected a floating tensor \(2, 4\)",
        ),
        ("listed", r"extractor 'other' returned list; expected a floating tensor \(2, 4\)"),
    ],
)
def test_results_are_checked(factory: str, message: str, module: str, images: Tensor) -> None:
    extractor, _ = build_extractor(f"{module}:{factory}", None)
    with pytest.raises(ConfigError, match=message):
        extractor(images)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nameless", "expected an object with 'name' of type str, got None from function"),
        ("wordy", "expected an object with 'dim' of type int, got '4' from Other"),
        ("silent", "Silent cannot be called on images"),
        ("broken", "calling it with no arguments failed: OSError: no such disk"),
        ("give", "calling it with no arguments failed: TypeError: .*'result'"),
        ("constant", "expected a factory, found int 5"),
        ("absent", "cannot be imported, .*: AttributeError: .*'absent'"),
        ("", "expected an extractor as package.module:factory, got 'own_features"),
        ("a b", "expected an extractor as package.module:factory"),
    ],
)
def test_modules_that_cannot_be_used(factory: str, message: str, module: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_extractor(f"{module}:{factory}", None)


def test_modules_that_cannot_be_imported(module: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"'{module}_x:f': cannot be imported, from the "
                       rf"installed packages or from {tmp_path}: ModuleNotFoundError"):  # fmt: skip
        build_extractor(f"{module}_x:f", None)
    with pytest.raises(ConfigError, match="cannot be imported, .*: SyntaxError: "):
        build_extractor(f"{module}_bad:f", None)


def test_a_file_names_no_code() -> None:
    assert named_by_file("inception-tf1", "real.safetensors") == "inception-tf1"
    message = "real.safetensors names the extractor 'os:getcwd', a module; pass --extractor os:getc"
    with pytest.raises(ConfigError, match=message):
        named_by_file("os:getcwd", "real.safetensors")


def test_a_manifest_names_no_code(tiny: Path, tiny_config: Callable[..., OptimizeConfig]) -> None:
    from merge_rl.storage.checkpoints.checkpoint_set import open_checkpoints

    manifest = tiny / "checkpoints_manifest.yaml"
    text = manifest.read_text()
    manifest.write_text(text.replace("extractor: digits", "extractor: os:getcwd"))
    message = "defaults, extractor: expected the name of a registered extractor, found"
    with pytest.raises(MergeRLError, match=message):
        open_checkpoints(tiny)
