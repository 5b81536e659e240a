"""What is known of networks without building them is what the built ones have."""

from __future__ import annotations

import random
from typing import Any

import pytest

from merge_rl.core.forms import network_constants, network_shapes
from merge_rl.errors import MergeRLError
from merge_rl.registry import build_on_meta
from merge_rl.storage.checkpoints.plan import carried_names, fixed_names

EDM2: dict[str, Any] = {
    "model": "edm2", "img_resolution": 16, "img_channels": 3, "label_dim": 10,
    "model_channels": 8, "channel_mult": [1, 3], "num_blocks": 2, "attn_resolutions": [8],
    "channels_per_head": 8,
}  # fmt: skip
SIT: dict[str, Any] = {
    "model": "sit",
    "input_size": 8,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 3,
}


def built(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    state = build_on_meta(config).state_dict()
    assert all(tensor.is_floating_point() for tensor in state.values())
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize(
    "config",
    [
        {"model": "edm2", "img_resolution": 64, "img_channels": 4, "label_dim": 1000},
        EDM2,
        {**EDM2, "label_dim": 0, "channel_mult_noise": 2, "channel_mult_emb": 5},
        {**EDM2, "channels_per_head": 64, "use_fp16": False, "dropout": 0.1, "clip_act": 1e3},
        {
            **EDM2,
            "use_fp16": False,
            "sigma_data": 0.4,
            "label_balance": 0.5,
            "concat_balance": 0.5,
            "resample_filter": [1, 2],
            "dropout": 0.1,
            "res_balance": 0.3,
            "attn_balance": 0.3,
            "clip_act": 1e3,
        },
        {**EDM2, "attn_resolutions": [], "logvar_channels": 7, "channel_mult": [2]},
        {"model": "sit"},
        SIT,
        {**SIT, "class_dropout_prob": 0, "learn_sigma": False, "mlp_ratio": 2.5, "patch_size": 4},
    ],
)
def test_shapes_are_those_of_the_network(config: dict[str, Any]) -> None:
    assert network_shapes(config, 10_000) == built(config)
    model = build_on_meta(config)
    found = network_constants(config, built(config))
    assert found == (carried_names(model), fixed_names(model))
    assert network_constants(config, {**built(config), "other": (1,)}) is None


@pytest.mark.parametrize("seed", range(20))
def test_shapes_of_networks_drawn_at_random(seed: int) -> None:
    draw = random.Random(seed)
    levels = draw.randint(1, 3)
    config = {
        **EDM2,
        "img_resolution": 8 * 2**levels,
        "img_channels": draw.randint(1, 4),
        "label_dim": draw.choice([0, 1, 7]),
        "model_channels": draw.choice([4, 6, 8]),
        "channel_mult": [draw.randint(1, 4) for _ in range(levels)],
        "num_blocks": draw.randint(1, 3),
        "attn_resolutions": draw.sample([8, 16, 32], draw.randint(0, 3)),
        "channels_per_head": draw.choice([4, 8, 16]),
    }
    assert network_shapes(config, 10_000) == built(config)


@pytest.mark.parametrize(
    "odd",
    [
        {**EDM2, "depth": 3},
        {**EDM2, "model_channels": 8.0},
        {**EDM2, "num_blocks": "2"},
        {**EDM2, "img_channels": 0},
        {**EDM2, "channel_mult": []},
        {**SIT, "hidden_size": 22},
        {**SIT, "patch_size": 3},
        {**SIT, "patch_size": 0},
        {**SIT, "heads": 3},
        {"model": "sit2"},
        {},
    ],
)
def test_nothing_is_said_of_what_the_network_may_not_take(odd: dict[str, Any]) -> None:
    assert network_shapes(odd, 10_000) is None


@pytest.mark.parametrize("odd", [{**EDM2, "depth": 3}, {**SIT, "hidden_size": 22}])
def test_what_is_not_said_here_the_network_refuses(odd: dict[str, Any]) -> None:
    with pytest.raises(MergeRLError):
        build_on_meta(odd)


@pytest.mark.parametrize("depth", [10**9, 10**30])
def test_no_more_shapes_are_made_than_can_matter(depth: int) -> None:
    assert len(network_shapes({"model": "sit", "depth": depth}, 40) or {}) == 41
