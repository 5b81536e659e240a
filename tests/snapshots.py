"""Files as the official EDM2 and SiT programs write them, from any weights: for tests.

Tensors are pickled by torch itself; the classes of EDM2's own library exist only while writing,
as empty stand-ins under their names.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

SOURCE = 'raise RuntimeError("embedded source must never run")\n' + "# text\n" * 2000
VAE = {
    "vae_name": "stabilityai/sd-vae-ft-mse",
    "scale": np.array([0.12, 0.11, 0.13, 0.15], np.float32),
    "bias": np.array([-0.7, -0.35, -0.016, 0.33], np.float32),
    "batch_size": 8,
    "_vae": None,
}


class EasyDict(dict[str, Any]):
    """Stand-in for the class of that name in EDM2's library."""


class Persistent:
    """An object that is written together with the source of its class."""

    def __init__(self, class_name: str, state: Mapping[str, Any]) -> None:
        self.class_name, self.state = class_name, dict(state)


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Persistent):
            return NotImplemented
        facts = {"type": "class", "version": 6, "module_src": SOURCE}
        facts |= {"class_name": obj.class_name, "state": obj.state}
        rebuild = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
        return rebuild, (facts,)


@contextmanager
def official_names() -> Iterator[None]:
    """Modules of EDM2's library by name, so that the pickler can refer to them."""
    util, persistence = ModuleType("dnnlib.util"), ModuleType("torch_utils.persistence")

    def rebuild(facts: Any) -> None:
        raise RuntimeError("a snapshot was executed")

    rebuild.__module__, rebuild.__qualname__ = persistence.__name__, "_reconstruct_persistent_obj"
    rebuild.__name__ = rebuild.__qualname__
    vars(persistence)[rebuild.__name__] = rebuild
    vars(util)["EasyDict"] = EasyDict
    EasyDict.__module__ = util.__name__
    stand_ins = {"dnnlib": ModuleType("dnnlib"), util.__name__: util}
    stand_ins |= {"torch_utils": ModuleType("torch_utils"), persistence.__name__: persistence}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        EasyDict.__module__ = __name__
        for name in stand_ins:
            del sys.modules[name]


def module_state(**own: Any) -> dict[str, Any]:
    """The attributes of a module of torch, with hooks and all."""
    module = nn.Module().eval()
    return {**vars(module), "_non_persistent_buffers_set": set(), **own}


def module_tree(weights: Mapping[str, Tensor], kwargs: Mapping[str, Any]) -> Persistent:
    """The nested module objects of an EDM2 network with these weights."""
    return _module("Precond", weights, {"_init_args": (), "_init_kwargs": dict(kwargs)})


def _module(class_name: str, weights: Mapping[str, Tensor], own: Mapping[str, Any]) -> Persistent:
    direct = {name: tensor for name, tensor in weights.items() if "." not in name}
    buffers = {name: tensor for name, tensor in direct.items() if name in ("freqs", "phases")}
    parameters = {
        name: nn.Parameter(tensor, requires_grad=False)
        for name, tensor in direct.items()
        if name not in buffers
    }
    inner: dict[str, Any] = {}
    for name in dict.fromkeys(key.partition(".")[0] for key in weights if "." in key):
        part = {k.partition(".")[2]: v for k, v in weights.items() if k.startswith(f"{name}.")}
        inner[name] = _module("MPConv", part, {"_init_args": (), "_init_kwargs": {}})
        if name in ("enc", "dec"):
            container = nn.ModuleDict().eval()
            vars(container)["_modules"] = inner[name].state["_modules"]
            inner[name] = container
    state = module_state(_parameters=parameters, _buffers=buffers, _modules=inner)
    return Persistent(class_name, {**state, **own})


def write_snapshot(
    path: Path,
    weights: Mapping[str, Tensor],
    kwargs: Mapping[str, Any],
    *,
    encoder: str | None = "vae",
    protocol: int = 4,
    **extra: Any,
) -> None:
    """An EDM2 network snapshot; `kwargs` are the network's constructor options."""
    encoders = {
        "vae": Persistent("StabilityVAEEncoder", VAE),
        "rgb": Persistent("StandardRGBEncoder", {"_init_args": (), "_init_kwargs": {}}),
    }
    with official_names(), path.open("wb") as file:
        data = EasyDict()
        if encoder is not None:
            data["encoder"] = encoders[encoder]
        data["dataset_kwargs"] = EasyDict(path="datasets/img.zip", use_labels=True)
        data["loss_fn"] = Persistent("EDM2Loss", {"P_mean": -0.4, "P_std": 1.0})
        data["ema"] = module_tree(weights, kwargs)
        data.update(extra)
        _dump(file, data, protocol)


def _dump(file: BinaryIO, data: Any, protocol: int) -> None:
    _Pickler(file, protocol=protocol).dump(data)


def write_training_state(
    path: Path,
    net: Mapping[str, Tensor],
    emas: Mapping[float, Mapping[str, Tensor]],
    nimg: int | None,
) -> None:
    """An EDM2 training state, with an optimizer that is larger than all the rest."""
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": t * 0} for i, t in enumerate(net.values())}
    with official_names():
        data = {
            "state": EasyDict(
                {} if nimg is None else {"cur_nimg": nimg, "total_elapsed_time": 1.5}
            ),
            "net": OrderedDict(net),
            "loss_fn": {"P_mean": -0.4, "_init_args": ()},
            "optimizer": {"state": moments, "param_groups": [{"lr": 0.01, "betas": (0.9, 0.99)}]},
            "ema": {"stds": list(emas), "emas": [dict(state) for state in emas.values()]},
        }
        torch.save(data, path)


def write_sit(
    path: Path,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None,
    **args: Any,
) -> None:
    """A SiT training checkpoint; without `ema` only raw weights."""
    data: dict[str, Any] = {"model": OrderedDict(model)}
    if ema is not None:
        data["ema"] = OrderedDict(ema)
    data["opt"] = {"state": {0: {"exp_avg": torch.zeros(5)}}, "param_groups": [{"lr": 1e-4}]}
    data["args"] = argparse.Namespace(**args)
    torch.save(data, path)


def random_weights(
    shapes: Sequence[tuple[str, Sequence[int]]], dtype: torch.dtype, seed: int
) -> dict[str, Tensor]:
    """Normal numbers in tensors of these names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tuple(s), generator=generator).to(dtype) for name, s in shapes}
