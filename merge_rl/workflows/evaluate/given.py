"""What an evaluation compares with what: as said, else as the run or set of its model says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from merge_rl import own_code
from merge_rl.config import SamplerConfig
from merge_rl.errors import ConfigError
from merge_rl.interfaces import Autoencoder, FeatureExtractor
from merge_rl.workflows.assembly import (
    ModelDefaults,
    Statistics,
    find_defaults,
    find_model,
    load_autoencoder,
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

    def completed(self, path: str, kind: str) -> Given:
        """With sampler and decoder of the run or set near the model, and a reference that it names.

        Its extractor goes with that reference.
        """
        near = find_defaults(find_model(path).path) if kind == "model" and path else None
        if self.reference is not None:
            return dataclasses.replace(self, near=near)
        if near is None or near.reference is None:
            where = f"near {path}" if path else "for a network in memory"
            raise ConfigError(f"no run or set {where} names a reference; expected one")
        extractor = self.extractor or near.extractor
        if isinstance(extractor, str):
            own_code.require_allowed(
                extractor, "extractor", "--extractor", f"the run or set of {path}"
            )
        return dataclasses.replace(
            self, reference=near.reference, heldout=self.heldout or near.heldout,
            extractor=extractor, near=near,
            weights=self.weights or (near.extractor_weights if self.extractor is None else None),
        )  # fmt: skip

    @property
    def statistics(self) -> dict[str, Statistics | None]:
        """By name."""
        return {"reference": self.reference, "heldout": self.heldout}

    def decoder(self, network: nn.Module) -> Autoencoder | None:
        """What makes images: as said, else that of the run or set."""
        if self.autoencoder is not None or self.near is None:
            return self.autoencoder
        named = self.near.autoencoder
        if named is not None:
            own_code.require_allowed(named, "autoencoder", "--autoencoder", "the run of the model")
        return load_autoencoder(
            named, self.near.autoencoder_weights,
            shape=[int(n) for n in network.sample_shape],  # type: ignore[union-attr]
            dtype=self.near.autoencoder_dtype,
        )[0]  # fmt: skip

    def samplers(self, network: nn.Module) -> dict[str, SamplerConfig]:
        """Solver settings by what they are: "ode", "sde"."""
        if isinstance(self.sampler, SamplerConfig):
            return {"sde" if self.sampler.is_sde else "ode": self.sampler}
        return dict(self.sampler or samplers_of(network, self.near.sampler if self.near else None))
