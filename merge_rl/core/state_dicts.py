"""Weights into a network, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from merge_rl.errors import CheckpointError


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
