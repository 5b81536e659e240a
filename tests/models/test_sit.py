"""SiT against the official implementation: names, shapes, outputs, label dropping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from merge_rl.errors import ConfigError
from merge_rl.models.patches import position_table
from merge_rl.models.sit import SiT
from merge_rl.models.transformer import time_frequencies, unpatchify
from merge_rl.registry import build_model
from merge_rl.storage.convert.sit import sit_config_from_shapes

TINY = ["a", "b"]


def _config(golden: Path, name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((golden / "sit/tiny/configs.json").read_text())[name]
    return dict(config["config"])


def _tiny(golden: Path, name: str) -> tuple[SiT, dict[str, Tensor]]:
    model = SiT(**_config(golden, name)).eval()
    model.load_state_dict(load_file(golden / f"sit/tiny/{name}.weights.safetensors"))
    return model, load_file(golden / f"sit/tiny/{name}.io.safetensors")


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _same(found: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("letter", ["S", "B", "L", "XL"])
def test_state_dicts_equal_the_official_ones(golden: Path, letter: str) -> None:
    rows = json.loads((golden / f"sit/state_dict_{letter}-2.json").read_text())
    presets = json.loads((golden / "sit/presets.json").read_text())
    preset = presets["presets"][f"SiT-{letter}/2"]
    with torch.device("meta"):
        model = build_model(sit_config_from_shapes({name: tuple(s) for name, s, *_ in rows}))
    state = model.state_dict()
    found = [
        [name, list(tensor.shape), str(tensor.dtype).removeprefix("torch."), False]
        for name, tensor in state.items()
    ]
    assert found == rows
    assert list(model.buffers()) == []
    assert sum(t.numel() for t in state.values()) == preset["num_state_dict_elements_256px"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == preset["num_trainable_parameters_256px"]
    assert presets["defaults"] == SiT.__init__.__kwdefaults__


@pytest.mark.parametrize("name", TINY)
def test_options_are_told_by_the_weights(golden: Path, name: str) -> None:
    weights = load_file(golden / f"sit/tiny/{name}.weights.safetensors")
    config = _config(golden, name)
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    found = sit_config_from_shapes(shapes, num_heads=config["num_heads"])
    assert found == {"model": "sit", **config}


@pytest.mark.parametrize("name", TINY)
def test_outputs_equal_the_official_ones(golden: Path, name: str) -> None:
    model, io = _tiny(golden, name)
    with torch.no_grad():
        _same(model(io["x"], io["t"], io["y"]), io["output"], 1e-4)
        if "cfg_x" in io:
            x, t, y = io["cfg_x"][:3], io["cfg_t"][:3], io["cfg_y"]
            _same(model(x, t, y[:3]), io["cfg_cond_output"], 1e-4)
            _same(model(x, t), io["cfg_uncond_output"], 1e-4)
            assert y[3:].tolist() == [model.null_label] * 3


@pytest.mark.parametrize("name", ["a", "b"])
def test_every_part_equals_the_official_one(golden: Path, name: str) -> None:
    model, io = _tiny(golden, name)
    trace = load_file(golden / f"sit/tiny/{name}.trace.safetensors")
    seen: dict[str, Tensor] = {"t_frequencies": time_frequencies(io["t"][2:4])}
    for key, module in model.named_modules():
        if key in trace:
            module.register_forward_hook(lambda _m, _i, out, key=key: seen.update({key: out}))
    with torch.no_grad():
        seen["output"] = model(io["x"][2:4], io["t"][2:4], io["y"][2:4])
        seen["unpatchified_all_channels"] = unpatchify(seen["final_layer"], model.patch_size)
    assert set(trace) == set(seen)
    for key, expected in trace.items():
        assert _relative(seen[key], expected) < 2e-5, key


def test_primitives(golden: Path) -> None:
    p = load_file(golden / "sit/primitives.safetensors")
    _same(time_frequencies(p["t"]), p["timestep_embedding_256"], 1e-6)
    _same(position_table(32, 2), p["pos_embed_32_2"], 1e-6)
    _same(position_table(48, 4), p["pos_embed_48_4"], 1e-6)
    rows = position_table(1152, 16)[p["pos_embed_1152_16_rows"]]
    _same(rows, p["pos_embed_1152_16"], 1e-6)
    assert torch.equal(unpatchify(p["tokens_counting"], 2), p["unpatchified_counting"])
    model = SiT(input_size=8, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    with torch.no_grad():
        model.x_embedder.proj.weight.copy_(p["patch_weight"])
        _same(model.x_embedder(p["patch_image"]), p["patch_tokens"], 1e-6)
    dropped = model.drop_labels(p["labels"], p["force_drop_ids"] == 1)
    assert torch.equal(dropped, p["labels_forced_drop"])


def test_a_fresh_network_answers_zero(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    model = SiT(input_size=8, hidden_size=48, depth=2, num_heads=4, num_classes=10)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    out = model(x, torch.tensor(0.3), torch.tensor([1, 2, 10]))
    assert torch.equal(out, torch.zeros(3, 4, 8, 8))
    state = model.state_dict()
    assert torch.equal(state["pos_embed"][0], position_table(48, 4))
    zero = [name for name in state if "adaLN" in name or "final_layer" in name]
    zero += [name for name in state if name.endswith("bias")]
    assert all(not state[name].any() for name in zero)
    # Xavier: uniform in +-sqrt(6 / (fan_in + fan_out)), the patch kernel as a matrix.
    for name, bound in {
        "blocks.1.attn.qkv.weight": (6 / (48 + 144)) ** 0.5,
        "x_embedder.proj.weight": (6 / (16 + 48)) ** 0.5,
    }.items():
        assert 0.95 * bound < float(state[name].abs().max()) <= bound, name
    for name in ("t_embedder.mlp.0.weight", "y_embedder.embedding_table.weight"):
        assert float(state[name].std()) == pytest.approx(0.02, rel=0.1), name


def test_training_reaches_every_parameter_but_the_table(golden: Path) -> None:
    model, io = _tiny(golden, "b")
    model.train()
    out = model(io["x"], io["t"], io["y"])
    assert torch.equal(out, model(io["x"], io["t"], io["y"]))  # no label is dropped
    out.square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == ["pos_embed"] == list(model.fixed_names)


def test_the_stored_table_is_used(golden: Path) -> None:
    model, io = _tiny(golden, "a")
    assert torch.equal(model.pos_embed[0], position_table(48, 4))
    with torch.no_grad():
        model.pos_embed.mul_(0.5)
        assert float((model(io["x"], io["t"], io["y"]) - io["output"]).abs().max()) > 0.01


def test_attention_is_left_to_the_fused_kernels(golden: Path) -> None:
    model, io = _tiny(golden, "a")
    outputs = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with torch.no_grad(), sdpa_kernel(backend):  # refuses inputs the kernel cannot take
            outputs.append(model(io["x"], io["t"], io["y"]))
    _same(outputs[0], outputs[1], 1e-5)


def test_half_precision(golden: Path) -> None:
    model, io = _tiny(golden, "a")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(io["x"], io["t"], io["y"])
    assert out.dtype == torch.float32
    assert _relative(out, io["output"]) < 0.03
    with torch.no_grad():
        out = model.bfloat16()(io["x"], io["t"], io["y"])
    assert out.dtype == torch.float32
    assert _relative(out, io["output"]) < 0.05


def test_attributes(golden: Path) -> None:
    model, io = _tiny(golden, "a")
    assert (model.sample_shape, model.label_dim, model.null_label) == ((4, 8, 8), 10, 10)
    assert model.prediction == "velocity"
    with torch.no_grad():
        scalar = model(io["x"], torch.tensor(0.7), io["y"])
        _same(scalar, model(io["x"], torch.full((6,), 0.7), io["y"]), 1e-5)
    other, _ = _tiny(golden, "b")
    assert (other.label_dim, other.null_label) == (10, None)


def test_refusals(golden: Path) -> None:
    model, io = _tiny(golden, "a")
    other, _ = _tiny(golden, "b")
    x, t = io["x"][:2], torch.tensor(0.5)
    with pytest.raises(ConfigError, match=r"expected labels in 0\.\.10, found 11"):
        model(x, t, torch.tensor([3, 11]))
    with pytest.raises(ConfigError, match=r"expected labels in 0\.\.9, found -1"):
        other(x, t, torch.tensor([-1, 20]))
    with pytest.raises(
        ConfigError, match=r"class ids of shape \(2,\) as labels, found int64 \(3,\)"
    ):
        model(x, t, torch.tensor([1, 2, 3]))
    with pytest.raises(ConfigError, match=r"found float32 \(2,\)"):
        model(x, t, torch.tensor([1.0, 2.0]))
    with pytest.raises(ConfigError, match="no null class .* 10 rows.* no guidance"):
        other(x, t)
    with pytest.raises(ConfigError, match="no null class"):
        other.drop_labels(torch.tensor([1]), torch.tensor([True]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 9}, "expected input_size to be a multiple of 2, got 9"),
        ({"num_heads": 5}, "expected hidden_size to be a multiple of 5, got 48"),
        ({"hidden_size": 6, "num_heads": 2}, "expected hidden_size to be a multiple of 4, got 6"),
        ({"patch_size": 0}, "expected patch_size as a whole number from 1 to 16777216, got 0"),
        ({"width": 3}, "the sit network does not take this config: .*'width'"),
        ({"depth": "2"}, "the sit network does not take this config: "),
        ({"num_classes": -3}, "the sit network does not take this config: "),
    ],
)
def test_configs_refused(golden: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model({"model": "sit", **_config(golden, "a"), **changes})
