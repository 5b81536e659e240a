"""SiT and JiT sizes: from names and shapes of tensors to constructor options, and back.

The public checkpoints store no options beside the weights, so that a network is built from what its
tensors tell (Ma et al., 2024, arXiv:2401.08740; sizes as in Peebles & Xie, 2023, arXiv:2212.09748;
JiT: Li & He, 2025, arXiv:2511.13720).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from merge_rl.core.forms import sit_forms
from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.storage.convert.contents import ELSE, Hints, Shapes, require_axes
from merge_rl.storage.convert.metadata import Said
from merge_rl.storage.pickles import TensorRef

SIZES: Final[Mapping[str, tuple[int, int, int]]] = {  # letter -> (depth, hidden size, heads)
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCH_SIZES: Final = (2, 4, 8)
T = TypeVar("T")
CLASS_DROPOUT: Final = 0.1  # of the public training script; weights only tell whether it was > 0


def is_sit(shapes: Shapes) -> bool:
    """Whether tensors of these names are a SiT's (or a DiT's, which has the same names)."""
    return {"pos_embed", "x_embedder.proj.weight", "final_layer.linear.weight"} <= shapes.keys()


def sit_config_from_shapes(
    shapes: Shapes, num_heads: int | None = None, num_classes: int | None = None
) -> dict[str, Any]:
    """Constructor options of the SiT whose state dict has these names and shapes.

    Args:
        shapes: tensor name -> shape, complete.
        num_heads: attention heads, which leave no trace in the shapes. By default those of the
            known size, else of the known size of this width, else one for every 64 or 72 channels.
        num_classes: classes without the null class; equal to the rows of the label table (no null
            class) or one less. By default the last row is the null class unless the number of rows
            is a multiple of ten: 1001 rows are 1000 classes and the null class, 10 rows are ten
            classes. The public training always adds the null class, and 10, 100 or 1000 rows are
            the common numbers of classes without it.

    Returns {"model": "sit", "input_size", "patch_size", "in_channels", "hidden_size", "depth",
    "num_heads", "mlp_ratio", "class_dropout_prob", "num_classes", "learn_sigma"}: the input size
    from the tokens of `pos_embed`, learn_sigma from the rows of `final_layer.linear`. A size that
    is none of the known ones is accepted if all tensors agree with it.

    Raises CheckpointError for tensors that are no consistent SiT, ConfigError for hints that
    contradict them.
    """
    kernel = require_axes(shapes, "x_embedder.proj.weight", 4, "SiT")
    hidden, channels, patch, _ = kernel
    tokens = require_axes(shapes, "pos_embed", 3, "SiT")[1]
    side = math.isqrt(tokens)
    outputs = require_axes(shapes, "final_layer.linear.weight", 2, "SiT")[0]
    inner = require_axes(shapes, "blocks.0.mlp.fc1.weight", 2, "SiT")[0]
    rows = require_axes(shapes, "y_embedder.embedding_table.weight", 2, "SiT")[0]
    if min(hidden, channels, patch, tokens, inner, rows) < 1 or side * side != tokens:
        raise CheckpointError(
            f"not a SiT: expected a square number of tokens and no empty tensor, found {tokens} "
            f"tokens and a patch kernel {list(kernel)}; {ELSE}"
        )
    depth = _depth(shapes)
    classes = _num_classes(rows, num_classes)
    config: dict[str, Any] = {
        "model": "sit",
        "input_size": side * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": depth,
        "num_heads": _num_heads(depth, hidden, num_heads),
        "mlp_ratio": _ratio(inner, hidden),
        "class_dropout_prob": CLASS_DROPOUT if classes < rows else 0.0,
        "num_classes": classes,
        "learn_sigma": outputs == 2 * channels * patch * patch,
    }
    _require_same(shapes, sit_shapes(config))
    return config


def describe_sit(shapes: Shapes, said: Said, hints: Hints) -> tuple[dict[str, Any], dict[str, str]]:
    """(constructor options, what was assumed by option) of a SiT.

    The user's word counts first, then the checkpoint's own, then what most networks are like:
    what neither says is told.
    """
    rows = require_axes(shapes, "y_embedder.embedding_table.weight", 2, "SiT")[0]
    classes, heads = _told_classes(rows, said, hints), hints.num_heads or said.num_heads
    config = sit_config_from_shapes(shapes, heads, classes)
    found = config["num_classes"]
    if config["class_dropout_prob"] and said.class_dropout:
        config["class_dropout_prob"] = said.class_dropout
    assumed = {}
    if classes is None:
        null = "a null class" if found < rows else "no null class"
        assumed["num_classes"] = (
            f"no number of classes said; taken: {found} and {null} for a label table of {rows} "
            "rows (--num-classes, --null-class or --no-null-class say otherwise)"
        )
    if heads is None and sit_size_name(config) == "custom":
        assumed["num_heads"] = (
            f"no attention heads said; taken: {config['num_heads']} (--num-heads says otherwise)"
        )
    return config, assumed


def _told_classes(rows: int, said: Said, hints: Hints) -> int | None:
    """The number of classes as the user or the checkpoint says it; None if neither does."""
    null = hints.null_class
    if hints.num_classes is not None:
        told = hints.num_classes
        if null is not None and told + null != rows:
            raise ConfigError(
                f"{told} classes {'and a' if null else 'without a'} null class need a label table "
                f"of {told + null} rows, found {rows}"
            )
        return told
    if null is not None:
        return rows - null
    if said.num_classes is not None or said.class_dropout is None:
        return said.num_classes
    return rows - (said.class_dropout > 0)


def sit_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a SiT's state dict, in the official order."""
    return dict(sit_forms(**{key: value for key, value in config.items() if key != "model"}))


def sit_size_name(config: Mapping[str, Any]) -> str:
    """The published name of a config's size, such as "SiT-XL/2", or "custom"."""
    size = (config.get("depth"), config.get("hidden_size"), config.get("num_heads"))
    patch = config.get("patch_size")
    for letter, known in SIZES.items():
        if size == known and patch in PATCH_SIZES and config.get("mlp_ratio", 4.0) == 4.0:
            return f"SiT-{letter}/{patch}"
    return "custom"


def _depth(shapes: Shapes) -> int:
    """Blocks 0..depth-1; a gap shows as missing tensors when all shapes are compared."""
    return len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})


def _num_heads(depth: int, hidden: int, hint: int | None) -> int:
    if hint is not None:
        if hint < 1 or hidden % hint:
            raise ConfigError(f"expected num_heads to divide the hidden size {hidden}, got {hint}")
        return hint
    same_width = {width: heads for _, width, heads in SIZES.values()}
    for known_depth, width, heads in SIZES.values():
        if (depth, hidden) == (known_depth, width):
            return heads
    if hidden in same_width:
        return same_width[hidden]
    for head_dim in (64, 72):
        if hidden % head_dim == 0:
            return hidden // head_dim
    raise CheckpointError(
        f"a SiT of hidden size {hidden} is none of the known sizes and does not tell its number "
        "of attention heads: pass num_heads (--num-heads)"
    )


def _num_classes(rows: int, hint: int | None) -> int:
    if hint is not None:
        if hint < 1 or hint not in (rows, rows - 1):
            raise ConfigError(
                f"expected num_classes {rows} (no null class) or {rows - 1} (with one) for a "
                f"label table of {rows} rows, got {hint}; --num-classes says it otherwise"
            )
        return hint
    return rows if rows == 1 or rows % 10 == 0 else rows - 1


def _ratio(inner: int, hidden: int) -> float:
    """A ratio with int(hidden * ratio) == inner; the quotient may round to just below."""
    ratio = inner / hidden
    return ratio if int(hidden * ratio) == inner else math.nextafter(ratio, math.inf)


def _require_same(found: Shapes, expected: Shapes) -> None:
    names = [*expected, *(name for name in found if name not in expected)]
    odd = [name for name in names if tuple(found.get(name, ())) != expected.get(name)]
    if odd:
        name = odd[0]
        have = list(found[name]) if name in found else "missing"
        want = list(expected[name]) if name in expected else "no such tensor"
        raise CheckpointError(
            f"not a consistent SiT: {len(odd)} tensors do not fit the others, first {name!r}: "
            f"found {have}, expected {want}; {ELSE}"
        )


def joined_blocks(tensors: Mapping[str, T]) -> dict[str, T]:
    """Blocks in one row: early REPA checkpoints count those after the projectors anew."""
    before = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    names = {}
    for name in tensors:
        first, _, rest = name.partition(".")
        number, _, last = rest.partition(".")
        again = first == "decoder_blocks" and number.isdecimal() and len(number) < 5
        names[name] = f"blocks.{before + int(number)}.{last}" if again else name
    return {names[name]: tensor for name, tensor in tensors.items()}


STARTS: Final = {12: 4, 24: 8, 32: 10}  # depth of B, L, H -> block before which class tokens join
ROTATIONS: Final = "feat_rope"  # constants that some versions store


def is_jit(shapes: Shapes) -> bool:
    """Whether tensors of these names are a JiT's."""
    return {"pos_embed", "x_embedder.proj1.weight", "final_layer.linear.weight"} <= shapes.keys()


def describe_jit(shapes: Shapes, said: Said) -> tuple[dict[str, Any], dict[str, str]]:
    """(constructor options, what was assumed by option) of a JiT with these names and shapes.

    Raises CheckpointError for tensors that are no consistent JiT, ConfigError for settings that it
    has not.
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
    nearest = said.number("t_eps")
    if nearest is not None and nearest != 0.05:
        raise ConfigError(f"trained with t_eps {nearest:g}; expected 0.05")
    noise = said.number("noise_scale")
    if noise is not None and 0 < noise < math.inf:
        config["noise_scale"] = float(noise)
    else:
        assumed["noise_scale"] = f"no noise scale said; taken: {config['noise_scale']:g}"
    return config, assumed


def require_rotations(tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> None:
    """Refuse stored angles other than those by which a JiT of this config turns its tokens.

    `freqs_cos` and `freqs_sin`: (tokens, head size), with class tokens before those of the image or
    without. The bound is on values that were rounded to bfloat16, if not computed so.
    """
    from merge_rl.core.network import rotations  # with torch, which few files need

    side = config["input_size"] // config["patch_size"]
    size = config["hidden_size"] // config["num_heads"]
    for name, tensor in tensors.items():
        last = name.rpartition(".")[2]
        if last not in ("freqs_cos", "freqs_sin"):
            continue
        others = tensor.shape[0] - side**2 if tensor.shape else -1
        fits = others in (0, config["in_context_len"]) and tensor.shape[1:] == (size,)
        if fits:
            cosines, sines = rotations(size, side, others)
            expected = cosines if last == "freqs_cos" else sines
            fits = float((tensor.load().double() - expected).abs().max()) <= 2**-7
        if not fits:
            raise CheckpointError(
                f"{name} turns tokens by other angles than a JiT of {side} x {side} tokens does"
            )


def _width(hidden: int, ratio: float) -> int:
    return int(int(hidden * ratio) * 2 / 3)
