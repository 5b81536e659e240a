"""JiT sizes: from the names and shapes of a checkpoint's tensors to constructor options.

Sizes as in Li & He, 2025 (arXiv:2511.13720).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from merge_rl.errors import CheckpointError
from merge_rl.storage.convert.contents import Said, require_axes

STARTS: Final = {12: 4, 24: 8, 32: 10}  # depth of B, L, H -> block before which class tokens join
ROTATIONS: Final = "feat_rope"  # constants that some versions store

Shapes = Mapping[str, tuple[int, ...]]


def is_jit(shapes: Shapes) -> bool:
    """Whether tensors of these names are a JiT's."""
    return {"pos_embed", "x_embedder.proj1.weight", "final_layer.linear.weight"} <= shapes.keys()


def describe_jit(shapes: Shapes, said: Said) -> tuple[dict[str, Any], dict[str, str]]:
    """(constructor options, what was assumed by option) of a JiT with these names and shapes.

    Raises CheckpointError for tensors that are no consistent JiT.
    """
    inner, channels, patch, _ = require_axes(shapes, "x_embedder.proj1.weight", 4, "JiT")
    rows, hidden = require_axes(shapes, "y_embedder.embedding_table.weight", 2, "JiT")
    head_size = require_axes(shapes, "blocks.0.attn.q_norm.weight", 1, "JiT")[0]
    gated = require_axes(shapes, "blocks.0.mlp.w12.weight", 2, "JiT")[0] // 2
    tokens = require_axes(shapes, "pos_embed", 3, "JiT")[1]
    side, depth = math.isqrt(tokens), len({n.split(".")[1] for n in shapes if n[:7] == "blocks."})
    if min(hidden, patch, head_size, tokens, gated) < 1 or side * side != tokens or rows < 2:
        raise CheckpointError(
            f"not a JiT: expected a square number of tokens and no empty tensor, found {tokens}"
        )
    ratio = next((r for r in (4.0, 3 * gated / (2 * hidden)) if _width(hidden, r) == gated), 0.0)
    context = shapes.get("in_context_posemb", (1, 0, hidden))[1]
    config = {
        "model": "jit", "input_size": side * patch, "patch_size": patch, "in_channels": channels,
        "hidden_size": hidden, "depth": depth, "num_heads": hidden // head_size,
        "mlp_ratio": ratio or (3 * gated + 1.5) / (2 * hidden), "num_classes": rows - 1,
        "bottleneck_dim": inner, "in_context_len": context,
        "in_context_start": STARTS.get(depth, depth // 3),
        "noise_scale": side * patch / 256 if side * patch > 256 else 1.0,
    }  # fmt: skip
    assumed = {}
    if depth not in STARTS and context:
        assumed["in_context_start"] = (
            f"no published depth; class tokens taken to join before block {depth // 3}"
        )
    noise = said.settings.get("noise_scale")
    if isinstance(noise, (int, float)) and 0 < noise < math.inf:
        config["noise_scale"] = float(noise)
    else:
        assumed["noise_scale"] = f"no noise scale said; taken: {config['noise_scale']:g}"
    return config, assumed


def _width(hidden: int, ratio: float) -> int:
    return int(int(hidden * ratio) * 2 / 3)
