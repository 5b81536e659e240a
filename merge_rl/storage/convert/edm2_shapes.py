"""EDM2 networks by the names and shapes of their tensors (Karras et al., 2024, arXiv:2312.02696).

What leaves no trace in the shapes is taken as in the published networks: 64 channels an attention
head, the data's standard deviation 0.5, all balances 0.3 and 0.5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

from merge_rl.errors import CheckpointError
from merge_rl.storage.convert.contents import Shapes

ASSUMED: Final = "attention heads of 64 channels, sigma_data 0.5 and the published balances"
_HEAD: Final = 64
DEFAULTS: Final[Mapping[str, Any]] = {  # of options that a config leaves out
    "use_fp16": True,
    "sigma_data": 0.5,
    "logvar_channels": 128,
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "channel_mult_noise": None,
    "channel_mult_emb": None,
    "num_blocks": 3,
    "attn_resolutions": [16, 8],
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "resample_filter": [1, 1],
    "channels_per_head": 64,
    "dropout": 0.0,
    "res_balance": 0.3,
    "attn_balance": 0.3,
    "clip_act": 256.0,
}
_FIRST: Final = re.compile(r"unet\.enc\.(\d{1,5})x\1_conv\.weight")
_BLOCK: Final = re.compile(r"unet\.enc\.(\d{1,5})x\1_block(\d{1,4})\.(\w+)\.weight")


def is_edm2(shapes: Shapes) -> bool:
    """Whether tensors of these names are an EDM2 network's."""
    return {"unet.out_conv.weight", "unet.emb_noise.weight", "logvar_linear.weight"} <= set(shapes)


def edm2_config_from_shapes(shapes: Shapes) -> dict[str, Any]:
    """{"model": "edm2", ...} of the network whose state dict has these names and shapes.

    Raises CheckpointError for tensors that are no EDM2 network, or whose attention cannot have
    heads of 64 channels.
    """
    found = _sizes(shapes)
    widths = {shape[1] for name, shape in shapes.items() if name.endswith(".attn_qkv.weight")}
    if not widths:
        # The lowest level always asks for attention; only too narrow a network goes without.
        found["channels_per_head"] = 2 * found["model_channels"] * max(found["channel_mult"])
    elif min(widths) < _HEAD or any(width % _HEAD for width in widths):
        raise CheckpointError(
            f"the tensors do not tell how many heads the attention over {min(widths)} channels"
            " has: convert a network snapshot (.pkl) of the same training along with it"
        )
    return found


def _sizes(shapes: Shapes) -> dict[str, Any]:
    first = [match for match in map(_FIRST.fullmatch, shapes) if match]
    blocks = [match for match in map(_BLOCK.fullmatch, shapes) if match]
    width = {int(m[1]): _axis(shapes, m[0], 0) for m in blocks if m[3] == "conv_res0"}
    if len(first) != 1 or not width:
        raise CheckpointError(
            "not an EDM2 network: expected one first convolution and the blocks of an encoder,"
            f" found {len(first)} and {len(width)} of them"
        )
    levels = sorted(width, reverse=True)
    unit = math.gcd(*width.values())
    noise = _axis(shapes, "unet.emb_fourier.freqs", 0)
    embedding = _axis(shapes, "unet.emb_noise.weight", 0)
    if noise % unit or embedding % unit:
        raise CheckpointError("not an EDM2 network: its widths have no common channel count")
    mult = [width[level] // unit for level in levels]
    return {
        "model": "edm2",
        "img_resolution": int(first[0][1]),
        "img_channels": _axis(shapes, "unet.out_conv.weight", 0),
        "label_dim": _axis(shapes, "unet.emb_label.weight", 1, absent=0),
        "logvar_channels": _axis(shapes, "logvar_fourier.freqs", 0),
        "model_channels": unit,
        "channel_mult": mult,
        **_unless(mult[0], channel_mult_noise=noise // unit),
        **_unless(max(mult), channel_mult_emb=embedding // unit),
        "num_blocks": 1 + max(int(m[2]) for m in blocks),
        "attn_resolutions": sorted({int(m[1]) for m in blocks if m[3] == "attn_qkv"}, reverse=True),
    }


def _axis(shapes: Shapes, name: str, axis: int, absent: int | None = None) -> int:
    shape = shapes.get(name)
    if shape is None and absent is not None:
        return absent
    if shape is None or len(shape) <= axis or shape[axis] < 1:
        found = "missing" if shape is None else f"of shape {list(shape)}"
        raise CheckpointError(f"not an EDM2 network: tensor {name} is {found}")
    return shape[axis]


def _unless(default: int, **option: int) -> dict[str, int]:
    """The option where it differs from what the network would take for itself."""
    return {key: value for key, value in option.items() if value != default}
