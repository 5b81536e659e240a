"""Names and dimensions are told before any weights are fetched, whatever the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_rl.core.distances.statistics import feature_stats
from merge_rl.features.digits import NUM_FEATURES
from merge_rl.features.dinov2 import VIT_L14
from merge_rl.features.inception import Inception, load_inception
from merge_rl.models.autoencoder import LatentDecoder, PixelEncoder
from merge_rl.registry import AUTOENCODERS, EXTRACTORS
from merge_rl.storage.hub import cached as hub
from merge_rl.workflows.assembly import published as public_weights
from merge_rl.workflows.assembly.extractors import DIMS
from merge_rl.workflows.assembly.networks import CHANNELS
from merge_rl.workflows.reference.file import save_reference
from tests.finetuning import write_sit_set

pytestmark = pytest.mark.usefixtures("no_network_here")

SEARCHES = ("optimize", "plan", "finetune")
EXTRACTING = (*SEARCHES, "compare", "evaluate")
DECODING = (*EXTRACTING, "sample")
INCEPTION = ["--extractor", "inception"]
FITTING = [*INCEPTION, "--reference", "WIDE"]
SECOND = ["--reward", "fid-subset + fid-inception-subset", "--reference", "inception=FEW"]
OTHER = "reference.safetensors: statistics of extractor 'digits', expected 'inception'"
NARROW = "few.safetensors: statistics of 3 dimensions, expected the 2048 of extractor 'inception'"
LATENT = "'sd-vae-sit' takes samples of 4 channels, but the network makes 1"
CASES: list[tuple[tuple[str, ...], list[str], str]] = [
    (EXTRACTING, INCEPTION, OTHER),
    (EXTRACTING, [*INCEPTION, "--reference", "FEW"], NARROW),
    (EXTRACTING, ["--extractor", "inceptoin"], "did you mean 'inception'"),
    (EXTRACTING, ["--heldout", "FEW"], "few.safetensors: statistics of extractor 'inception'"),
    (DECODING, ["--autoencoder", "sd-vae-sit"], LATENT),
    (DECODING, ["--autoencoder", "sd-vae-sti"], "did you mean 'sd-vae-sit'"),
    (SEARCHES, SECOND, NARROW),
    (SEARCHES, [*INCEPTION, "--reward", "fid-subsets"], "unknown reward 'fid-subsets'"),
    (("optimize", "plan"), [*INCEPTION, "--searcher", "lscs"], "did you mean 'lcsc'"),
    (("compare",), [*FITTING, "--searcher", "uniform", "--searcher", "lscs"], "'lcsc'"),
    (("evaluate",), [*FITTING, "--metrics", "fjd"], "'fid'"),
    (
        ("evaluate",), [*FITTING, "--metrics", "kid"],
        "kid compares with the features of real images",
    ),
    (("evaluate",), [*FITTING, "--autoencoder", "sd-vae-sit"], LATENT),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def loudly(*_arguments: object, **_options: object) -> None:
        raise AssertionError("weights were to be fetched")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty-cache"))
    monkeypatch.setattr(public_weights, "fetch_url", loudly)
    monkeypatch.setattr(hub, "cached_model", loudly)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, shared_tiny: Path) -> dict[str, Path]:
    """A set, one model of it, and statistics of Inception with 3 and with all dimensions."""
    folder = tmp_path_factory.mktemp("files")
    sit = write_sit_set(folder / "sit", shared_tiny)
    named = {"FEW": folder / "few.safetensors", "WIDE": folder / "wide.safetensors"}
    for file, dim in zip(named.values(), (3, 2048), strict=True):
        stats = feature_stats(torch.randn(3, dim, generator=torch.Generator().manual_seed(0)))
        save_reference(file, stats, extractor="inception")
    return {"SET": sit, "MODEL": sit / "raw/sit-1.safetensors", **named}


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [(command, options, message) for commands, options, message in CASES for command in commands],
)
def test_what_does_not_fit_is_told_before_anything_is_fetched(
    command: str, options: list[str], message: str, files: dict[str, Path],
    mergerl: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    target = files["MODEL" if command in ("evaluate", "sample") else "SET"]
    for name in ("FEW", "WIDE"):
        options = [option.replace(name, str(files[name])) for option in options]
    place = tmp_path / ("out.png" if command == "sample" else "out")
    out = [] if command == "evaluate" else ["--out", place]
    ended = mergerl(command, target, *options, *out)
    assert ended.code == 1
    assert message in " ".join(ended.err.split())
    assert not place.exists()


def test_a_name_is_told_before_a_model_is_fetched_from_the_hub(
    mergerl: Callable[..., Any],
) -> None:
    ended = mergerl("finetune", "user/repo", "--reward", "fid-subsets")
    assert ended.code == 1
    assert "unknown reward 'fid-subsets'" in ended.err


def test_what_is_known_beforehand_is_what_is_built() -> None:
    assert set(DIMS) == set(EXTRACTORS)
    built = load_inception(Inception().state_dict())
    inception = {name for name in DIMS if name.startswith("inception")}
    assert {DIMS[name] for name in inception} == {built.dim}
    assert DIMS["digits"] == NUM_FEATURES
    assert DIMS["dinov2"] == DIMS["dinov2-dgm"] == VIT_L14["hidden_size"]
    assert set(CHANNELS) == set(AUTOENCODERS) - {"samples"}  # which takes any
    for name, channels in CHANNELS.items():
        latent = LatentDecoder(_Vae(), scale=(1.0,))
        assert channels == (PixelEncoder() if name == "pixel" else latent).channels


class _Vae:
    def decode(self, latents: torch.Tensor, /) -> torch.Tensor:
        return latents
