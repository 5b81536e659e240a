"""EDM2 against the official implementation: names, shapes, outputs, weight normalisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from merge_rl.errors import ConfigError
from merge_rl.models import edm2_layers as magnitude
from merge_rl.models.edm2 import EDM2
from merge_rl.registry import build_model

TINY = ["cond", "cond_b", "guide", "uncond", "odd", "nohead"]


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _tiny(golden: Path, name: str) -> tuple[EDM2, dict[str, Tensor]]:
    config = json.loads((golden / "edm2/tiny/configs.json").read_text())[name]["config"]
    model = EDM2(**config).eval()
    model.load_state_dict(load_file(golden / f"edm2/tiny/{name}.weights.safetensors"))
    return model, load_file(golden / f"edm2/tiny/{name}.io.safetensors")


def _presets(golden: Path) -> list[tuple[str, dict[str, Any], list[list[Any]]]]:
    presets = json.loads((golden / "edm2/presets.json").read_text())["presets"]
    rows = []
    for name, preset in presets.items():
        table = json.loads((golden / "edm2" / preset["state_dict_file"]).read_text())
        rows.append((name, preset["cond"]["kwargs"], table))
    return rows


def test_state_dicts_of_all_presets_equal_the_official_ones(golden: Path) -> None:
    presets = _presets(golden)
    assert len(presets) == 12
    for name, kwargs, table in presets:
        with torch.device("meta"):
            model = EDM2(**kwargs)
        buffers = {key for key, _ in model.named_buffers()}
        found = [
            [key, list(t.shape), str(t.dtype).removeprefix("torch."), key in buffers]
            for key, t in model.state_dict().items()
        ]
        assert found == table, name


@pytest.mark.parametrize("name", TINY)
def test_outputs_equal_the_official_ones(golden: Path, name: str) -> None:
    model, io = _tiny(golden, name)
    x, sigma, labels = io["x"], io["sigma"], io.get("class_labels")
    with torch.no_grad():
        assert _relative(model(x, sigma, labels), io["D_x"]) < 2e-5
        assert _relative(model.logvar(sigma), io["logvar"]) < 2e-5
        if "D_x_scalar_sigma" in io:
            scalar = model(x, torch.tensor(1.5), labels)
            assert _relative(scalar, io["D_x_scalar_sigma"]) < 2e-5
        if "D_x_no_labels" in io:
            assert _relative(model(x, sigma, None), io["D_x_no_labels"]) < 2e-5
        if "D_x_soft_labels" in io:
            soft = model(x, sigma, io["class_labels_soft"])
            assert _relative(soft, io["D_x_soft_labels"]) < 2e-5


@pytest.mark.parametrize("name", TINY)
def test_float16_parameters(golden: Path, name: str) -> None:
    model, io = _tiny(golden, name)
    labels = io.get("class_labels")
    with torch.no_grad():
        model = model.half()
        # The stricter tolerance holds because the float16 rounding of gain / sqrt(fan_in) is kept.
        assert _relative(model(io["x"], io["sigma"], labels), io["D_x_fp16_params"]) < 2e-5
        assert _relative(model.logvar(io["sigma"]), io["logvar_fp16_params"]) < 2e-5
        model = model.float()
        upcast = model(io["x"], io["sigma"], labels)
        assert _relative(upcast, io["D_x_fp16_params_upcast"]) < 2e-5
        assert _relative(model.logvar(io["sigma"]), io["logvar_fp16_params_upcast"]) < 2e-5


@pytest.mark.parametrize("name", ["cond", "odd"])
def test_every_block_equals_the_official_one(golden: Path, name: str) -> None:
    model, io = _tiny(golden, name)
    trace = load_file(golden / f"edm2/tiny/{name}.trace.safetensors")
    seen: dict[str, Tensor] = {}
    for kind, blocks in (("enc", model.unet.enc), ("dec", model.unet.dec)):
        for key, block in blocks.items():
            block.register_forward_hook(
                lambda _m, _i, out, key=f"{kind}.{key}": seen.update({key: out})
            )
    labels = io["class_labels"][1:4] if "class_labels" in io else None
    with torch.no_grad():
        model(io["x"][1:4], io["sigma"][1:4], labels)
    blocks_seen = [key for key in trace if key.startswith(("enc.", "dec."))]
    assert set(blocks_seen) == set(seen)
    for key in blocks_seen:
        assert _relative(seen[key], trace[key]) < 2e-5, key


def test_training_mode_normalises_the_stored_weights(golden: Path) -> None:
    model, _ = _tiny(golden, "cond")
    expected = load_file(golden / "edm2/tiny/cond.trainmode.safetensors")
    io = load_file(golden / "edm2/tiny/cond.io.safetensors")
    model.train()
    for module in model.unet.modules():
        if hasattr(module, "config"):
            module.config = type(module.config)(**{**vars(module.config), "dropout": 0.0})
    out = model(io["x"], io["sigma"], io["class_labels"])
    found = [key for key in expected if not key.startswith("after.")]
    assert len(found) == 1
    assert _relative(out.detach(), expected[found[0]]) < 2e-5
    for name, parameter in model.named_parameters():
        assert _relative(parameter.detach(), expected[f"after.{name}"]) < 2e-5, name


def test_class_ids_equal_one_hot_rows(golden: Path) -> None:
    model, io = _tiny(golden, "cond")
    with torch.no_grad():
        a = model(io["x"], io["sigma"], io["class_idx"])
        b = model(io["x"], io["sigma"], io["class_labels"])
    assert torch.equal(a, b)


def test_class_ids_out_of_range_are_refused(golden: Path) -> None:
    model, io = _tiny(golden, "cond")
    for odd in (-1, 10):
        with pytest.raises(ConfigError, match=rf"expected labels in 0\.\.9, found {odd}$"):
            model(io["x"][:2], io["sigma"][:2], torch.tensor([3, odd]))


@pytest.fixture
def normalised(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by a layer whenever one makes its effective weight."""
    calls: list[object] = []
    original = magnitude.NormalizedWeight._normalized
    monkeypatch.setattr(
        magnitude.NormalizedWeight,
        "_normalized",
        lambda self, gain: calls.append(self) or original(self, gain),  # type: ignore[func-returns-value]
    )
    return calls


def test_normalisation_runs_once_per_set_of_weights(golden: Path, normalised: list[object]) -> None:
    model, io = _tiny(golden, "cond")
    other, _ = _tiny(golden, "cond_b")
    arguments = (io["x"], io["sigma"], io["class_labels"])
    layers = sum(isinstance(m, magnitude.NormalizedWeight) for m in model.unet.modules())
    with torch.no_grad():
        first, second = model(*arguments), model(*arguments)
        assert torch.equal(first, second)
        assert len(normalised) == layers
        # In-place writes of any kind are noticed: parameter copies and gains alike.
        for target, source in zip(model.parameters(), other.parameters(), strict=True):
            target.copy_(source)
        for buffer, value in zip(model.buffers(), other.buffers(), strict=True):
            buffer.copy_(value)
        changed = model(*arguments)
        assert len(normalised) == 2 * layers
        assert torch.equal(changed, other(*arguments))
        before = model(*arguments)
        model.unet.out_gain.mul_(2.0)
        assert not torch.equal(model(*arguments), before)


def test_gradients_flow_and_never_use_the_cache(golden: Path) -> None:
    model, io = _tiny(golden, "cond")
    with torch.no_grad():
        model(io["x"], io["sigma"], io["class_labels"])  # fills the cache
    model(io["x"], io["sigma"], io["class_labels"]).square().mean().backward()
    assert all(p.grad is not None for p in model.unet.parameters())


@pytest.mark.parametrize("again", [False, True], ids=["kept", "made again"])
def test_calls_that_share_effective_weights_have_the_same_gradient(
    golden: Path, normalised: list[object], again: bool
) -> None:
    model, io = _tiny(golden, "cond")
    weights = list(model.unet.parameters())

    def two_calls() -> None:
        x = io["x"].clone()
        for _ in range(2):
            given = x, io["sigma"], io["class_labels"]
            x = checkpoint(model, *given, use_reentrant=False) if again else model(*given)
        x.square().mean().backward()  # type: ignore[no-untyped-call]

    two_calls()
    expected = [weight.grad for weight in weights]
    model.zero_grad()
    normalised.clear()
    with model.derived_once():
        two_calls()
        assert all(weight.grad is None for weight in weights)
    layers = sum(isinstance(m, magnitude.NormalizedWeight) for m in model.unet.modules())
    assert len(normalised) == layers
    for weight, gradient in zip(weights, expected, strict=True):
        # Both are sums over all positions of an image, 2^10 roundings of 2^-24 at most.
        assert gradient is not None
        torch.testing.assert_close(
            weight.grad, gradient, rtol=0, atol=2**-14 * float(gradient.abs().max())
        )
    model.zero_grad()
    two_calls()  # outside, each call makes its own again
    assert len(normalised) == (5 if again else 3) * layers
    torch.testing.assert_close([w.grad for w in weights], expected, rtol=0, atol=0)


def test_gradients_of_half_precision_calls_add_up_in_float32() -> None:
    layer, once = magnitude.NormalizedWeight(1, 1), magnitude.Once()
    layer.once = once
    for part in (1.0, *[2.0**-12] * 16):  # each lost beside 1 in float16
        layer.effective_weight(torch.float16).sum().mul(part).backward()  # type: ignore[no-untyped-call]
    ((_, leaf),) = once._held.values()
    assert leaf.dtype == torch.float32
    assert leaf.grad is not None
    assert float(leaf.grad) == 1 + 2.0**-8


def test_primitives(golden: Path) -> None:
    p = load_file(golden / "edm2/primitives.safetensors")
    x, b, c = p["x"], p["b"], p["c"]
    found = {
        "normalize_default": magnitude.normalize(x),
        "normalize_dim1": magnitude.normalize(x, dims=(1,)),
        "mp_silu": magnitude.mp_silu(x),
        "mp_sum_t0.3": magnitude.mp_sum(x, b, 0.3),
        "mp_sum_t0.5": magnitude.mp_sum(x, b, 0.5),
        "mp_cat_t0.3": magnitude.mp_cat(x, c, 0.3),
        "mp_cat_t0.5": magnitude.mp_cat(x, c, 0.5),
        "resample_down_11": magnitude.resample(x, (1, 1), "down"),
        "resample_down_1331": magnitude.resample(x, (1, 3, 3, 1), "down"),
        "resample_up_11": magnitude.resample(x, (1, 1), "up"),
        "resample_up_1331": magnitude.resample(x, (1, 3, 3, 1), "up"),
    }
    for key, value in found.items():
        assert _relative(value, p[key]) < 1e-5, key


@pytest.mark.parametrize(("name", "kernel"), [("linear", 0), ("conv1", 1), ("conv3", 3)])
def test_normalised_layers(golden: Path, name: str, kernel: int) -> None:
    p = load_file(golden / "edm2/primitives.safetensors")
    weight = p[f"{name}_weight"]
    layer = magnitude.NormalizedWeight(weight.shape[1], weight.shape[0], kernel).eval()
    with torch.no_grad():
        layer.weight.copy_(weight)
        assert _relative(layer(p[f"{name}_in"]), p[f"{name}_out"]) < 1e-5
        assert _relative(layer(p[f"{name}_in"], gain=0.37), p[f"{name}_out_gain0.37"]) < 1e-5
        layer.train()
        assert _relative(layer(p[f"{name}_in"]), p[f"{name}_out_train"]) < 1e-5
        assert _relative(layer.weight, p[f"{name}_weight_after_train_forward"]) < 1e-5


def test_fourier_features(golden: Path) -> None:
    p = load_file(golden / "edm2/primitives.safetensors")
    layer = magnitude.FourierFeatures(len(p["fourier_freqs"]))
    layer.freqs.copy_(p["fourier_freqs"])
    layer.phases.copy_(p["fourier_phases"])
    assert _relative(layer(p["fourier_in"]), p["fourier_out"]) < 1e-5


PATCHED: dict[str, Any] = {
    "label_dim": 3, "model_channels": 8, "channel_mult": [1], "num_blocks": 1,
    "attn_resolutions": [], "channels_per_head": 8, "logvar_channels": 4,
}  # fmt: skip


def test_patches_are_channels_of_the_same_network(generator: torch.Generator) -> None:
    patched = EDM2(img_resolution=8, img_channels=1, patch_size=4, **PATCHED).eval()
    plain = EDM2(img_resolution=2, img_channels=16, **PATCHED).eval()
    plain.load_state_dict(patched.state_dict())
    with torch.no_grad():
        patched.unet.out_gain.fill_(1.0)
        plain.unet.out_gain.fill_(1.0)
        x, sigma = torch.randn(5, 1, 8, 8, generator=generator), torch.tensor(0.7)
        labels = torch.arange(5) % 3
        # Channel 4 i + j of a patch is its pixel in row i, column j.
        rows = x.reshape(5, 2, 4, 2, 4).permute(0, 2, 4, 1, 3).reshape(5, 16, 2, 2)
        found = patched(x, sigma, labels).reshape(5, 2, 4, 2, 4).permute(0, 2, 4, 1, 3)
        assert torch.equal(found.reshape(5, 16, 2, 2), plain(rows, sigma, labels))
    assert patched.sample_shape == (1, 8, 8)


def test_patches_that_do_not_fit_are_refused() -> None:
    config = {"model": "edm2", "img_resolution": 9, "img_channels": 1, "patch_size": 4, **PATCHED}
    with pytest.raises(ConfigError, match="img_resolution 9 is no multiple of 4"):
        build_model(config)
