"""A function of the user's in the place of network, sampler, decoder and extractor."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from merge_rl.config import SamplerConfig
from merge_rl.errors import ConfigError, StatisticsError
from merge_rl.interfaces import Autoencoder, FeatureExtractor
from merge_rl.storage.checkpoints import CheckpointSet, module_of
from merge_rl.workflows.assembly.extractors import build_extractor
from merge_rl.workflows.assembly.parts import Made, Parts
from merge_rl.workflows.assembly.references import ExtractorId, Opened, find_references
from merge_rl.workflows.reference import Reference, load_reference
from merge_rl.workflows.rollout import (
    AsTheyAre,
    Generate,
    GivenRollout,
    Rollout,
    Subject,
    require_device,
)


@dataclass(frozen=True, eq=False)
class Given:
    """A function that generates, and the network that it is given; without one, weights by name."""

    generate: Generate
    model: nn.Module | None = None

    def network(self, checkpoints: CheckpointSet, device: str) -> nn.Module:
        """What holds the merged weights; the user's own module is left as it is."""
        require_device(device)
        made = module_of(checkpoints.tensors) if self.model is None else _copied(self.model)
        return made.to(device).float().eval().requires_grad_(False)

    def subject(self, network: nn.Module) -> Subject:
        """What the function is given: the network, or its weights by name.

        The weights are its parameters themselves: values follow every merge, gradients reach them.
        """
        if self.model is not None:
            return network
        weights: Mapping[str, Tensor] = network.state_dict(keep_vars=True)
        return dict(weights)


def _copied(model: nn.Module) -> nn.Module:
    """A copy with weights of its own; ConfigError for a module whose weights cannot be changed."""
    kind, state = type(model).__name__, model.state_dict(keep_vars=True)
    lazy = [name for name, value in state.items() if is_lazy(value)]
    empty = [name for name, value in state.items() if isinstance(value, Tensor) and value.is_meta]
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(f"{kind} is scripted; expected the module it was made from as `model`")
    if lazy:
        raise ConfigError(f"{kind} has no shape of {lazy[0]!r} yet; expected it called once before")
    if empty:
        raise ConfigError(f"{kind} is on the meta device, without numbers; expected it on the CPU")
    # What layers keep between calls (weight_norm, pruning: the weight itself) has a history, which
    # torch does not copy; values are enough, as every call makes them anew.
    kept = [value for module in model.modules() for value in vars(module).values()]
    past = [value for value in kept if isinstance(value, Tensor) and not value.is_leaf]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in past})


@dataclass(frozen=True, eq=False)
class GivenParts(Parts):
    """What a search with a function of the user's is made of."""

    given: Given | None = None

    @property
    def num_classes(self) -> int:
        """As the settings say."""
        return self.settings.num_classes

    @property
    def shape(self) -> list[int]:
        """Not known."""
        return []

    @property
    def makes_images(self) -> bool:
        """Where an extractor makes features of them."""
        return self.settings.extractor is not None

    def require_fit(self, _samplers: Iterable[SamplerConfig]) -> None:
        """Raise for statistics that cannot be compared with each other, or with the extractor."""
        dims = {name: reference.stats.dim for name, reference in self.references.items()}
        if len(set(dims.values())) > 1:
            raise StatisticsError(f"expected statistics of one dimension, got {dims}")

    @cached_property
    def _opened(self) -> Opened:
        return {}

    @cached_property
    def _autoencoder(self) -> tuple[Autoencoder, str | None]:
        return AsTheyAre(0), None

    @cached_property
    def _extractor(self) -> tuple[FeatureExtractor, str | None]:
        settings = self.settings
        if settings.extractor is None:
            return AsTheyAre(load_reference(settings.reference or "").stats.dim), None
        return build_extractor(
            settings.extractor, settings.extractor_weights, settings.device, self.announce
        )

    @cached_property
    def references(self) -> dict[str, Reference]:
        """The statistics of real data; of features that say no maker the dimension is compared."""
        extractor, digest = self._extractor
        maker = ExtractorId(extractor.name, digest, extractor.dim)
        return {k: found for k, (found, _) in find_references(self._reference_paths, maker).items()}

    def rollout(self, kind: type[Made], *, own: bool = False) -> Made:
        """A rollout by the function."""
        if self.given is None or not issubclass(GivenRollout, kind):  # pragma: no cover
            raise TypeError(f"expected a function and a Rollout, got {kind.__name__}")
        made: Rollout = GivenRollout(
            self.given.generate, self.given.subject(self.network),
            extractor=self.extractor if own else self.reward.extractor,
            batch=self.settings.batch, device=self.settings.device,
        )  # fmt: skip
        return made  # type: ignore[return-value]  # of a kind that it derives from
