"""EDM2's own files: network snapshots (.pkl) and training states (.pt), as data.

A snapshot holds the network as nested module objects; the names of its tensors come from walking
their parameters, buffers and submodules in order. A training state holds state dicts: the raw
network and one EMA a width. Options that no file says follow from names and shapes of the tensors
(Karras et al., 2024, arXiv:2312.02696); what leaves no trace in them is as in the published
networks: 64 channels an attention head, sigma_data 0.5, all balances 0.3 and 0.5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from merge_rl.core.state_dicts import unwrapped
from merge_rl.errors import CheckpointError
from merge_rl.storage.checkpoints import MAX_EMA_STD, is_ema_std, parse_stem
from merge_rl.storage.convert.contents import (
    MAX_TENSORS,
    Extracted,
    Shapes,
    plain,
    state_dict,
)
from merge_rl.storage.pickles import (
    Record,
    is_module,
    kind_of,
    shown,
    tensors_of_module,
)

ASSUMED: Final = "attention heads of 64 channels, sigma_data 0.5 and the published balances"
_HEAD: Final = 64
DEFAULTS: Final[Mapping[str, Any]] = {  # of options that a config leaves out
    "use_fp16": True, "sigma_data": 0.5, "logvar_channels": 128, "model_channels": 192,
    "channel_mult": [1, 2, 3, 4], "channel_mult_noise": None, "channel_mult_emb": None,
    "num_blocks": 3, "attn_resolutions": [16, 8], "label_balance": 0.5, "concat_balance": 0.5,
    "resample_filter": [1, 1], "channels_per_head": 64, "dropout": 0.0, "res_balance": 0.3,
    "attn_balance": 0.3, "clip_act": 256.0,
}  # fmt: skip
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


_NETWORK: Final = "persistent:Precond"
_THOUSANDS: Final = re.compile(r"(?:network-snapshot|training-state)-([0-9]{6})")
_REQUIRED: Final = ("img_resolution", "img_channels", "label_dim")
OPTIONS: Final = (*_REQUIRED, *DEFAULTS)
_ATTRIBUTES: Final = (*_REQUIRED, "use_fp16", "sigma_data")

MAX_COUNT: Final = 2**20  # of channels, classes and so on

# Statistics of the VAE's latents as the official encoder takes them: scale = 0.5 / std.
_VAE_SCALE: Final = tuple(0.5 / std for std in (4.17, 4.62, 3.71, 3.28))
_VAE_BIAS: Final = tuple(
    -mean * scale for mean, scale in zip((5.81, 3.25, 0.12, -2.15), _VAE_SCALE, strict=True)
)


def is_snapshot(data: object) -> bool:
    """Whether data is that of a network snapshot."""
    network = data.get("ema") if isinstance(data, dict) else None
    return isinstance(network, Record) and network.kind == _NETWORK


def is_training_state(data: object) -> bool:
    """Whether data is that of a training state."""
    ema = data.get("ema") if isinstance(data, dict) and "net" in data else None
    return isinstance(ema, dict) and ("stds" in ema or "emas" in ema)


def read_snapshot(data: Mapping[str, object], path: Path) -> Extracted:
    """The EMA network of a snapshot; nimg and ema_std from the file's name."""
    network = data["ema"]
    if not isinstance(network, Record):
        raise CheckpointError(f"{path}: expected an EDM2 network, found {kind_of(network)}")
    tensors = state_dict(tensors_of_module(network, path, MAX_TENSORS), str(path))
    config = _config(network, path)
    nimg, ema_std = parse_stem(path.stem)
    encoder = _encoder(data.get("encoder"))
    official = encoder["kind"] == "vae" and _is_official(encoder)
    return Extracted(
        path=path,
        tensors=tensors,
        config=config,
        stem=path.stem,
        nimg=nimg,
        ema_std=ema_std,
        track=None if ema_std is None else f"ema-{ema_std:.3f}",
        autoencoder="sd-vae-edm2" if official else None,
        facts={"encoder": encoder, "dataset": plain(data.get("dataset_kwargs"))},
    )


def without_modules(data: Mapping[str, object], path: Path) -> dict[str, object] | None:
    """Data with the tensors of networks in their place, be these of any class; None without one.

    The programs before EDM2's, as EDM's, pickle networks with their source, too.
    """
    found = {
        key: tensors_of_module(value, path, MAX_TENSORS)
        for key, value in data.items()
        if is_module(value)
    }
    return {**data, **found} if found else None


def images_named(stem: str) -> int | None:
    """The images that the name of EDM's files counts in thousands: `network-snapshot-000200`."""
    found = _THOUSANDS.fullmatch(stem)
    return 1000 * int(found[1]) if found else None


def read_training_state(data: Mapping[str, object], path: Path, weights: str) -> list[Extracted]:
    """The raw network and one EMA a width, as `weights` chooses: "model", "ema", or both."""
    ema, progress = data["ema"], data.get("state")
    named, _ = parse_stem(path.stem)
    seen = progress.get("cur_nimg") if isinstance(progress, dict) else None
    nimg = seen if type(seen) is int and 0 <= seen < 2**60 else named
    states: list[tuple[float | None, object]] = [(None, data["net"])] if weights != "ema" else []
    if weights != "model":
        states += _profiles(ema, path)
    found = []
    for ema_std, state in states:
        track = "raw" if ema_std is None else f"ema-{ema_std:.3f}"
        found.append(
            Extracted(
                path=path,
                tensors=unwrapped(state_dict(state, f"{path}, {track}")),
                config=None,
                stem=path.stem if ema_std is None else f"{path.stem}-{ema_std:.3f}",
                folder=track,
                nimg=nimg,
                ema_std=ema_std,
                track=track,
            )
        )
    return found


def _config(network: Record, path: Path) -> dict[str, Any]:
    """Constructor options: as they were passed, completed by the network's own attributes."""
    state = network.state if isinstance(network.state, dict) else {}
    passed = state.get("_init_kwargs")
    if not isinstance(passed, dict) or state.get("_init_args", ()) != ():
        raise CheckpointError(f"{path}: the network does not say with which options it was made")
    options = {key: state[key] for key in _ATTRIBUTES if key in state} | passed
    config: dict[str, Any] = {"model": "edm2"}
    for key, value in options.items():
        if key not in OPTIONS:
            what = shown(key) if isinstance(key, str) else kind_of(key)
            raise CheckpointError(f"{path}: EDM2's network has no option {what}")
        config[key] = _option(key, value, path)
    return config


def _option(key: str, value: object, path: Path) -> Any:
    """The value if it is of the kind of the option's default, which is None or 0 for counts."""
    default = DEFAULTS.get(key, 0)
    if isinstance(default, list):
        fits = isinstance(value, (list, tuple)) and len(value) <= 64 and all(map(_is_real, value))
    elif isinstance(default, bool):
        fits = isinstance(value, bool)
    elif isinstance(default, float):
        fits = _is_real(value)
    else:
        fits = (value is None and default is None) or (
            type(value) is int and 0 <= value <= MAX_COUNT
        )
    if not fits:
        raise CheckpointError(f"{path}: the network's option {key} is {kind_of(value)}")
    return list(value) if isinstance(value, (list, tuple)) else value


def _is_real(value: object) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _encoder(value: object) -> dict[str, Any]:
    """What turns images into samples: {"kind": "vae", ...}, {"kind": "rgb"} or another class."""
    state = value.state if isinstance(value, Record) and isinstance(value.state, dict) else {}
    kind = value.kind.removeprefix("persistent:") if isinstance(value, Record) else None
    if kind in (None, "StandardRGBEncoder"):  # files without one are of pixels
        return {"kind": "rgb"}
    if kind != "StabilityVAEEncoder":
        return {"kind": "other", "class_name": shown(kind)}
    rows = {key: state.get(key) for key in ("scale", "bias")}
    numbers = {
        key: [float(item) for item in row.ravel()[:64]]
        for key, row in rows.items()
        if isinstance(row, np.ndarray) and row.dtype.kind == "f" and bool(np.isfinite(row).all())
    }
    return {"kind": "vae", "vae_name": plain(state.get("vae_name")), **numbers}


def _is_official(encoder: Mapping[str, Any]) -> bool:
    """Whether an encoder's constants are those of the published networks, to float32."""
    pairs = (("scale", _VAE_SCALE), ("bias", _VAE_BIAS))
    return all(
        len(encoder.get(key, ())) == len(known)
        and all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(encoder[key], known, strict=True))
        for key, known in pairs
    )


def _profiles(ema: object, path: Path) -> list[tuple[float | None, object]]:
    """(width, state dict) of every tracked EMA."""
    stds, states = (ema.get(key) for key in ("stds", "emas")) if isinstance(ema, dict) else ((), ())
    if not isinstance(stds, (list, tuple)) or not isinstance(states, (list, tuple)):
        raise CheckpointError(f"{path}: expected a list of EMA widths and one of weights")
    widths = [std for std in stds if isinstance(std, float) and is_ema_std(std)]
    if not widths or not len(widths) == len(stds) == len(states) == len(set(widths)):
        raise CheckpointError(
            f"{path}: expected an EMA for every width below {MAX_EMA_STD}, found {len(states)}"
            f" EMAs for {len(stds)} widths"
        )
    return list(zip(widths, states, strict=True))
