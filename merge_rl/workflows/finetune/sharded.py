"""Gradients over processes: replicated or in shards, and the learner that keeps shards."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from merge_rl.config import UpdateConfig
from merge_rl.errors import ConfigError
from merge_rl.models import plain_state_dict
from merge_rl.parallel.group import Group
from merge_rl.parallel.rendezvous import is_broken_link
from merge_rl.workflows.finetune.learner import Learner


class ShardedLearner(Learner):
    """Trains shards of a copy of the network (`sharded`); the network itself samples, and is whole.

    So rollouts need no exchange at every layer, and beside the weights once nothing of the size of
    the weights is held whole. All processes call all methods together, but `state_dict`, `weights`
    and `averaged`, which the first one calls by itself.

    Args:
        together: is entered around what all must join in then, with the method's name.
    """

    def __init__(
        self, network: nn.Module, settings: UpdateConfig,
        together: Callable[[str], AbstractContextManager[None]] = lambda _method: nullcontext(),
    ) -> None:  # fmt: skip
        self.network, self.settings, self.together = network, settings, together
        self.policy = sharded(copy.deepcopy(network))
        self.trained = {n: p for n, p in self.policy.named_parameters() if p.requires_grad}
        self.updates = 0
        # One operation over many tensors takes shards alone, and scalars are none.
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=settings.learning_rate, betas=settings.betas,
            weight_decay=settings.weight_decay, foreach=False,
        )  # fmt: skip
        self.average = network
        averaged = self.trained if settings.ema_decay else {}
        self._average = {n: p.detach().clone() for n, p in averaged.items()}

    @property
    def averages(self) -> bool:
        """Whether there is a moving average beside the weights."""
        return bool(self._average)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The network with the average in place of the weights, in the block."""
        if not self._average:
            yield self.network
            return
        with self.together("fill_average"):
            self.fill_average()
        try:
            yield self.network
        except (KeyboardInterrupt, GeneratorExit):
            self._back()  # what is saved next may need the weights
            raise
        self._back()

    def _back(self) -> None:
        with self.together("fill_weights"):
            self.fill_weights()

    def fill_average(self) -> None:
        """Gather the average into the network."""
        self._fill(self._average)

    def fill_weights(self) -> None:
        """Gather the weights into the network."""
        self._fill(self.trained)

    def _fill(self, shards: Mapping[str, Tensor]) -> None:
        mine = dict(self.network.named_parameters())
        with torch.no_grad():
            for name, shard in shards.items():
                mine[name].copy_(_whole(shard))

    @contextmanager
    def passing(self, *, last: bool) -> Iterator[None]:  # noqa: ARG002
        """Around every forward and backward pass of a batch; each averages its gradients."""
        with warnings.catch_warnings():
            # Nothing alters what a network returns, view or not.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
            yield

    def gradient_norm(self) -> float:
        """Norm of all gradients, which are clipped to the settings' bound on the way."""
        average_scalars(self.policy)
        grads = [p.grad for p in self.trained.values() if p.grad is not None]
        squares = [_local(grad).double().square().sum() for grad in grads]
        split = [isinstance(grad, DTensor) for grad in grads]
        total = _sum_where(squares, split)
        dist.all_reduce(total)
        total = (total + _sum_where(squares, [not here for here in split])).sqrt()
        # As clip_grad_norm_ does, which takes no mixture of shards and whole tensors.
        scale = (self.settings.max_grad_norm / (total + 1e-6)).clamp(max=1.0)
        for grad in grads:
            _local(grad).mul_(scale.to(grad.dtype))
        return float(total)

    def apply(self) -> None:
        """One update of weights and moving average from the gradients, which must be finite."""
        self._update(self.policy)
        decay = self._decay()
        with torch.no_grad():
            for name, parameter in self.trained.items() if self._average else ():
                _local(self._average[name]).lerp_(_local(parameter), 1 - decay)
        self.fill_weights()

    def weights(self, *, average: bool) -> dict[str, Tensor]:
        """Copies of the weights or of their average, float32 on the CPU, with official names."""
        if not average:
            return _copies(self.network)
        with self.averaged() as network:
            return _copies(network)

    def state_dict(self) -> dict[str, Tensor]:
        """What is trained, its average and the optimizer's moments, whole, on the CPU."""
        with self.together("gather_state"):
            return self.gather_state()

    def gather_state(self) -> dict[str, Tensor]:
        """The same, for processes that were told."""
        state = {f"weights.{name}": p.detach() for name, p in self.trained.items()}
        state |= {f"average.{name}": tensor for name, tensor in self._average.items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"optimizer.{key}.{name}"] = value
        return {name: _whole(tensor).cpu() for name, tensor in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Go on from a saved state, whole in every process, which keeps its shards of it."""
        self.updates = updates
        with torch.no_grad():
            for name, parameter in self.trained.items():
                _local(parameter).copy_(_like(state[f"weights.{name}"], parameter))
                if self._average:
                    ours = _like(state[f"average.{name}"], parameter)
                    _local(self._average[name]).copy_(ours)
                if not updates:
                    continue
                moments = {
                    key: _placed(state[f"optimizer.{key}.{name}"], parameter)
                    for key in ("exp_avg", "exp_avg_sq")
                }
                step = state[f"optimizer.step.{name}"].clone()
                self.optimizer.state[parameter] = {"step": step, **moments}
        mine = dict(self.network.named_parameters())
        with torch.no_grad():
            for name in self.trained:
                mine[name].copy_(state[f"weights.{name}"])


def _sum_where(values: Sequence[Tensor], chosen: Sequence[bool]) -> Tensor:
    kept = [value for value, here in zip(values, chosen, strict=True) if here]
    return torch.stack(kept).sum() if kept else torch.zeros([], dtype=torch.float64)


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: the memory itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _placed(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every process has, as a parameter's shards lie."""
    value = value.to(like.device, copy=True)
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _like(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, as a parameter's shards lie."""
    if value.shape != like.shape:
        raise RuntimeError(f"expected the shape {tuple(like.shape)}, got {tuple(value.shape)}")
    return _local(_placed(value, like))


def _copies(network: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().float().cpu().clone() for n, p in plain_state_dict(network).items()}


@contextmanager
def process_group(device: str, group: Group | None = None) -> Iterator[None]:
    """torch's default group for this launch: nccl between GPUs, gloo for what is on the CPU.

    With `group` its processes meet in its store, which a restarted launch does not share with what
    was before; no exchange waits longer than its timeout.
    """
    kind = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
    if group is None:
        dist.init_process_group(kind)
    else:
        store: Any = group.store_of("gradients")
        try:
            dist.init_process_group(
                kind, store=store, rank=group.rank, world_size=group.size,
                timeout=timedelta(seconds=group.timeout),
            )  # fmt: skip
        except RuntimeError as error:
            if not is_broken_link(error):
                raise
            group.lost("start")
    try:
        yield
    finally:
        dist.destroy_process_group()


class Replicated(DistributedDataParallel):
    """A DDP module that hands on the attributes of its network that samplers look at."""

    def __init__(self, network: nn.Module) -> None:
        known = inspect.signature(DistributedDataParallel).parameters
        named = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {named: False}
        super().__init__(network, **options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def replicated(network: nn.Module) -> nn.Module:
    """The network, with gradients that are means over processes after every backward pass.

    Buffers are constant tables, equal everywhere: nothing is exchanged in forward passes.
    """
    return Replicated(network)


def sharded(network: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """The network with its weights in shards, in place; scalars, which cannot be, stay whole.

    One block of its lists of blocks is whole at a time, beside what belongs to none of them.

    Gradients of the shards are means over processes after every backward pass; those of the
    scalars once `average_scalars` has been called. ConfigError for PyTorch 2.6, which can neither
    leave scalars whole nor shard on a CPU.
    """
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ConfigError(
            f"parallel fsdp needs a later PyTorch than {torch.__version__}; expected parallel ddp"
        )
    if mesh is None:
        kind = next(network.parameters()).device.type
        mesh = init_device_mesh(kind, (dist.get_world_size(),))
    whole = {parameter for parameter in network.parameters() if parameter.ndim == 0}
    for block in blocks_of(network):
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(network, mesh=mesh, ignored_params=whole)
    return network


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The entries of a network's outermost lists and dictionaries of modules that have weights."""
    found: list[nn.Module] = []
    for child in network.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += [block for block in child.children() if any(True for _ in block.parameters())]
        else:
            found += blocks_of(child)
    return found


def average_scalars(network: nn.Module) -> None:
    """Means over processes of the gradients of a sharded network's scalars."""
    grads = [p.grad for p in network.parameters() if p.ndim == 0 and p.grad is not None]
    if not grads:
        return
    flat = torch.stack(grads)
    dist.all_reduce(flat)
    for grad, mean in zip(grads, flat / dist.get_world_size(), strict=True):
        grad.copy_(mean)
