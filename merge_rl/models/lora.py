"""Low-rank adapters in a network's linear layers, by peft (Hu et al., 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from merge_rl.errors import ConfigError, MissingLibraryError


def add_adapters(
    network: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    generator: torch.Generator,
) -> None:
    """Put W + (alpha / rank) B A in place of W in the linear layers whose names end so.

    A is drawn, B is 0: the network computes what it did. A and B alone are trained then.
    Raises ConfigError without the library, and where no linear layer has such a name.
    """
    try:
        import peft
    except ImportError:
        raise MissingLibraryError("training low-rank adapters", "peft", "lora") from None
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    matched = [name for name in linear if name.rpartition(".")[2] in targets]
    if not matched:
        found = f"{len(linear)} linear layers, none of them called so" if linear else "none"
        raise ConfigError(
            f"expected linear layers called {', '.join(targets)} for low-rank adapters, found "
            f"{found} in {type(network).__name__}; train all its weights (--lora-rank 0)"
        )
    settings = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=matched, init_lora_weights=False
    )
    with torch.random.fork_rng(devices=[]):  # the library draws, from the global generator
        peft.inject_adapter_in_model(settings, network)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            adapter = ".lora_A." in name or ".lora_B." in name
            parameter.requires_grad_(adapter)
            if ".lora_A." in name:
                bound = 1 / math.sqrt(parameter.shape[1])
                drawn = torch.rand(parameter.shape, generator=generator)
                parameter.copy_((2 * drawn - 1) * bound)
            elif ".lora_B." in name:
                parameter.zero_()


def plain_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """Weights with the official names: adapters, where there are some, added to their layers."""
    state = network.state_dict()
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        path, _, leaf = name.rpartition(".")
        if not path.endswith(".base_layer"):
            plain[name] = tensor
            continue
        owner = path.removesuffix(".base_layer")
        if leaf == "weight":
            layer = network.get_submodule(owner)
            tensor = tensor + layer.get_delta_weight("default")  # type: ignore[operator]
        plain[f"{owner}.{leaf}"] = tensor
    return plain
