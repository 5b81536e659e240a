"""SiT sizes: from the names and shapes of a checkpoint's tensors to constructor options, and back.

The public checkpoints store no options beside the weights, so that a network is built from what its
tensors tell (Ma et al., 2024, arXiv:2401.08740; sizes as in Peebles & Xie, 2023, arXiv:2212.09748).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from merge_rl.errors import CheckpointError, ConfigError, MergeRLError
from merge_rl.storage.convert.contents import Extracted, plain, shapes_of, state_dict
from merge_rl.storage.pickles import Record, TensorRef

SIZES: Final[Mapping[str, tuple[int, int, int]]] = {  # letter -> (depth, hidden size, heads)
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCH_SIZES: Final = (2, 4, 8)
FREQUENCIES: Final = 256  # sinusoids of the time embedding, cosines and sines together
CLASS_DROPOUT: Final = 0.1  # of the public training script; weights only tell whether it was > 0

Shapes = Mapping[str, tuple[int, ...]]


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
    kernel = _shape(shapes, "x_embedder.proj.weight", 4)
    hidden, channels, patch, _ = kernel
    tokens = _shape(shapes, "pos_embed", 3)[1]
    side = math.isqrt(tokens)
    outputs = _shape(shapes, "final_layer.linear.weight", 2)[0]
    inner = _shape(shapes, "blocks.0.mlp.fc1.weight", 2)[0]
    rows = _shape(shapes, "y_embedder.embedding_table.weight", 2)[0]
    if min(hidden, channels, patch, tokens, inner, rows) < 1 or side * side != tokens:
        raise CheckpointError(
            f"not a SiT: expected a square number of tokens and no empty tensor, found {tokens} "
            f"tokens and a patch kernel {list(kernel)}"
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


def sit_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a SiT's state dict, in the official order."""
    hidden, patch, channels = config["hidden_size"], config["patch_size"], config["in_channels"]
    rows = config["num_classes"] + (config["class_dropout_prob"] > 0)
    outputs = patch * patch * channels * (2 if config["learn_sigma"] else 1)
    inner = int(hidden * config["mlp_ratio"])
    tokens = (config["input_size"] // patch) ** 2
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, tokens, hidden)}

    def layer(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = weight[:1]

    layer("x_embedder.proj", hidden, channels, patch, patch)
    layer("t_embedder.mlp.0", hidden, FREQUENCIES)
    layer("t_embedder.mlp.2", hidden, hidden)
    shapes["y_embedder.embedding_table.weight"] = (rows, hidden)
    for i in range(config["depth"]):
        layer(f"blocks.{i}.attn.qkv", 3 * hidden, hidden)
        layer(f"blocks.{i}.attn.proj", hidden, hidden)
        layer(f"blocks.{i}.mlp.fc1", inner, hidden)
        layer(f"blocks.{i}.mlp.fc2", hidden, inner)
        layer(f"blocks.{i}.adaLN_modulation.1", 6 * hidden, hidden)
    layer("final_layer.linear", outputs, hidden)
    layer("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    return shapes


def sit_size_name(config: Mapping[str, Any]) -> str:
    """The published name of a config's size, such as "SiT-XL/2", or "custom"."""
    size = (config.get("depth"), config.get("hidden_size"), config.get("num_heads"))
    patch = config.get("patch_size")
    for letter, known in SIZES.items():
        if size == known and patch in PATCH_SIZES and config.get("mlp_ratio", 4.0) == 4.0:
            return f"SiT-{letter}/{patch}"
    return "custom"


def _shape(shapes: Shapes, name: str, ndim: int) -> tuple[int, ...]:
    shape = tuple(shapes.get(name, ()))
    if len(shape) != ndim:
        found = f"of shape {list(shape)}" if name in shapes else "missing"
        raise CheckpointError(f"not a SiT: tensor {name!r} is {found}, expected {ndim} axes")
    return shape


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
        "of attention heads: pass num_heads"
    )


def _num_classes(rows: int, hint: int | None) -> int:
    if hint is not None:
        if hint < 1 or hint not in (rows, rows - 1):
            raise ConfigError(
                f"expected num_classes {rows} (no null class) or {rows - 1} (with one) for a "
                f"label table of {rows} rows, got {hint}"
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
            f"found {have}, expected {want}"
        )


DEFAULT_BATCH: Final = 256  # images a step, in the public training
_STEP: Final = re.compile(r"(?:.*[-_.])?(\d{7,9})")
_TRACKS: Final = {"model": "raw", "ema": "ema"}


def is_training_checkpoint(data: object) -> bool:
    """Whether data is that of a training checkpoint, with state dicts as "model" or "ema"."""
    return isinstance(data, dict) and any(isinstance(data.get(key), dict) for key in _TRACKS)


def read_training_checkpoint(
    data: Mapping[str, object], path: Path, weights: str, num_heads: int | None
) -> list[Extracted]:
    """Raw weights and their EMA as tracks; "auto" takes the EMA if there is one.

    The step number in the name gives nimg = step * global batch size, which is read from the
    checkpoint's arguments and is 256 by default. The optimizer is left alone.
    """
    args = data.get("args")
    settings = args.state if isinstance(args, Record) and isinstance(args.state, dict) else {}
    held = [key for key in _TRACKS if data.get(key) is not None]
    wanted = {"auto": held[-1:], "both": held}.get(weights, [weights])
    step = _STEP.fullmatch(path.stem)
    batch = settings.get("global_batch_size", DEFAULT_BATCH)
    fits = type(batch) is int and 0 < batch < 2**30
    found = []
    for key in wanted:
        if key not in held:
            raise CheckpointError(f"{path}: holds no {key!r}, only {' and '.join(held)}")
        tensors = _without_wrapper(state_dict(data[key], f"{path}, {key}"))
        config = _config(tensors, path, num_heads, settings.get("num_classes"))
        found.append(
            Extracted(
                path=path,
                tensors=tensors,
                config=config,
                stem=path.stem,
                folder=_TRACKS[key],
                nimg=int(step[1]) * batch if step and fits else None,
                track=_TRACKS[key],
                autoencoder=_autoencoder(config),
                facts={"training": plain(settings)} if settings else {},
            )
        )
    return found


def read_bare(tensors: Mapping[str, TensorRef], path: Path, num_heads: int | None) -> Extracted:
    """Released weights: one state dict and nothing else."""
    tensors = _without_wrapper(tensors)
    config = _config(tensors, path, num_heads)
    return Extracted(
        path=path,
        tensors=tensors,
        config=config,
        stem=path.stem,
        autoencoder=_autoencoder(config),
    )


def _without_wrapper(tensors: Mapping[str, TensorRef]) -> Mapping[str, TensorRef]:
    """Names without the "module." that a wrapper for several devices adds to each."""
    if all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _autoencoder(config: Mapping[str, Any]) -> str | None:
    return "sd-vae-sit" if config["in_channels"] == 4 else None


def _config(
    tensors: Mapping[str, TensorRef], path: Path, num_heads: int | None, classes: object = None
) -> dict[str, Any]:
    known = classes if type(classes) is int else None
    try:
        return sit_config_from_shapes(shapes_of(tensors), num_heads, known)
    except MergeRLError as error:
        raise CheckpointError(f"{path}: {error}") from None
