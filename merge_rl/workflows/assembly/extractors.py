"""Feature extractors by name, or from a module of the user's."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from merge_rl import own_code, registry
from merge_rl.config import FinetuneConfig, OptimizeConfig
from merge_rl.errors import CheckpointError, ConfigError, UnknownNameError
from merge_rl.interfaces import FeatureExtractor
from merge_rl.storage.hub import local_model
from merge_rl.workflows.assembly.networks import Announce, load_weights
from merge_rl.workflows.rollout import require_device

DEFAULT_WEIGHTS: Final = {
    "inception": "inception-2015-12-05",
    "inception-tf1": "inception-2015-12-05",
    "inception-clean": "inception-2015-12-05",
    "dinov2": "facebook/dinov2-large",
    "dinov2-dgm": "facebook/dinov2-large",
    "efficientnet-lite0": "efficientnet-lite0",
}
"""Published weights that an extractor fetches when none are given."""
REPOSITORIES: Final = {
    "convnextv2": "facebook/convnextv2-base-22k-224",
    "mae": "facebook/vit-mae-large",
    "siglip": "google/siglip-base-patch16-224",
    "clip": "openai/clip-vit-large-patch14",
    "dinov3": "facebook/dinov3-vitl16-pretrain-lvd1689m",
}
"""Repositories of the Hub whose newest weights are these extractors'; the hash is recorded."""
DIMS: Final = {
    "digits": 64,
    "inception": 2048,
    "inception-tf1": 2048,
    "inception-clean": 2048,
    "dinov2": 1024,
    "dinov2-dgm": 1024,
    "efficientnet-lite0": 1280,
    "convnextv2": 1024,
    "mae": 1024,
    "siglip": 768,
    "clip": 768,
    "dinov3": 1024,
}
"""Features an image of the registered extractors, known before their weights are."""


def build_extractor(
    name: str,
    weights: str | None,
    device: str = "cpu",
    announce: Announce = lambda _text: None,
) -> tuple[FeatureExtractor, str | None]:
    """The named extractor on a device, and the SHA-256 of its weights' file.

    Args:
        name: a registered name, or "package.module:factory", or several with commas between
            ("inception,dinov2": their features side by side), one of which may be a factory. It is
            called without arguments, or with the weights (name -> tensor) if some are given, and
            returns an object as `FeatureExtractor` describes.
        weights: file, folder, or name of public weights; None for the extractor's own default. Of
            several extractors "NAME=WEIGHTS" with commas between.
        device: where a network goes.
        announce: hears of downloads.

    What the user's own extractor returns is checked at every call. Raises UnknownNameError,
    ConfigError for a module that cannot be used, CheckpointError for weights that do not fit.
    """
    require_device(device)
    if len(encoders(name)) > 1:
        return _build_several(name, weights, device, announce)
    source = weights_source(name, weights)
    if own_code.is_own(name):
        loaded = load_weights(source, announce, as_stored=True) if source else None
        given, what = ([loaded.tensors], "the weights") if loaded else ([], "no arguments")
        built = own_code.call(name, "extractor", given, what)
        _require_attributes(built, name)
    else:
        factory = registry.resolve("extractor", registry.EXTRACTORS, name)
        of_hub = weights is None and name in REPOSITORIES
        place = str(local_model(str(source)) if of_hub else source)
        loaded = load_weights(place, announce)
        try:
            built = factory(loaded.tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from None
    extractor: FeatureExtractor = CheckedExtractor(built) if own_code.is_own(name) else built
    if isinstance(extractor, nn.Module):
        extractor.to(device).eval()
    return extractor, loaded.sha256 if loaded else None


def encoders(name: str) -> tuple[str, ...]:
    """The names in "inception,dinov2", each once; one of them may be the user's.

    ConfigError for a name that comes twice, and for two of the user's: the features of one are as
    many as those of the others leave.
    """
    names = tuple(name.split(","))
    for one in names:
        if names.count(one) > 1:
            raise ConfigError(f"extractor {name!r}: {one!r} comes twice")
    own = [one for one in names if own_code.is_own(one)]
    if len(own) > 1:
        raise ConfigError(
            f"extractor {name!r}: expected one module at most among several, got {', '.join(own)}"
        )
    return names


def encoder_spans(name: str, dim: int) -> tuple[tuple[int, int], ...]:
    """The columns start..stop-1 of each extractor of "inception,dinov2" among `dim` features."""
    names = encoders(name)
    if len(names) == 1:
        return ((0, dim),)
    require_known(name)
    dims = [DIMS.get(one, 0) for one in names]  # 0: the user's, whose features are the rest
    rest, own = dim - sum(dims), 0 in dims
    if rest < own or (rest and not own):
        expected = f"{'more than ' * own}{sum(dims)}"
        raise ConfigError(f"expected {expected} features of {name}, got {dim}")
    stops = list(itertools.accumulate(one or rest for one in dims))
    return tuple(zip([0, *stops[:-1]], stops, strict=True))


def weights_by_name(name: str, weights: str | None) -> dict[str, str]:
    """Extractor -> its weights, of "inception=a.pth,digits=b.safetensors"; {} for None.

    Of one extractor the text itself. Raises ConfigError for weights of none of them.
    """
    names = encoders(name)
    if weights is None or len(names) == 1:
        return {} if weights is None else {name: weights}
    found = dict(part.partition("=")[::2] for part in weights.split(","))
    odd = [key for key, value in found.items() if key not in names or not value]
    if odd:
        raise ConfigError(
            f"expected weights of several extractors as NAME=FILE with NAME one of "
            f"{', '.join(names)}, got {weights!r}"
        )
    return found


def own_weights(config: OptimizeConfig | FinetuneConfig) -> str | None:
    """The weights of a config's extractor; of several, those given by name, "NAME=FILE,..."."""
    names, by_name = encoders(config.extractor or ""), config.extra_weights
    given = [f"{one}={by_name[one]}" for one in names if len(names) > 1 and one in by_name]
    return ",".join(given) or config.extractor_weights


def _build_several(
    name: str, weights: str | None, device: str, announce: Announce
) -> tuple[FeatureExtractor, str | None]:
    given = weights_by_name(name, weights)
    built = [build_extractor(one, given.get(one), device, announce) for one in encoders(name)]
    digest = hashlib.sha256("".join(sha256 or "" for _, sha256 in built).encode()).hexdigest()
    return SideBySide([extractor for extractor, _ in built], name), digest


class SideBySide(nn.Module):
    """Several extractors as one: images (B, ...) -> their features (B, dim), in their order."""

    def __init__(self, extractors: Sequence[FeatureExtractor], name: str) -> None:
        super().__init__()
        self.extractors, self.name = tuple(extractors), name
        self.networks = nn.ModuleList(one for one in extractors if isinstance(one, nn.Module))
        self.dim = sum(extractor.dim for extractor in extractors)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([extractor(images).float() for extractor in self.extractors], 1)


def weights_source(name: str, weights: str | None) -> str | None:
    """What an extractor's weights are read from: as given, else its published ones.

    None for a module of the user's that is given none. Raises UnknownNameError or ConfigError for
    a name that is no extractor's, for an extractor that has no weights of its own, and for one
    whose library is not installed.
    """
    require_known(name)
    registry.require_library("extractor", name)
    source = weights or DEFAULT_WEIGHTS.get(name) or REPOSITORIES.get(name)
    if source is None and not own_code.is_own(name):
        raise ConfigError(f"the extractor {name!r} needs a weights file; pass --extractor-weights")
    return source


def require_known(name: str) -> None:
    """Raise UnknownNameError or ConfigError for a name that is no extractor's; imports nothing."""
    if len(several := encoders(name)) > 1:
        for one in several:
            require_known(one)
    elif own_code.is_own(name):
        own_code.require_readable(name, "extractor")
    elif name not in registry.EXTRACTORS:
        raise UnknownNameError("extractor", name, registry.EXTRACTORS)


def named_by_file(name: str, file: str) -> str:
    """An extractor's name that a file says; ConfigError for code that the user does not name."""
    own_code.require_allowed(name, "extractor", "--extractor", file)
    return name


class CheckedExtractor(nn.Module):
    """An extractor of the user's whose every result is checked; a network goes along as a part."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__()
        self.extractor, self.name, self.dim = extractor, extractor.name, extractor.dim

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, dim) float32; ConfigError for anything else than floating (B, dim)."""
        features: object = self.extractor(images)
        expected = f"expected a floating tensor ({len(images)}, {self.dim})"
        if not isinstance(features, Tensor):
            found = type(features).__name__
            raise ConfigError(f"the extractor {self.name!r} returned {found}; {expected}")
        if features.shape != (len(images), self.dim) or not features.is_floating_point():
            found = f"{str(features.dtype).removeprefix('torch.')} {tuple(features.shape)}"
            raise ConfigError(f"the extractor {self.name!r} returned {found}; {expected}")
        return features.float()


def _require_attributes(built: Any, name: str) -> None:
    known = {"name": str, "dim": int}
    for attribute, kind in known.items():
        found = getattr(built, attribute, None)
        if not isinstance(found, kind) or isinstance(found, bool) or not found:
            raise ConfigError(
                f"extractor {name!r}: expected an object with {attribute!r} of type "
                f"{kind.__name__}, got {found!r} from {type(built).__name__}"
            )
    if not callable(built):
        raise ConfigError(f"extractor {name!r}: {type(built).__name__} cannot be called on images")
