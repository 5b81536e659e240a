"""From the shapes of a SiT's tensors to its options and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.storage.convert.sit import is_sit, sit_config_from_shapes, sit_shapes, sit_size_name

CUSTOM: dict[str, Any] = {
    "model": "sit",
    "input_size": 12,
    "patch_size": 3,
    "in_channels": 5,
    "hidden_size": 128,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 1.5,
    "class_dropout_prob": 0.1,
    "num_classes": 37,
    "learn_sigma": False,
}


def _presets(golden: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    document = json.loads((golden / "sit/presets.json").read_text())
    return document["defaults"], document["presets"]


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_all_published_sizes_are_recognised(golden: Path, learn_sigma: bool) -> None:
    defaults, presets = _presets(golden)
    assert len(presets) == 12
    for name, preset in presets.items():
        size = {key: preset[key] for key in ("depth", "hidden_size", "patch_size", "num_heads")}
        config = {"model": "sit", **defaults, **size, "learn_sigma": learn_sigma}
        shapes = sit_shapes(config)
        assert len(shapes) == preset["num_state_dict_entries"]
        found = sit_config_from_shapes(shapes)
        assert found == config
        assert list(found) == list(config)
        assert sit_size_name(found) == name


@pytest.mark.parametrize("letter", ["S", "B", "L", "XL"])
def test_official_state_dicts(golden: Path, letter: str) -> None:
    rows = json.loads((golden / f"sit/state_dict_{letter}-2.json").read_text())
    shapes = {name: tuple(shape) for name, shape, *_ in rows}
    config = sit_config_from_shapes(shapes)
    assert list(sit_shapes(config).items()) == list(shapes.items())
    assert sit_size_name(config) == f"SiT-{letter}/2"
    assert (config["input_size"], config["num_classes"], config["learn_sigma"]) == (32, 1000, True)
    assert config["class_dropout_prob"] == 0.1
    assert is_sit(shapes)


def test_a_consistent_size_of_ones_own_is_custom() -> None:
    found = sit_config_from_shapes(sit_shapes(CUSTOM))
    assert found == CUSTOM
    assert sit_size_name(found) == "custom"
    # The heads of a size count, the number of channels and classes does not.
    assert sit_size_name({**CUSTOM, "depth": 12, "hidden_size": 384}) == "custom"
    known = {"depth": 12, "hidden_size": 384, "num_heads": 6, "patch_size": 4, "mlp_ratio": 4.0}
    assert sit_size_name({**CUSTOM, **known}) == "SiT-S/4"


@pytest.mark.parametrize(
    ("hidden", "depth", "hint", "heads"),
    [
        (1152, 28, None, 16),  # head size 72 although 64 divides 1152 as well
        (1152, 5, None, 16),
        (768, 2, None, 12),
        (256, 2, None, 4),
        (360, 2, None, 5),
        (48, 2, 4, 4),
        (768, 12, 6, 6),
    ],
)
def test_heads(hidden: int, depth: int, hint: int | None, heads: int) -> None:
    config = {**CUSTOM, "hidden_size": hidden, "depth": depth}
    assert sit_config_from_shapes(sit_shapes(config), hint)["num_heads"] == heads


@pytest.mark.parametrize(
    ("rows", "hint", "classes", "dropout"),
    [
        (1001, None, 1000, 0.1),
        (1000, None, 1000, 0.0),
        (11, None, 10, 0.1),
        (10, None, 10, 0.0),
        (103, None, 102, 0.1),
        (38, None, 37, 0.1),
        (1, None, 1, 0.0),
        (10, 9, 9, 0.1),
        (11, 11, 11, 0.0),
    ],
)
def test_null_class(rows: int, hint: int | None, classes: int, dropout: float) -> None:
    shapes = sit_shapes({**CUSTOM, "num_classes": rows, "class_dropout_prob": 0.0})
    found = sit_config_from_shapes(shapes, num_classes=hint)
    assert (found["num_classes"], found["class_dropout_prob"]) == (classes, dropout)


def test_every_mlp_width_survives_the_round_trip() -> None:
    for inner in range(1, 400):
        shapes = sit_shapes({**CUSTOM, "mlp_ratio": 1.0})
        for i in range(3):
            shapes[f"blocks.{i}.mlp.fc1.weight"] = (inner, 128)
            shapes[f"blocks.{i}.mlp.fc1.bias"] = (inner,)
            shapes[f"blocks.{i}.mlp.fc2.weight"] = (128, inner)
        assert sit_shapes(sit_config_from_shapes(shapes)) == shapes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.1.attn.qkv.weight": (384, 64)}, r"1 tensors .*'blocks.1.attn.qkv.weight': "),
        ({"blocks.1.attn.qkv.weight": None}, r"found missing, expected \[384, 128\]"),
        ({"blocks.7.attn.qkv.weight": (384, 128)}, "first 'blocks.3.attn.qkv.weight': found miss"),
        ({"extra": (1,)}, r"first 'extra': found \[1\], expected no such tensor"),
        ({"pos_embed": None}, "not a SiT: tensor 'pos_embed' is missing, expected 3 axes"),
        ({"pos_embed": (16, 128)}, r"'pos_embed' is of shape \[16, 128\], expected 3 axes"),
        ({"pos_embed": (1, 15, 128)}, "expected a square number of tokens .*, found 15 tokens"),
        ({"pos_embed": (1, 0, 128)}, "found 0 tokens"),
        ({"x_embedder.proj.weight": (128, 5, 3, 4)}, r"found \[128, 5, 3, 4\], expected \[128, 5"),
        ({"final_layer.linear.weight": (46, 128)}, r"found \[46, 128\], expected \[45, 128\]"),
        ({"t_embedder.mlp.0.weight": (128, 128)}, r"found \[128, 128\], expected \[128, 256\]"),
    ],
)
def test_inconsistent_shapes_are_refused(
    changes: dict[str, tuple[int, ...] | None], message: str
) -> None:
    shapes = sit_shapes(CUSTOM)
    for name, shape in changes.items():
        if shape is None:
            del shapes[name]
        else:
            shapes[name] = shape
    with pytest.raises(CheckpointError, match=message):
        sit_config_from_shapes(shapes)


def test_hints_that_contradict_the_shapes_are_refused() -> None:
    shapes = sit_shapes(CUSTOM)
    with pytest.raises(ConfigError, match="num_heads to divide the hidden size 128, got 3"):
        sit_config_from_shapes(shapes, num_heads=3)
    with pytest.raises(ConfigError, match=r"38 \(no null class\) or 37 \(with one\).*, got 36"):
        sit_config_from_shapes(shapes, num_classes=36)
    with pytest.raises(CheckpointError, match="hidden size 48 .* pass num_heads"):
        sit_config_from_shapes(sit_shapes({**CUSTOM, "hidden_size": 48}))
    assert not is_sit({"unet.out_gain": ()})
