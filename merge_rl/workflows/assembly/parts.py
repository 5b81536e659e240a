"""The objects that settings name, each built when it is first asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Final, TypeVar

from torch import Tensor, nn

from merge_rl import own_code, registry
from merge_rl.config import GUIDE, OptimizeConfig, SamplerConfig
from merge_rl.core.sampling.compatibility import require_call, require_sampler
from merge_rl.interfaces import Autoencoder, FeatureExtractor
from merge_rl.storage.checkpoints import (
    CheckpointSet,
    model_sha256,
    require_network,
    unknown_config,
)
from merge_rl.storage.files import reference_file, sha256_file
from merge_rl.workflows.assembly.extractors import build_extractor, own_weights
from merge_rl.workflows.assembly.networks import (
    Announce,
    load_autoencoder,
    load_guide,
    open_guide,
    require_autoencoder,
    to_be_loaded,
)
from merge_rl.workflows.assembly.references import Opened, fit_reference
from merge_rl.workflows.assembly.reward import (
    BuiltReward,
    ExtractorReference,
    build_reward,
    open_targets,
)
from merge_rl.workflows.reference import Reference
from merge_rl.workflows.rewards import RewardSum
from merge_rl.workflows.rollout import Rollout, cpu_workers, require_device

Made = TypeVar("Made", bound=Rollout)
# Whatever the reward is, these are the same.
_SHARED: Final = ("sampler", "guide", "_autoencoder", "_extractor", "_opened", "references")


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """A network and what resolved settings name beside it; what is built once is kept.

    Searches, their plans and fine-tuning take from it what they need. The network is the caller's:
    what it is moved to or given (a device, adapters) holds for all that is built after it.
    """

    settings: OptimizeConfig
    network: nn.Module
    announce: Announce = lambda _text: None

    @cached_property
    def sampler(self) -> SamplerConfig:
        """The sampler of the settings, or the usual one."""
        return self.settings.sampler or SamplerConfig()

    @property
    def num_classes(self) -> int:
        """Classes of the network; 0 for one without."""
        return int(getattr(self.network, "label_dim", 0))

    @property
    def shape(self) -> list[int]:
        """Of one sample of the network: (C, h, w)."""
        return sample_shape(self.network)

    @property
    def makes_images(self) -> bool:
        """Whether samples become pictures; points and sequences do not."""
        return len(self.shape) == 3

    @cached_property
    def guide_set(self) -> CheckpointSet | None:
        """The set that the guide is merged from, where its coefficients are searched."""
        return (
            open_guide(self.sampler, self.network) if GUIDE in self.settings.search.tune else None
        )

    @cached_property
    def guide(self) -> nn.Module | None:
        """The weaker network of the sampler, on the device."""
        if self.guide_set is not None:
            return blank_network(self.guide_set, self.settings.device)
        return load_guide(self.sampler, self.settings.device, self.network)

    def require_fit(self, samplers: Iterable[SamplerConfig]) -> None:
        """Raise for parts that do not go together, before any weights are read or fetched.

        These are the samplers and the network with its guide, its samples and the autoencoder, the
        statistics of real data and the extractors.
        """
        for sampler in samplers:
            require_sampler(sampler, self.network, self.guide, guided=self.settings.tunes_guidance)
        require_autoencoder(self.settings.autoencoder, self.shape)
        _ = self._opened

    @cached_property
    def _opened(self) -> Opened:
        """The statistics of real data, read once: before any weights, where that tells enough."""
        return open_targets(self.settings)

    @property
    def autoencoder(self) -> Autoencoder:
        """What makes images of the network's samples."""
        return self._autoencoder[0]

    @cached_property
    def _autoencoder(self) -> tuple[Autoencoder, str | None]:
        settings = self.settings
        return load_autoencoder(
            settings.autoencoder, settings.autoencoder_weights, shape=self.shape,
            dtype=settings.autoencoder_dtype, device=settings.device, announce=self.announce,
        )  # fmt: skip

    @property
    def extractor(self) -> FeatureExtractor:
        """The extractor that the settings name; a reward may read others beside it."""
        return self._extractor[0]

    @cached_property
    def _extractor(self) -> tuple[FeatureExtractor, str | None]:
        settings = self.settings
        return build_extractor(
            settings.extractor or "", own_weights(settings), settings.device, self.announce
        )

    @cached_property
    def references(self) -> dict[str, Reference]:
        """The statistics of real data: "reference" and, if any, "heldout"."""
        (extractor, digest), named = self._extractor, self.settings.extractor or ""
        return {
            name: fit_reference(path, extractor, digest, named, self._opened)
            for name, path in self._reference_paths.items()
            if path is not None
        }

    @property
    def _reference_paths(self) -> dict[str, str | None]:
        return {"reference": self.settings.reference, "heldout": self.settings.heldout}

    @cached_property
    def reward(self) -> BuiltReward:
        """The reward and the extractor of the features that it reads."""
        own = ExtractorReference(
            extractor=self.extractor, reference=self.references["reference"],
            path=self.settings.reference or "", heldout=self.references.get("heldout"),
        )  # fmt: skip
        return build_reward(self.settings, own, self.announce, self._opened)

    def with_reward(self, settings: OptimizeConfig) -> Parts:
        """Other settings, which differ in nothing but the reward: the same objects but for it."""
        other = dataclasses.replace(self, settings=settings)
        # Where a cached property keeps what it has built.
        vars(other).update({name: made for name, made in vars(self).items() if name in _SHARED})
        return other

    def hashes(self) -> dict[str, Any]:
        """SHA-256 of every file beside the network's own; None where there is none."""
        guide = self.sampler.guide
        return {
            "extractor_weights": self._extractor[1],
            "autoencoder_weights": self._autoencoder[1],
            "guide": set_hashes(self.guide_set)
            if self.guide_set
            else model_sha256(guide)
            if guide
            else None,
            **{
                name: sha256_file(reference_file(path)[0]) if path else None
                for name, path in self._reference_paths.items()
            },
            **self.reward.hashes,
        }

    def rollout(self, kind: type[Made], *, own: bool = False) -> Made:
        """A rollout to the features of the reward, or (`own`) to those of the extractor alone."""
        return network_rollout(
            self.network, self.sampler, self.settings.batch, self.settings.device, kind,
            extractor=self.extractor if own else self.reward.extractor,
            autoencoder=self.autoencoder, guide=self.guide, announce=self.announce,
        )  # fmt: skip


class OfParts:
    """Properties of a job that are those of its parts."""

    parts: Parts

    @cached_property
    def num_classes(self) -> int:
        """Classes of the network; 0 for one without."""
        return self.parts.num_classes

    @cached_property
    def reward(self) -> RewardSum:
        """What candidates are ranked by."""
        return self.parts.reward.reward

    @cached_property
    def references(self) -> dict[str, Reference]:
        """Statistics of real data: "reference" and, if any, "heldout"."""
        return self.parts.references


def network_rollout(
    model: nn.Module,
    sampler: SamplerConfig,
    batch: int,
    device: str,
    kind: type[Made],
    *,
    extractor: FeatureExtractor | None = None,
    autoencoder: Autoencoder | None = None,
    guide: nn.Module | None = None,
    on_images: Callable[[int], None] | None = None,
    announce: Announce = lambda _text: None,
) -> Made:
    """A rollout of one network; without an extractor it is for images alone.

    Args:
        model: with `sample_shape`, (C, h, w); moved to the device.
        sampler, batch, device: as of `Rollout`.
        kind: `Rollout`, or a class derived from it.
        extractor, on_images, announce: as of `Rollout`.
        autoencoder: moved to the device; None where samples are images.
        guide: the weaker network; None: the one that the sampler names, if it names one.
    """
    require_device(device)
    decoder = autoencoder or load_autoencoder(None, shape=sample_shape(model))[0]
    if isinstance(decoder, nn.Module):
        decoder.to(device)
    require_call(model.to(device))
    return kind(
        model,
        sample_shape(model),
        sampler=sampler,
        autoencoder=decoder,
        extractor=extractor or _NoFeatures(),
        batch=batch,
        device=device,
        workers=cpu_workers(device),
        guide=guide or load_guide(sampler, device, model),
        on_images=on_images,
        announce=announce,
    )


class _NoFeatures:
    """A placeholder for the extractor of rollouts that make images alone."""

    name, dim = "none", 0

    def __call__(self, images: Tensor) -> Tensor:
        """(B, ...) -> (B, 0)."""
        return images.new_zeros(len(images), 0)


def sample_shape(model: nn.Module) -> list[int]:
    """(C, h, w) of one sample of a network."""
    return [int(n) for n in model.sample_shape]  # type: ignore[union-attr]


def set_hashes(checkpoints: CheckpointSet) -> dict[str, str]:
    """SHA-256 of a set's files by name."""
    return {name: checkpoints.sha256(i) for i, name in enumerate(checkpoints.names)}


def blank_network(checkpoints: CheckpointSet, device: str, *, drawn: bool = False) -> nn.Module:
    """The network of a set's config, on a device: for weights that come, or with some `drawn`."""
    if checkpoints.config is None:
        raise unknown_config(checkpoints.paths[0])
    if not own_code.is_own(str(checkpoints.config.get("model"))):  # before it takes memory
        require_network(checkpoints.tensors, checkpoints.config, str(checkpoints.folder))
    build = registry.build_model if drawn else to_be_loaded
    network: nn.Module = build(checkpoints.config)
    return network.to(device).requires_grad_(False)
