"""Networks by config, guides, autoencoders, and weights that are public."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from merge_rl import own_code, registry
from merge_rl.config import SamplerConfig
from merge_rl.core.network import Network, Undrawn
from merge_rl.core.state_dicts import Held, hold, names_for, unwrapped
from merge_rl.errors import CheckpointError, ConfigError, UnknownNameError
from merge_rl.interfaces import Autoencoder
from merge_rl.storage.checkpoints import (
    CheckpointSet,
    model_sha256,
    newest_model,
    open_checkpoints,
    open_model_file,
    require_fit,
    require_network,
    stated_config,
    unknown_config,
)
from merge_rl.storage.files import WeightStream, sha256_file
from merge_rl.storage.pickles import TensorRef, read_data
from merge_rl.workflows.assembly.published import fetch_public, is_public

T = TypeVar("T")

DEFAULT_WEIGHTS: Final = {
    "sd-vae-edm2": "stabilityai/sd-vae-ft-mse",
    "sd-vae-sit": "stabilityai/sd-vae-ft-ema",  # what SiT trains and is evaluated with
}
"""Published weights that an autoencoder fetches when none are given."""
CHANNELS: Final = {"pixel": (1, 3), "sd-vae-edm2": (4,), "sd-vae-sit": (4,)}
"""Of the samples (C, h, w) that an autoencoder takes, known before its weights are."""


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
    built = CheckedDecoder(built, name) if own_code.is_own(name) else built
    if isinstance(built, nn.Module):
        built.to(device)
    return built, digest


class CheckedDecoder(nn.Module):
    """An autoencoder of the user's whose results are checked; a network goes along as a part."""

    def __init__(self, inner: Autoencoder, name: str) -> None:
        super().__init__()
        self.inner, self.name = inner, name
        for offered in ("levels", "chunk"):
            if hasattr(inner, offered):
                setattr(self, offered, getattr(inner, offered))

    def decode(self, samples: Tensor) -> Tensor:
        """What it makes of samples (B, ...), one of each.

        Of samples (B, C, h, w) these are images (B, 1 or 3, H, W) uint8. ConfigError for others.
        """
        made: object = self.inner.decode(samples)
        count, found = len(samples), type(made).__name__
        if isinstance(made, Tensor):
            picture = made.ndim == 4 and made.shape[1] in (1, 3) and made.dtype == torch.uint8
            if made.shape[:1] == (count,) and (picture or samples.ndim != 4):
                return made
            found = f"{str(made.dtype).removeprefix('torch.')} {tuple(made.shape)}"
        raise ConfigError(
            f"the autoencoder {self.name!r} returned {found} for samples {tuple(samples.shape)}; "
            f"expected images ({count}, 1 or 3, H, W) of uint8"
        )


def default_name(shape: Sequence[int]) -> str:
    """Samples of 1 or 3 channels are images: "pixel"; what is no (C, h, w) stays as it is.

    ConfigError for latents of unknown origin.
    """
    if len(shape) != 3:
        return "samples"
    if shape[0] in (1, 3):
        return "pixel"
    known = ", ".join(name for name in registry.AUTOENCODERS if name != "pixel")
    raise ConfigError(
        f"the network's samples have {shape[0]} channels, so they are latents, not images; say "
        f"what decodes them with --autoencoder ({known})"
    )


def require_autoencoder(name: str | None, shape: Sequence[int]) -> str:
    """The name of what makes images of samples (C, h, w), before any weights are fetched.

    Raises UnknownNameError for another name, ConfigError unless it takes that many channels and
    the library that builds it is installed.
    """
    name = name or default_name(shape)
    require_known_autoencoder(name)
    if name in CHANNELS and (len(shape) != 3 or shape[0] not in CHANNELS[name]):
        taken = " or ".join(map(str, CHANNELS[name]))
        raise ConfigError(
            f"the autoencoder {name!r} takes samples of {taken} channels, but the network makes "
            f"{shape[0] if len(shape) == 3 else f'samples of shape {tuple(shape)}'}"
        )
    registry.require_library("autoencoder", name)
    return name


def require_known_autoencoder(name: str) -> None:
    """Raise UnknownNameError or ConfigError for a name that is no autoencoder's."""
    if own_code.is_own(name):
        own_code.require_readable(name, "autoencoder")
    elif name not in registry.AUTOENCODERS:
        raise UnknownNameError("autoencoder", name, registry.AUTOENCODERS)


TORCH_SUFFIXES: Final = (".pth", ".pt", ".bin", ".ckpt")
Announce = Callable[[str], None]
"""Called with a sentence before something that takes long."""


class Weights(NamedTuple):
    """Tensors by name, the config beside them if there is one, and the file's SHA-256."""

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    sha256: str


def load_weights(
    source: str, announce: Announce = lambda _text: None, *, as_stored: bool = False
) -> Weights:
    """Weights from `source`: a path, or a name of `PUBLIC_FILES` where no such path exists.

    Takes what `open_model_file` takes, and what torch.save wrote, of which data alone is read: a
    state dict, wrapped or not, or one beside others; of raw weights and their average the average,
    and `announce` hears what was left. `as_stored` wants one state dict and keeps all its names.
    Raises CheckpointError for anything else.
    """
    if is_public(source):
        fetched = fetch_public(source, announce=announce)
        return _read(fetched.path, announce, as_stored)._replace(sha256=fetched.sha256)
    return _read(Path(source), announce, as_stored)


def _read(path: Path, announce: Announce, as_stored: bool) -> Weights:
    if path.suffix.lower() in TORCH_SUFFIXES and path.is_file():
        state = (
            _state_dict(path)
            if as_stored
            else _chosen(hold(_mapping(path), TensorRef), path, announce)
        )
        tensors = {name: item.load() for name, item in state.items()}
        return Weights(tensors, None, sha256_file(path))
    file, digest = open_model_file(path), model_sha256(path)
    if as_stored:
        return Weights(file.weights, file.config, digest)
    return Weights(_chosen(hold(file.weights, Tensor), path, announce), file.config, digest)


def _state_dict(path: Path) -> dict[str, TensorRef]:
    value = _mapping(path)
    for name, item in value.items():
        if not isinstance(name, str) or not isinstance(item, TensorRef):
            found = f"{type(item).__name__} at {str(name)[:60]!r}"
            raise CheckpointError(f"{path}: expected a state dict of tensors alone, found {found}")
    return value


def _mapping(path: Path) -> dict[str, Any]:
    value = read_data(path)
    if not isinstance(value, dict) or not value:
        kind = "nothing" if value == {} else type(value).__name__
        raise CheckpointError(f"{path}: expected a state dict, found {kind}")
    return value


def _chosen(held: Held[T], path: Path, announce: Announce) -> dict[str, T]:
    """The average, or else the only state dict."""
    places = held.among(averaged=True) or held.among(averaged=False)
    if len(places) != 1:
        found = ", ".join(place or "its own tensors" for place in places) or ", ".join(held.others)
        raise CheckpointError(f"{path}: expected the state dict of one network, found {found}")
    others = [*(other for other in held.states if other != places[0]), *held.others]
    if others:
        announce(f"{path}: took {places[0] or 'its tensors'}, left {', '.join(others[:8])}")
    return held.states[places[0]]


def load_guide(sampler: SamplerConfig, device: str, beside: nn.Module) -> Network | None:
    """The weaker network that the sampler names, on a device; None without guidance.

    Weights of which nothing says what they are of are of the user's network that they stand beside.
    """
    if not sampler.guide:
        return None
    return load_network(sampler.guide, _guides_code(sampler, sampler.guide, beside)).to(device)


def _guides_code(sampler: SamplerConfig, file: str | Path, beside: nn.Module) -> str | None:
    """What the user's code that builds the guide is called; None for a family's, or its config's.

    Raises ConfigError for code that only a file names.
    """
    stated, named = stated_config(file), sampler.guide_network
    asked = named or str((stated or {}).get("model", ""))
    own_code.require_allowed(asked, "network", "--guide-network", f"the guide {sampler.guide}")
    return own_name(beside) if stated is None and named is None else named


def own_name(network: nn.Module) -> str | None:
    """What the user's code that built a network is called; None for a family's."""
    return network.__dict__.get("own_name")


def open_guide(sampler: SamplerConfig, beside: nn.Module) -> CheckpointSet:
    """The set of a guide; ConfigError for one of a single checkpoint."""
    code = _guides_code(sampler, newest_model(sampler.guide or ""), beside)
    opened = open_checkpoints(sampler.guide or "")
    with_network(opened, code)
    if len(opened) < 2:
        raise ConfigError(
            f"{sampler.guide}: expected a guide of at least 2 checkpoints to search its "
            f"coefficients, got {len(opened)}"
        )
    return opened


def with_network(checkpoints: CheckpointSet, network: str | None) -> None:
    """Let a set's network be the one that code of the user's builds, if some is named."""
    if network is not None:
        checkpoints.describe({"model": own_code.allow_network(network)})


def to_be_loaded(config: Mapping[str, Any]) -> Network:
    """The network of a config, for weights that come: those of known families are not drawn."""
    own = own_code.is_own(str(config.get("model")))
    with nullcontext() if own else Undrawn():
        return registry.build_model(config)


def load_network(path: str | Path, network: str | None = None) -> Network:
    """A network with the weights of a file or folder, float32, in evaluation mode.

    `network` names code of the user's that builds it; else the file's config says which it is.
    """
    file = open_model_file(path)
    config = file.config if network is None else {"model": own_code.allow_network(network)}
    if config is None:
        raise unknown_config(path)
    if not own_code.is_own(str(config.get("model"))):  # before it takes memory
        require_network(WeightStream.of(unwrapped(file.weights)).infos, config, str(path))
    model = to_be_loaded(config)
    names = names_for(file.weights, model.state_dict())
    weights = {name: file.weights[known] for name, known in names.items()}
    require_fit(WeightStream.of(weights).infos, model, str(path))
    model.load_state_dict(weights)
    return model.float().eval().requires_grad_(False)
