"""What an evaluation compares with what: as said, else as the run or set of its model says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from merge_rl.config import SamplerConfig
from merge_rl.errors import ConfigError
from merge_rl.interfaces import Autoencoder, FeatureExtractor
from merge_rl.workflows.assembly import (
    ModelDefaults,
    Statistics,
    find_defaults,
    find_model,
    load_autoencoder,
    require_parts_of,
)
from merge_rl.workflows.evaluate.features import samplers_of


@dataclass(frozen=True, eq=False)
class Given:
    """What is compared with what, and how images are made; None: as the model's run says."""

    reference: Statistics | None
    heldout: Statistics | None
    extractor: FeatureExtractor | str | None
    weights: str | None
    sha256: str | None
    sampler: SamplerConfig | Mapping[str, SamplerConfig] | None
    autoencoder: Autoencoder | None
    near: ModelDefaults | None = None

    def completed(self, path: str, kind: str, network: str | None) -> Given:
        """With sampler and decoder of the run or set near the model, and a reference that it names.

        Its extractor goes with that reference. Code that the run or set names, and neither the call
        nor `network`, is refused: all of it at once.
        """
        place = find_model(path).path if kind == "model" and path else None
        near = find_defaults(place) if place else None
        if self.reference is None and (near is None or near.reference is None):
            where = f"near {path}" if path else "for a network in memory"
            raise ConfigError(f"no run or set {where} names a reference; pass reference=")
        if place is not None:
            require_parts_of(place, self._unsaid(network))
        if self.reference is not None or near is None:
            return dataclasses.replace(self, near=near)
        return dataclasses.replace(
            self, reference=near.reference, heldout=self.heldout or near.heldout,
            extractor=self.extractor or near.extractor, near=near,
            weights=self.weights or (near.extractor_weights if self.extractor is None else None),
        )  # fmt: skip

    def _unsaid(self, network: str | None) -> list[str]:
        said = {
            "network": network,
            "autoencoder": self.autoencoder,
            "autoencoder_weights": self.autoencoder,
            "extractor": self.extractor or self.reference,
            "extractor_weights": self.weights,
            "reference": self.reference,
            "heldout": self.heldout,
            "guide": self.sampler,
        }
        return [part for part, value in said.items() if value is None]

    @property
    def statistics(self) -> dict[str, Statistics | None]:
        """By name."""
        return {"reference": self.reference, "heldout": self.heldout}

    def decoder(self, network: nn.Module) -> Autoencoder | None:
        """What makes images: as said, else that of the run or set."""
        if self.autoencoder is not None or self.near is None:
            return self.autoencoder
        return load_autoencoder(
            self.near.autoencoder, self.near.autoencoder_weights,
            shape=[int(n) for n in network.sample_shape],  # type: ignore[union-attr]
            dtype=self.near.autoencoder_dtype,
        )[0]  # fmt: skip

    def samplers(self, network: nn.Module) -> dict[str, SamplerConfig]:
        """Solver settings by what they are: "ode", "sde"."""
        if isinstance(self.sampler, SamplerConfig):
            return {"sde" if self.sampler.is_sde else "ode": self.sampler}
        return dict(self.sampler or samplers_of(network, self.near.sampler if self.near else None))
