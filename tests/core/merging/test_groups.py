"""Groups that follow the network."""

from __future__ import annotations

import pytest
import torch

from merge_rl.core.merging.groups import assign_groups, blocks, grouping, module_lists, stages
from merge_rl.errors import UnknownNameError
from merge_rl.registry import build_model


def transformer(depth: int) -> tuple[str, ...]:
    """Names such as SiT has them."""
    inner = [f"blocks.{i}.{part}.weight" for i in range(depth) for part in ("attn.qkv", "mlp.fc1")]
    return ("x_embedder.proj.weight", *inner, "final_layer.linear.weight")


def members(names: tuple[str, ...], patterns: dict[str, str]) -> dict[str, list[str]]:
    groups = assign_groups(names, patterns)
    return {
        group: [name for name, at in zip(names, groups.index, strict=True) if at == i]
        for i, group in enumerate(groups.names)
    }


def test_thirds_of_a_transformer() -> None:
    names = transformer(28)
    found = members(names, stages(names))
    assert list(found) == ["blocks 0-8", "blocks 9-17", "blocks 18-27", "final layer", "rest"]
    assert [len(part) for part in found.values()] == [18, 18, 20, 1, 1]
    # 1 is not taken for 10 to 19.
    assert "blocks.1.mlp.fc1.weight" in found["blocks 0-8"]
    assert "blocks.10.mlp.fc1.weight" in found["blocks 9-17"]


def test_a_transformer_with_few_blocks() -> None:
    assert list(stages(transformer(2))) == ["block 0", "block 1", "final layer"]
    assert list(stages(transformer(3)[:-1])) == ["block 0", "block 1", "block 2"]


def test_levels_of_a_u_net_in_the_order_of_the_network() -> None:
    names = tuple(
        f"unet.{side}.{size}x{size}_block0.conv_res0.weight"
        for side in ("enc", "dec") for size in (64, 8, 16)
    )  # fmt: skip
    found = members((*names, "unet.mid.weight"), stages(names))
    assert list(found) == [
        "enc 64x64", "enc 16x16", "enc 8x8", "dec 8x8", "dec 16x16", "dec 64x64", "rest",
    ]  # fmt: skip
    assert found["dec 8x8"] == ["unet.dec.8x8_block0.conv_res0.weight"]


def test_stages_of_the_networks_here() -> None:
    edm2 = {
        "model": "edm2", "img_resolution": 8, "img_channels": 1, "label_dim": 10,
        "model_channels": 12, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4],
        "channels_per_head": 12,
    }  # fmt: skip
    sit = {
        "model": "sit", "input_size": 8, "in_channels": 1, "hidden_size": 24, "depth": 4,
        "num_heads": 2, "num_classes": 10,
    }  # fmt: skip
    found = {}
    for config in (edm2, sit):
        with torch.device("meta"):
            names = tuple(name for name, _ in build_model(config).named_parameters())
        found[config["model"]] = members(names, stages(names))
    levels = ["enc 8x8", "enc 4x4", "dec 4x4", "dec 8x8"]
    assert list(found["edm2"]) == [*levels, "embeddings", "output"]
    # What trains the uncertainty head is no part of an image, and gets no coefficients of its own.
    assert found["edm2"]["embeddings"] == [
        "unet.emb_noise.weight", "unet.emb_label.weight", "logvar_linear.weight",
    ]  # fmt: skip
    assert sorted(found["edm2"]["output"]) == ["unet.out_conv.weight", "unet.out_gain"]
    assert not any("emb_" in name and "unet.emb_" not in name for name in found["edm2"]["output"])
    assert list(found["sit"]) == ["block 0", "block 1", "blocks 2-3", "final layer", "rest"]
    assert all(".blocks." not in f".{name}" for name in found["sit"]["rest"])


def test_blocks() -> None:
    names = transformer(11)
    found = members(names, blocks(names))
    assert list(found) == [*(f"block blocks.{i}" for i in range(11)), "rest"]
    u_net = ("unet.enc.8x8_conv.weight", "unet.enc.8x8_block0.emb_gain", "unet.out_gain")
    assert list(members(u_net, blocks(u_net))) == [
        "block enc.8x8_conv", "block enc.8x8_block0", "output",
    ]  # fmt: skip


def test_other_networks_have_one_group() -> None:
    names = ("layer1.weight", "layer2.weight")
    assert stages(names) == blocks(names) == grouping("one", transformer(3)) == {}


def test_single_tensors() -> None:
    names = transformer(1)
    assert members(names, grouping("tensors", names)) == {f"tensor {n}": [n] for n in names}


def test_an_unknown_grouping() -> None:
    with pytest.raises(UnknownNameError, match="unknown grouping 'layers'"):
        grouping("layers", ())


def test_lists_of_modules_of_any_network() -> None:
    names = (
        "a.0.w",
        "layers.0.attn.0.w",
        "layers.0.attn.1.w",
        "layers.3.w",
        "b.5.c.0.w",
        "b.5.c.1.w",
    )
    # Of "a" there is one element alone, and of "b" too: its inner list counts.
    assert module_lists(names) == {"layers": [0, 3], "b.5.c": [0, 1]}
    assert module_lists(("emb.weight", "out.bias")) == {}


def test_stages_of_a_network_of_one_list() -> None:
    inner = [f"net.layers.{i}.weight" for i in range(7)]
    names = ("emb.weight", *inner, "norm.weight", "head.0.weight")
    found = members(names, stages(names))
    assert found == {
        "net.layers 0-1": inner[:2], "net.layers 2-3": inner[2:4], "net.layers 4-6": inner[4:],
        "final layers": ["norm.weight", "head.0.weight"], "rest": ["emb.weight"],
    }  # fmt: skip
    assert list(members(names, blocks(names))) == [
        *(f"block net.layers.{i}" for i in range(7)),
        "rest",
    ]


def test_stages_of_a_plain_sequence() -> None:
    names = tuple(f"{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias"))
    assert list(members(names, stages(names))) == ["layer 0", "layer 2", "layer 4"]
    assert list(members(names, blocks(names))) == ["block 0", "block 2", "block 4"]


def test_stages_of_a_u_net_of_lists() -> None:
    names = tuple(
        f"{side}_blocks.{i}.resnets.{j}.conv.weight"
        for side in ("down", "up") for i in range(3) for j in range(2)
    )  # fmt: skip
    found = members(
        ("conv_in.weight", *names, "conv_out.weight"),
        stages(("conv_in.weight", *names, "conv_out.weight")),
    )
    levels = [f"{side}_blocks {i}" for side in ("down", "up") for i in range(3)]
    assert list(found) == [*levels, "final layers", "rest"]
    assert found["up_blocks 1"] == [
        "up_blocks.1.resnets.0.conv.weight",
        "up_blocks.1.resnets.1.conv.weight",
    ]


def test_a_network_without_lists_is_one_group() -> None:
    assert stages(("a.weight", "b.weight")) == blocks(("a.weight", "b.weight")) == {}
