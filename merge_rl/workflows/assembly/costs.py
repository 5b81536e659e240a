"""The parts of a search, built with random weights instead of its checkpoints, and their cost."""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from merge_rl import registry
from merge_rl.config import OptimizeConfig
from merge_rl.core.distances.statistics import FeatureStats
from merge_rl.errors import ConfigError
from merge_rl.interfaces import Autoencoder
from merge_rl.storage.checkpoints import CheckpointSet, plan_merge
from merge_rl.storage.files import sha256_file
from merge_rl.workflows.assembly.parts import Parts, blank_network
from merge_rl.workflows.rollout import Rollout


@dataclass(frozen=True, eq=False, kw_only=True)
class PartCosts:
    """The objects of a search, and what their forward passes cost."""

    parts: Parts
    rollout: Rollout  # to the features of the reward
    costs: Mapping[str, Cost]  # by part; a part that computes nothing is not in it
    size: int  # elements that are merged
    num_groups: int  # of coefficients
    start_seconds: float  # to read and hash the checkpoints, about
    notes: tuple[str, ...]

    @property
    def dim(self) -> int:
        """Features an image, of the reward."""
        return self.rollout.extractor.dim

    @property
    def call_flops(self) -> float:
        """Of one image in one step of a sampler: the network, and what guides it."""
        network = self.costs["network"].flops
        if not self.parts.settings.guided:
            return network
        return network + (self.costs["guide"].flops if "guide" in self.costs else network)

    @property
    def finishing_flops(self) -> float:
        """Of an image after sampling."""
        return sum(
            self.costs[name].flops for name in ("decoder", "extractor") if name in self.costs
        )

    @property
    def moments(self) -> FeatureStats:
        """Moments as wide as the features of the rewards, about as large as real ones."""
        own = self.parts.references["reference"].stats
        times = -(-self.dim // own.dim)
        mean = own.mean.repeat(times)[: self.dim]
        spread = own.cov.diagonal().repeat(times)[: self.dim]
        return FeatureStats(own.count, mean, torch.diag(spread))


def cost_parts(
    config: OptimizeConfig, checkpoints: CheckpointSet, announce: Callable[[str], None]
) -> PartCosts:
    """Build what a resolved config names; of the checkpoints only headers are looked at.

    Raises ConfigError for a function of the user's, whose cost is not known before it is called.
    """
    if config.generate is not None:
        raise ConfigError(
            f"what {config.generate} costs is not known beforehand: expected a number as batch, "
            "and no plan"
        )
    parts = Parts(config, blank_network(checkpoints, config.device, drawn=True), announce)
    parts.require_fit([parts.sampler])
    rollout = parts.rollout(Rollout)
    merge = config.merge
    plan = plan_merge(checkpoints, groups=merge.groups, base=merge.start, freeze=merge.freeze)
    costs, notes = _costs(checkpoints.config or {}, rollout)
    return PartCosts(
        parts=parts,
        rollout=rollout,
        costs=costs,
        size=sum(_elements(checkpoints, name) for name in plan.merged),
        num_groups=len(plan.groups.names),
        start_seconds=_reading_seconds(checkpoints),
        notes=notes,
    )


def _elements(checkpoints: CheckpointSet, name: str) -> int:
    return int(torch.Size(checkpoints.tensors[name].shape).numel())


def _costs(model: Mapping[str, Any], rollout: Rollout) -> tuple[dict[str, Cost], tuple[str, ...]]:
    """Costs by part, and which could not be told."""
    shape, kind = rollout.shape, rollout.device.type

    def samples(batch: int) -> tuple[Tensor, ...]:
        labels = torch.zeros(batch, dtype=torch.int64)
        return torch.empty(batch, *shape), torch.ones(()), labels

    def latents(batch: int) -> tuple[Tensor, ...]:
        return (torch.empty(batch, *shape),)

    def images(batch: int) -> tuple[Tensor, ...]:
        return (_Decoding(rollout.autoencoder)(torch.empty(batch, *shape)),)

    costs = {"network": forward_cost(lambda: registry.build_on_meta(model), samples, kind)}
    others: dict[str, tuple[Any, Callable[[int], tuple[Tensor, ...]]]] = {
        "guide": (rollout.guide, samples),
        "decoder": (_Decoding(rollout.autoencoder), latents),
        "extractor": (rollout.extractor, images),
    }
    notes = []
    for name, (part, inputs) in others.items():
        try:
            if isinstance(part, nn.Module):
                costs[name] = forward_cost(partial(_weightless, part), inputs, kind)
        except (RuntimeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:80]
            notes.append(f"FLOPs and memory of the {name} are not counted: {reason}")
    return costs, tuple(notes)


def _weightless(part: nn.Module) -> nn.Module:
    return copy.deepcopy(part).to("meta")


class _Decoding(nn.Module):
    """An autoencoder's decoder as a forward pass, without its weights."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.part = _weightless(autoencoder) if isinstance(autoencoder, nn.Module) else autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        """Images of latents."""
        return self.part.decode(latents)  # type: ignore[operator]


def _reading_seconds(checkpoints: CheckpointSet) -> float:
    """Of all files, hashed and loaded, from how long the smallest takes."""
    smallest = min(checkpoints.paths, key=lambda path: path.stat().st_size)
    began = time.perf_counter()
    sha256_file(smallest)
    seconds = time.perf_counter() - began
    return 2 * seconds * checkpoints.total_bytes / max(1, smallest.stat().st_size)


PROBES: Final = (4, 8)  # batch sizes between which memory is taken for a straight line


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors made inside that are alive at the same time, at most.

    Counts storages, each once, from the operation that makes it until nothing refers to it: what
    an allocator must have, beside its own rounding and the workspace of kernels. What is `there`
    already, weights and inputs, does not count, nor do views of it.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@dataclass(frozen=True)
class Cost:
    """Of a forward pass: peak memory is fixed + per_image B for a batch of B."""

    flops: float  # an image; a multiplication and an addition count as two
    fixed: int
    per_image: float

    def peak(self, batch: int) -> int:
        """Bytes beside the weights."""
        return self.fixed + round(self.per_image * batch)


def forward_cost(
    build: Callable[[], nn.Module], inputs: Callable[[int], Iterable[Tensor]], device: str
) -> Cost:
    """Cost of build()(*inputs(B)) on a kind of device, which need not be there.

    Both are called where tensors have shapes but no values. A network that computes in half
    precision on some devices says on which (`half_on`).
    """
    peaks, flops = [], 0.0
    kind = torch.device(device).type
    with torch.device("meta"), torch.no_grad():
        for batch in PROBES:
            model = build().eval().requires_grad_(False)
            if kind in getattr(model, "half_on", ()):
                model.half_on = ("meta",)  # type: ignore[assignment]
            given = list(inputs(batch))
            there = [*model.parameters(), *model.buffers(), *given]
            with FlopCounterMode(display=False) as counter, LiveBytes(there) as memory:
                model(*given)
            flops = counter.get_total_flops() / batch
            peaks.append(memory.peak)
    slope = (peaks[1] - peaks[0]) / (PROBES[1] - PROBES[0])
    return Cost(flops, max(0, round(peaks[0] - slope * PROBES[0])), slope)


def weight_bytes(part: object) -> int:
    """Bytes of a module's parameters and buffers; 0 for what is no module."""
    if not isinstance(part, nn.Module):
        return 0
    return sum(t.numel() * t.element_size() for t in (*part.parameters(), *part.buffers()))
