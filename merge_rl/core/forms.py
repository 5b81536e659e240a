"""Names and shapes of our networks' tensors, from a config alone, without torch.

What the networks themselves say is what counts; where this says nothing, they are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]

FREQUENCIES: Final = 256  # sinusoids of a SiT's time embedding, cosines and sines together
_NUMBERS: Final = (int, float, type(None))
# Options of an EDM2 that leave no trace in its tensors.
_SHAPELESS: Final = {
    "use_fp16", "sigma_data", "label_balance", "concat_balance", "resample_filter", "dropout",
    "res_balance", "attn_balance", "clip_act",
}  # fmt: skip


def network_shapes(config: Mapping[str, Any], most: int) -> dict[str, Shape] | None:
    """Name -> shape of the tensors of the network that `config` describes; all are floating.

    Of a network with more than `most` tensors no more than one beyond them: a config from anywhere
    may describe billions. None where that is not known here: another network, options that it may
    not take.
    """
    options = dict(config)
    family = _FAMILIES.get(str(options.pop("model", None)))
    if family is None or not all(_plain(value) for value in options.values()):
        return None
    try:
        found = dict(islice(family(**options), most + 1))
    except (TypeError, ValueError, IndexError, ArithmeticError):
        return None
    sizes = [size for shape in found.values() for size in shape]
    return found if all(type(size) is int and size >= 1 for size in sizes) else None


def network_constants(
    config: Mapping[str, Any] | None, shapes: Mapping[str, Shape]
) -> tuple[set[str], tuple[str, ...]] | None:
    """(what a merge carries, what all checkpoints of a run share) of the network of `config`.

    None unless `shapes` are those of a network that is known here.
    """
    if config is None or network_shapes(config, len(shapes)) != dict(shapes):
        return None
    if config["model"] == "edm2":
        return {name for name in shapes if name.endswith((".freqs", ".phases"))}, ()
    return {"pos_embed"}, ("pos_embed",)


def _plain(value: object) -> bool:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(part, _NUMBERS) for part in parts)


def _edm2(
    *,
    img_resolution: int,
    img_channels: int,
    label_dim: int,
    logvar_channels: int = 128,
    model_channels: int = 192,
    channel_mult: Sequence[int] = (1, 2, 3, 4),
    channel_mult_noise: int | None = None,
    channel_mult_emb: int | None = None,
    num_blocks: int = 3,
    attn_resolutions: Sequence[int] = (16, 8),
    channels_per_head: int = 64,
    **others: object,
) -> Named:
    """The U-Net of merge_rl.models.edm2, its loss head included."""
    if not others.keys() <= _SHAPELESS:
        raise TypeError("an option that the network does not have")
    widths = [model_channels * factor for factor in channel_mult]
    noise = model_channels * (channel_mult_noise or channel_mult[0])
    emb = model_channels * (channel_mult_emb or max(channel_mult))
    yield "unet.out_gain", ()
    yield from _waves("unet.emb_fourier", noise)
    yield "unet.emb_noise.weight", (emb, noise)
    if label_dim:
        yield "unet.emb_label.weight", (emb, label_dim)
    levels = [(img_resolution >> i, width) for i, width in enumerate(widths)]
    first = f"unet.enc.{img_resolution}x{img_resolution}_conv"
    yield f"{first}.weight", (widths[0], img_channels + 1, 3, 3)
    for name, inputs, outputs, attends in _blocks(levels, num_blocks, attn_resolutions):
        heads = outputs // channels_per_head if attends else 0
        yield from _block(f"unet.{name}", inputs, outputs, emb, heads)
    yield "unet.out_conv.weight", (img_channels, widths[0], 3, 3)
    yield from _waves("logvar_fourier", logvar_channels)
    yield "logvar_linear.weight", (1, logvar_channels)


def _blocks(
    levels: Sequence[tuple[int, int]], num_blocks: int, attn_resolutions: Sequence[int]
) -> Iterator[tuple[str, int, int, bool]]:
    """Name, channels in and out, and whether there is attention, encoder first."""
    width = levels[0][1]
    skips = [width]
    for i, (res, own) in enumerate(levels):
        place, attends = f"enc.{res}x{res}", res in attn_resolutions
        if i:
            yield f"{place}_down", width, width, False
            skips.append(width)
        for k in range(num_blocks):
            yield f"{place}_block{k}", width, own, attends
            width = own
            skips.append(width)
    for i, (res, own) in reversed(list(enumerate(levels))):
        place, attends = f"dec.{res}x{res}", res in attn_resolutions
        if i == len(levels) - 1:  # in0 has attention at every resolution
            yield f"{place}_in0", width, width, True
            yield f"{place}_in1", width, width, False
        else:
            yield f"{place}_up", width, width, False
        for k in range(num_blocks + 1):
            yield f"{place}_block{k}", width + skips.pop(), own, attends
            width = own


def _block(name: str, inputs: int, outputs: int, emb: int, heads: int) -> Named:
    branch = inputs if ".dec." in name else outputs
    yield f"{name}.emb_gain", ()
    yield f"{name}.conv_res0.weight", (outputs, branch, 3, 3)
    yield f"{name}.emb_linear.weight", (outputs, emb)
    yield f"{name}.conv_res1.weight", (outputs, outputs, 3, 3)
    if inputs != outputs:
        yield f"{name}.conv_skip.weight", (outputs, inputs, 1, 1)
    if heads:
        yield f"{name}.attn_qkv.weight", (3 * outputs, outputs, 1, 1)
        yield f"{name}.attn_proj.weight", (outputs, outputs, 1, 1)


def _waves(name: str, channels: int) -> Named:
    yield f"{name}.freqs", (channels,)
    yield f"{name}.phases", (channels,)


def sit_forms(
    *,
    input_size: int = 32,
    patch_size: int = 2,
    in_channels: int = 4,
    hidden_size: int = 1152,
    depth: int = 28,
    num_heads: int = 16,
    mlp_ratio: float = 4.0,
    class_dropout_prob: float = 0.1,
    num_classes: int = 1000,
    learn_sigma: bool = True,
) -> Named:
    """The transformer of SiT, DiT and REPA; ValueError for sizes that do not divide."""
    if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
        raise ValueError("sizes that do not divide as they must")
    outputs, inner = (2 if learn_sigma else 1) * in_channels, int(hidden_size * mlp_ratio)
    yield "pos_embed", (1, (input_size // patch_size) ** 2, hidden_size)
    yield "x_embedder.proj.weight", (hidden_size, in_channels, patch_size, patch_size)
    yield "x_embedder.proj.bias", (hidden_size,)
    yield from _linear("t_embedder.mlp.0", FREQUENCIES, hidden_size)
    yield from _linear("t_embedder.mlp.2", hidden_size, hidden_size)
    rows = num_classes + (class_dropout_prob > 0)
    yield "y_embedder.embedding_table.weight", (rows, hidden_size)
    for i in range(depth):
        yield from _linear(f"blocks.{i}.attn.qkv", hidden_size, 3 * hidden_size)
        yield from _linear(f"blocks.{i}.attn.proj", hidden_size, hidden_size)
        yield from _linear(f"blocks.{i}.mlp.fc1", hidden_size, inner)
        yield from _linear(f"blocks.{i}.mlp.fc2", inner, hidden_size)
        yield from _linear(f"blocks.{i}.adaLN_modulation.1", hidden_size, 6 * hidden_size)
    yield from _linear("final_layer.linear", hidden_size, patch_size**2 * outputs)
    yield from _linear("final_layer.adaLN_modulation.1", hidden_size, 2 * hidden_size)


def _linear(name: str, inputs: int, outputs: int) -> Named:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


_FAMILIES: Final[Mapping[str, Callable[..., Named]]] = {
    "edm2": _edm2, **dict.fromkeys(("sit", "dit", "repa"), sit_forms),
}  # fmt: skip
