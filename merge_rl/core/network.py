"""The base of all networks, and weights loaded into one, all or nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from merge_rl.errors import CheckpointError

_FILLS: Final = {
    nn.init.kaiming_uniform_, nn.init.kaiming_normal_, nn.init.uniform_, nn.init.normal_,
    Tensor.uniform_, Tensor.normal_,
}  # fmt: skip
_DRAWS: Final = {torch.randn, torch.rand}


def against(made: Tensor, cotangent: Tensor) -> Tensor:
    """<made, cotangent>, a scalar whose gradient by `made` is the cotangent, bit for bit.

    Shapes must be equal. Handed to torch as it is, a cotangent makes it load its symbolic shapes,
    which takes a second the first time.
    """
    product: Tensor = (made * cotangent).sum()
    return product


class Undrawn(TorchFunctionMode):
    """Context in which new layers leave their weights uninitialised, since all are loaded next.

    Millions of random numbers take longer to draw than weights to read.
    """

    def __torch_function__(
        self, func: Callable[..., object], types: Sequence[type], args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:  # fmt: skip
        """What torch calls in place of its functions."""
        given = kwargs or {}
        if func in _FILLS:
            return args[0] if args else given["tensor"]
        if func in _DRAWS:
            return torch.empty(*args, **given)  # type: ignore[call-overload]
        return func(*args, **given)


class Network(nn.Module, ABC):
    """Base of all networks: a module called as `merge_rl.interfaces.Denoiser` describes.

    Attributes that samplers look at, where a network has them:
        sample_shape: shape of one sample.
        prediction: "denoised" (the default) or "velocity".
        label_dim: number of classes, 0 for none.
        null_label: the class id that means "no class", None for none.

    `merge_rl.describe` makes one of any module.
    """

    # Whether a forward pass is the same operations on the same addresses for equal shapes, so that
    # it can be recorded as a CUDA graph.
    capturable: bool = False

    def kept(self) -> list[Tensor]:
        """Cached tensors that are computed from the weights, recomputed in place where stale."""
        return []

    def derived_once(self) -> AbstractContextManager[None]:
        """Context in which calls share what is computed from the weights alone, with gradients.

        Gradients of the shared values reach the weights when the context is left, and not before.
        Weights must not change inside.
        """
        return nullcontext()

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch; (C, H, W) of images and latents."""


def load_exactly(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    what: str,
    *,
    optional: Callable[[str], bool] = lambda _name: False,
    ignored: Callable[[str], bool] = lambda _name: False,
) -> None:
    """Load weights whose names and shapes are the network's.

    Args:
        network: what to load into; unchanged if the weights do not fit.
        weights: name -> tensor, cast to the network's dtypes.
        what: the network's name, for the message.
        optional: whether a tensor of the network may be missing.
        ignored: whether a tensor that the network lacks may be there.

    Raises CheckpointError that counts the odd tensors and describes the first.
    """
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {
        name: tuple(tensor.shape)
        for name, tensor in weights.items()
        if name in own or not ignored(name)
    }
    odd = [
        name
        for name in sorted(own.keys() | given.keys())
        if own.get(name) != given.get(name) and (name in given or not optional(name))
    ]
    if odd:
        raise CheckpointError(
            f"not weights of {what}: {len(odd)} tensors do not fit, first {odd[0]!r}: "
            f"found {given.get(odd[0], 'nothing')}, expected {own.get(odd[0], 'nothing')}"
        )
    network.load_state_dict({name: weights[name] for name in given}, strict=False)


def rotations(head_size: int, side: int, others: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (others + side^2, head_size) of the angles that tokens are turned by.

    Neighbouring channels form a pair with one angle: p w_k for pair k, where p is the row in the
    first half of the channels and the column in the second, and w_k = 10000^(-4 k / head_size).
    The first `others` tokens have no place in the image and are not turned.
    """
    rates = 10000.0 ** (-torch.arange(head_size // 4, dtype=torch.float32) * 4 / head_size)
    line = torch.arange(side, dtype=torch.float32).outer(rates).repeat_interleave(2, dim=1)
    angles = torch.cat([line.repeat_interleave(side, dim=0), line.repeat(side, 1)], dim=1)
    angles = torch.cat([angles.new_zeros(others, head_size), angles])
    return angles.cos(), angles.sin()
