"""Networks by config, guides, autoencoders, and weights that are public."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from torch import Tensor, nn

from merge_rl import own_code, registry
from merge_rl.config import SamplerConfig
from merge_rl.core.network import Network
from merge_rl.core.state_dicts import Held, hold, unwrapped
from merge_rl.errors import CheckpointError, ConfigError, DownloadError, UnknownNameError
from merge_rl.interfaces import Autoencoder
from merge_rl.storage.checkpoints import (
    model_sha256,
    open_model_file,
    require_fit,
    require_network,
)
from merge_rl.storage.files import WeightStream, sha256_file
from merge_rl.storage.hub import Downloaded, fetch_url, pinned_file
from merge_rl.storage.pickles import TensorRef, read_data

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
    if isinstance(built, nn.Module):
        built.to(device)
    return built, digest


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


@dataclass(frozen=True, kw_only=True)
class PublicFile:
    """A file that others publish."""

    url: str  # https://..., or hf://user/repo@commit/name for a file of the Hub
    size: int  # bytes
    sha256: str | None  # None: the address names a commit, the hash is not published


PUBLIC_FILES: Final[Mapping[str, PublicFile]] = {
    # The 2015 TensorFlow graph, ported by pytorch-fid; torch-fidelity publishes the same bytes.
    "inception-2015-12-05": PublicFile(
        url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        size=95_628_359,
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "facebook/dinov2-large": PublicFile(
        url="hf://facebook/dinov2-large@47b73eefe95e8d44ec3623f8890bd894b6ea2d6c/model.safetensors",
        size=1_217_522_888,
        sha256="399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
    ),
    "stabilityai/sd-vae-ft-mse": PublicFile(
        url="hf://stabilityai/sd-vae-ft-mse@31f26fdeee1355a5c34592e401dd41e45d25a493/"
        "diffusion_pytorch_model.safetensors",
        size=334_643_276,
        sha256="a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    ),
    "stabilityai/sd-vae-ft-ema": PublicFile(
        url="hf://stabilityai/sd-vae-ft-ema@f04b2c4b98319346dad8c65879f680b1997b204a/"
        "diffusion_pytorch_model.safetensors",
        size=334_643_276,
        sha256=None,
    ),
}


def fetch_public(
    name: str,
    files: Mapping[str, PublicFile] = PUBLIC_FILES,
    *,
    announce: Callable[[str], None] = lambda _text: None,
) -> Downloaded:
    """The named file in the cache, downloaded if it is not there yet.

    A file of the Hub comes through its client, into the client's cache. `announce` is called with
    a sentence before a download. Raises UnknownNameError, DownloadError, HubError, and
    HashMismatchError for a file that is not the pinned one.
    """
    if name not in files:
        raise UnknownNameError("public weights", name, files)
    file = files[name]
    if file.url.startswith("hf://"):
        path = pinned_file(file.url, file.size, file.sha256, announce)
        digest = file.sha256 or sha256_file(path)
        return Downloaded(path=path, size=file.size, sha256=digest, resumed=0)
    target = cache_folder() / name.replace("/", "--") / file.url.rpartition("/")[2]
    present = target.is_file() and target.stat().st_size == file.size
    if present and file.sha256 is None:
        return Downloaded(path=target, size=file.size, sha256=sha256_file(target), resumed=0)
    if not present:
        announce(f"downloading {name} ({file.size / 1e6:,.0f} MB) to {target}")
    try:
        return fetch_url(file.url, target, size=file.size, sha256=file.sha256)
    except OSError as error:
        raise DownloadError(
            f"{target}: cannot be written ({error.strerror or error}); "
            "XDG_CACHE_HOME moves the folder that weights are kept in"
        ) from None


def cache_folder() -> Path:
    """Where fetched weights are kept; the folder need not exist."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: relative paths are to be ignored.
    root = Path(given) if given and Path(given).is_absolute() else Path.home() / ".cache"
    return root / "merge_rl" / "weights"


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


def is_public(source: str) -> bool:
    """Whether `source` means published weights, not a file."""
    return source in PUBLIC_FILES and not Path(source).exists()


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


def load_guide(sampler: SamplerConfig, device: str) -> Network | None:
    """The weaker network that the sampler names, on a device; None without guidance."""
    return load_network(sampler.guide).to(device) if sampler.guide else None


def load_network(path: str | Path, network: str | None = None) -> Network:
    """A network with the weights of a file or folder, float32, in evaluation mode.

    `network` names code of the user's that builds it; else the file's config says which it is.
    """
    file = open_model_file(path)
    config = file.config if network is None else {"model": own_code.allow(network)}
    if config is None:
        raise CheckpointError(
            f"{path}: the model config is not known; expected a config.json, or --network"
        )
    weights = unwrapped(file.weights)
    infos = WeightStream.of(weights).infos
    if not own_code.is_own(str(config.get("model"))):  # before it takes memory
        require_network(infos, config, str(path))
    model = registry.build_model(config)
    require_fit(infos, model, str(path))
    model.load_state_dict(weights)
    return model.float().eval().requires_grad_(False)
