"""From samples to images: which autoencoder a network needs, and its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import nn

from merge_rl import registry
from merge_rl.errors import CheckpointError, ConfigError, UnknownNameError
from merge_rl.interfaces import Autoencoder
from merge_rl.workflows.weights import Announce, load_weights

DEFAULT_WEIGHTS: Final = {
    "sd-vae-edm2": "stabilityai/sd-vae-ft-mse",
    "sd-vae-sit": "stabilityai/sd-vae-ft-ema",  # what SiT trains and is evaluated with
}
"""Published weights that an autoencoder fetches when none are given."""
CHANNELS: Final = {"pixel": (1, 3), "sd-vae-edm2": (4,), "sd-vae-sit": (4,)}
"""Of the samples that an autoencoder takes, known before its weights are."""


def load_autoencoder(
    name: str | None,
    weights: str | None = None,
    *,
    shape: Sequence[int],
    dtype: str = "float32",
    device: str = "cpu",
    announce: Announce = lambda _text: None,
) -> tuple[Autoencoder, str | None]:
    """What makes images of samples (C, h, w), and the SHA-256 of its weights' file.

    Args:
        name: a registered name; None means the samples themselves, if they can be images.
        weights: file, folder, or name of public weights; None for the autoencoder's default.
        shape: of one sample of the network.
        dtype: "float32" or "bfloat16", of a latent decoder.
        device: where a latent decoder goes.
        announce: hears of downloads.

    Raises ConfigError if the autoencoder does not take samples of that shape.
    """
    name = require_autoencoder(name, shape)
    source = weights or DEFAULT_WEIGHTS.get(name)
    if source is None:
        built, digest = registry.build_autoencoder(name), None
    else:
        loaded = load_weights(source, announce)
        digest = loaded.sha256
        try:
            built = registry.build_autoencoder(name, loaded.tensors, loaded.config, dtype=dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from None
    if isinstance(built, nn.Module):
        built.to(device)
    return built, digest


def default_name(shape: Sequence[int]) -> str:
    """Samples of 1 or 3 channels are images: "pixel". ConfigError for latents of unknown origin."""
    if shape[0] in (1, 3):
        return "pixel"
    known = ", ".join(name for name in registry.AUTOENCODERS if name != "pixel")
    raise ConfigError(
        f"the network's samples have {shape[0]} channels, so they are latents, not images; say "
        f"what decodes them with --autoencoder ({known})"
    )


def require_autoencoder(name: str | None, shape: Sequence[int]) -> str:
    """The name of what makes images of samples (C, h, w), before any weights are fetched.

    Raises UnknownNameError for another name, ConfigError unless it takes that many channels.
    """
    name = name or default_name(shape)
    if name not in registry.AUTOENCODERS:
        raise UnknownNameError("autoencoder", name, registry.AUTOENCODERS)
    if shape[0] not in CHANNELS[name]:
        taken = " or ".join(map(str, CHANNELS[name]))
        raise ConfigError(
            f"the autoencoder {name!r} takes samples of {taken} channels, but the network makes "
            f"{shape[0]}"
        )
    return name
