"""Low-rank adapters (PEFT's LoRA): as their factors, or as the products that change the weights.

A layer's change is scale · B A, with A (r, in), B (out, r) and scale = alpha / r (alpha / √r of
rank-stabilised ones). Factors of one run lie close, so that their averages make an adapter of the
same rank; the average of products is exact, and as large as the layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from merge_rl.config import real_number, whole_number
from merge_rl.errors import CheckpointError, ConfigError, IncompatibleCheckpointError
from merge_rl.late import torch
from merge_rl.storage.convert.contents import NO_HINTS, Extracted, Hints, plain
from merge_rl.storage.pickles import StorageRef, TensorRef, row_major
from merge_rl.untrusted import load_json_mapping, read_bounded

CONFIG: Final = "adapter_config.json"
_FACTOR: Final = re.compile(r"(?P<layer>.+)\.lora_(?P<part>A|B)(?:\.(?P<name>[^.]+))?\.weight")
_MOST: Final = 2**36  # bytes of all products: what a small file may grow to
_ROWS: Final = 256  # of a product that are made at once
_BASE: Final = "base_model_name_or_path"
_ALIKE: Final = (
    "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out", "alpha_pattern", "rank_pattern",
    _BASE,
)  # fmt: skip
_OR_PRODUCTS: Final = "--adapters products, which hold the scale of each"
# Beginnings of the factors that are taken out of the base's weights.
_OTHER_BASES: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
_DEFAULTS: Final = {"lora_alpha": 8}  # of the library
_LAYER: Final = re.compile(r"(\^?)((?:\w|\\?\.)+)\$?")


class ProductRef(TensorRef):
    """scale · B A, made in float32 when it is read, some rows at a time."""

    __slots__ = ("down", "scale", "turned", "up")

    def __init__(self, up: TensorRef, down: TensorRef, scale: float, *, turned: bool) -> None:
        shape = (up.shape[0], *down.shape[1:])
        shape = (shape[1], shape[0]) if turned else shape
        super().__init__(StorageRef("F32", math.prod(shape)), 0, shape, tuple(row_major(shape)))
        self.up, self.down, self.scale, self.turned = up, down, scale, turned

    def pieces(self, size: int) -> Iterator[bytes]:
        """The elements' bytes in row-major order, at most `size` bytes at a time."""
        left, right = self._factors()
        for begin in range(0, len(left), _ROWS):
            rows = (self.scale * (left[begin : begin + _ROWS] @ right)).numpy().tobytes()
            yield from (rows[i : i + size] for i in range(0, len(rows), size))

    def load(self) -> torch.Tensor:
        """The tensor in memory."""
        left, right = self._factors()
        product: torch.Tensor = self.scale * (left @ right)
        return product.reshape(self.shape)

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        up, down = (ref.load().float().flatten(1) for ref in (self.up, self.down))
        return (down.T.contiguous(), up.T.contiguous()) if self.turned else (up, down)


def adapter_config(folder: Path) -> dict[str, Any]:
    """An adapter's own settings; CheckpointError where they are not LoRA's."""
    path = folder / CONFIG
    config = load_json_mapping(read_bounded(path), str(path))
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: expected an adapter of the type LORA, found {kind!r}")
    if not whole_number(config.get("r")) or config["r"] < 1:
        raise CheckpointError(f"{path}: expected its rank r, found {config.get('r')!r}")
    return config


def rank_of(item: Extracted) -> int:
    """The rank that an adapter's settings say."""
    return int(item.facts["adapter"]["r"])


def require_one_kind(found: list[Extracted], hints: Hints = NO_HINTS) -> None:
    """Refuse adapters of other bases, and as factors those of another rank or scale.

    A product holds its own scale, and its shape is that of the layer whatever the rank. A word on
    `--adapters products` where there are no adapters.
    """
    adapters = [item for item in found if "adapter" in item.facts]
    if hints.adapters == "products" and not adapters:
        raise ConfigError(
            f"{found[0].path}: no adapter, of which --adapters products says how it is taken; "
            f"expected a folder with {CONFIG}"
        )
    products = hints.adapters == "products"
    for item in adapters[1:]:
        first = adapters[0]
        if rank_of(item) != rank_of(first) and not products:
            raise IncompatibleCheckpointError(
                f"{first.path} is an adapter of rank {rank_of(first)} and {item.path} one of rank "
                f"{rank_of(item)}; expected one rank, or {_OR_PRODUCTS}"
            )
        for key in (_BASE,) if products else _ALIKE:
            here, there = (
                one.facts["adapter"].get(key, _DEFAULTS.get(key)) for one in (item, first)
            )
            silent = key == _BASE and None in (here, there)
            if (here or None) != (there or None) and not silent:
                way = f", or {_OR_PRODUCTS}" if key not in (_BASE, "use_dora") else ""
                raise IncompatibleCheckpointError(
                    f"{item.path}: an adapter with {key} {here}, expected {there} as in "
                    f"{first.path}{way}"
                )


def as_factors(tensors: Mapping[str, TensorRef], folder: Path) -> dict[str, TensorRef]:
    """The tensors of an adapter as they are; CheckpointError where none is a factor."""
    if not any(_FACTOR.fullmatch(name) for name in tensors):
        raise CheckpointError(f"{folder}: an adapter without lora_A and lora_B")
    return dict(tensors)


def as_products(
    tensors: Mapping[str, TensorRef], config: Mapping[str, Any], folder: Path
) -> dict[str, TensorRef]:
    """The changes of the layers by their weights' names, and what is no factor as it is: weights.

    Raises CheckpointError for factors that do not fit, and for adapters whose change is no product.
    """
    if config.get("use_dora"):
        raise CheckpointError(f"{folder}: a DoRA, whose change is no product; take its factors")
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_OTHER_BASES):
        raise CheckpointError(
            f"{folder}: begun as {begun:.40}, which changes the base too; take its factors"
        )
    for key in ("target_parameters", "trainable_token_indices"):
        if config.get(key):
            raise CheckpointError(f"{folder}: an adapter with {key}; take its factors")
    factors: dict[str, dict[str, TensorRef]] = {}
    found: dict[str, TensorRef] = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match:
            factors.setdefault(match["layer"], {})[match["part"]] = tensor
        elif ".lora_" in name:
            raise CheckpointError(f"{folder}: {name} is no factor of a layer; take its factors")
        else:
            found[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = tensor
    for layer, pair in factors.items():
        if pair.keys() != {"A", "B"}:
            raise CheckpointError(f"{folder}: {layer} has lora_{next(iter(pair))} alone")
        short = layer.removeprefix("base_model.model.")
        found[f"{short}.weight"] = _product(pair["B"], pair["A"], config, short, folder)
    total = sum(tensor.nbytes for tensor in found.values())
    if total > _MOST or not factors:
        problem = f"products of {total} bytes" if factors else "an adapter without lora_A, lora_B"
        raise CheckpointError(f"{folder}: {problem}; expected at most {_MOST} bytes of products")
    return found


def _product(
    up: TensorRef, down: TensorRef, config: Mapping[str, Any], layer: str, folder: Path
) -> TensorRef:
    rank = down.shape[0] if down.shape else 0
    flat = len(up.shape) == len(down.shape) >= 2 and math.prod(up.shape[2:]) == 1
    if not flat or not rank or up.shape[1] != rank:
        raise CheckpointError(
            f"{folder}: the factors of {layer} have shapes {list(up.shape)} and {list(down.shape)},"
            " expected (out, r) and (r, in)"
        )
    if not config.get("rank_pattern") and rank != config.get("r", rank):
        raise CheckpointError(
            f"{folder}: the factors of {layer} have rank {rank}, expected {config['r']} as "
            f"{CONFIG} says"
        )
    said = _pattern(config, layer, folder)
    alpha = real_number(config.get("lora_alpha", 8) if said is None else said)
    if not alpha:
        raise CheckpointError(f"{folder}: expected a number other than 0 as lora_alpha of {layer}")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    turned = bool(config.get("fan_in_fan_out")) and len(down.shape) == 2
    return ProductRef(up, down, scale, turned=turned)


def _pattern(config: Mapping[str, Any], layer: str, folder: Path) -> object:
    """What the first pattern of alpha that means a layer says: the end of its name, or all of it.

    PEFT takes regular expressions; of files from anywhere only names are, with ^ and $.
    """
    patterns = config.get("alpha_pattern")
    for name, value in patterns.items() if isinstance(patterns, dict) else ():
        match = _LAYER.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{folder}: expected names of layers in alpha_pattern, found {name!r:.60}; take "
                "its factors"
            )
        end = match[2].replace("\\", "")
        if layer == end or (not match[1] and layer.endswith(f".{end}")):
            return value
    return None


def facts_of(config: Mapping[str, Any], how: str) -> dict[str, Any]:
    """What is kept of an adapter beside its tensors."""
    return {"adapter": plain(config), "adapter_as": how}


_TOOK: Final = {
    "products": "its products, which change the weights of the layers; merged exactly",
    "factors": "its factors, averaged each by itself; the merge is an adapter of the same rank",
}


def notes_of(tensors: Mapping[str, TensorRef], how: str) -> tuple[str, ...]:
    """What the user should hear of an adapter that was taken as its factors or products."""
    took = f"an adapter: took {_TOOK[how]} (--adapters)"
    whole = [name for name, tensor in tensors.items() if not isinstance(tensor, ProductRef)]
    if how == "factors" or not whole:
        return (took,)
    listed = ", ".join(whole[:3]) + (f" and {len(whole) - 3} more" if len(whole) > 3 else "")
    return (took, f"{listed}: no changes but weights, which take the place of the base's")
