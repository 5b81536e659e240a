"""Networks of the library diffusers, by their config and the config of their scheduler."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from merge_rl.core.network import Network
from merge_rl.core.sampling.compatibility import require_class_ids
from merge_rl.core.sampling.description import describe
from merge_rl.core.sampling.steps import SPACINGS
from merge_rl.errors import ConfigError, MissingLibraryError

CLASSES: Final = ("UNet2DModel", "DiTTransformer2DModel")
PREDICTIONS: Final = {"epsilon": "noise", "v_prediction": "velocity", "sample": "denoised"}
SCHEDULES: Final = ("linear", "scaled_linear", "squaredcos_cap_v2")
MOST_PIXELS: Final = 4096  # along an axis: positions of a transformer are made beforehand
MOST_STEPS: Final = 100_000
MOST_ITEMS, MOST_LAYERS, MOST_COUNT = 32, 200, 2**24  # of lists, modules in a row, numbers


def diffusers_network(
    *, network: Mapping[str, Any], scheduler: Mapping[str, Any], num_classes: int | None = None
) -> Network:
    """diffusers' own network, as a denoiser over the noise levels of its scheduler's steps.

    Args:
        network: the config.json of a folder of diffusers: "_class_name", one of `CLASSES`, and the
            constructor's options.
        scheduler: the scheduler_config.json: betas, what is predicted, how steps are spaced. A
            discrete DDPM schedule (Ho et al., 2020, arXiv:2006.11239); other entries have no part
            in it, as samples are not clipped.
        num_classes: classes besides a null class, which has the last row of the label table where
            that has one row more; None: all rows are classes.

    The network's outputs are those of the library, its tensors have the library's names; see
    `merge_rl.describe` for how it is sampled: Euler's step is DDIM's. Nothing is imported by a name
    in the config. Raises MissingLibraryError without diffusers, ConfigError for what is not such a
    network or no such schedule.
    """
    name = network.get("_class_name")
    if name not in CLASSES:
        raise ConfigError(f"expected a network of diffusers, {' or '.join(CLASSES)}, got {name!r}")
    built = _build(str(name), {k: v for k, v in network.items() if not k.startswith("_")})
    inputs, size = built.config.in_channels, built.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    rows = built.config.num_class_embeds if name == "UNet2DModel" else _rows_of_dit(built)
    classes = (rows or 0) if num_classes is None else num_classes
    if rows is not None and classes not in (rows, rows - 1):
        raise ConfigError(
            f"expected num_classes {rows} (no null class) or {rows - 1} (with one), got {classes}"
        )
    if rows is None and classes:
        raise ConfigError(f"the network takes no labels, got num_classes {classes}")
    built.__class__ = types.new_class(built.__class__.__name__, (_Called, built.__class__))
    built.__dict__["label_rows"] = rows
    return describe(
        built, prediction=_prediction(scheduler), time="down", betas=betas_of(scheduler),
        sample_shape=(inputs, height, width), label_dim=classes,
        null_label=classes if rows == classes + 1 else None,
        spacing=scheduler.get("timestep_spacing", "leading"),
        offset=scheduler.get("steps_offset", 0),
    )  # fmt: skip


class _Called(nn.Module):
    """What is put before a class of the library: called as module(x, t, labels) -> tensor."""

    label_rows: int | None

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.label_rows is not None:
            if labels is None:
                raise ConfigError("the network has no null class; expected labels, got none")
            require_class_ids(labels, self.label_rows)
        out: Tensor = super().forward(x, t, class_labels=labels, return_dict=False)[0]
        return out


def _build(name: str, options: Mapping[str, Any]) -> Any:
    try:
        import diffusers
    except ImportError:
        raise MissingLibraryError(f"the network {name}", "diffusers", "latent") from None
    where = f"the network {name} does not take this config"
    _require_options(options, where)
    size = options.get("sample_size")
    sizes = size if isinstance(size, (list, tuple)) and len(size) == 2 else [size]
    if not all(type(n) is int and 1 <= n <= MOST_PIXELS for n in sizes):
        raise ConfigError(f"{where}: expected sample_size from 1 to {MOST_PIXELS}, got {size!r}")
    if options.get("time_embedding_type", "positional") != "positional":
        found = options["time_embedding_type"]
        raise ConfigError(f"{where}: expected time_embedding_type positional, got {found!r}")
    if options.get("class_embed_type") is not None:
        found = options["class_embed_type"]
        raise ConfigError(f"{where}: expected classes by number, got class_embed_type {found!r}")
    kind = diffusers.UNet2DModel if name == "UNet2DModel" else diffusers.DiTTransformer2DModel
    unknown = sorted(options.keys() - inspect.signature(kind.__init__).parameters.keys())
    if unknown:
        raise ConfigError(f"{where}: there is no option {unknown[0]!r}")
    built = kind(**options)
    outputs, inputs = (
        built.config.out_channels or built.config.in_channels,
        built.config.in_channels,
    )
    if outputs not in (inputs, 2 * inputs):
        raise ConfigError(f"{where}: expected as many outputs as inputs, or twice as many")
    return built


def _require_options(options: Mapping[str, Any], where: str) -> None:
    """Refuse numbers and lists that no network has, before any is built."""
    for key, value in options.items():
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if len(items) > MOST_ITEMS:
            raise ConfigError(f"{where}: expected {key} of at most {MOST_ITEMS} items")
        most = MOST_LAYERS if key in ("num_layers", "layers_per_block") else MOST_COUNT
        for item in items:
            if type(item) in (int, float) and not 0 <= item <= most:
                raise ConfigError(f"{where}: expected {key} from 0 to {most}, got {item!r:.60}")


def _rows_of_dit(network: Any) -> int:
    """Rows of its label tables: the null class has the last."""
    table: Tensor = network.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    return len(table)


def _prediction(scheduler: Mapping[str, Any]) -> str:
    found = scheduler.get("prediction_type", "epsilon")
    if found not in PREDICTIONS:
        raise ConfigError(
            f"the scheduler's prediction_type is {found!r}, expected {', '.join(PREDICTIONS)}"
        )
    spacing = scheduler.get("timestep_spacing", "leading")
    if spacing not in SPACINGS:
        raise ConfigError(
            f"the scheduler's timestep_spacing is {spacing!r}, expected {', '.join(SPACINGS)}"
        )
    return PREDICTIONS[found]


def betas_of(scheduler: Mapping[str, Any]) -> Sequence[float]:
    """The variances of a scheduler's T steps, float64; ConfigError for what is none.

    linear             from beta_start to beta_end, equally spaced
    scaled_linear      squares of equally spaced square roots (Rombach et al., 2022)
    squaredcos_cap_v2  1 - f((i + 1) / T) / f(i / T), 0.999 at most,
                       f(u) = cos^2(pi / 2 (u + 0.008) / 1.008)
                       (Nichol & Dhariwal, 2021, arXiv:2102.09672, equation 17)
    """
    if not any(key in scheduler for key in ("beta_schedule", "trained_betas", "beta_start")):
        found = scheduler.get("_class_name") or "one without betas"
        raise ConfigError(f"expected a scheduler of discrete steps with betas, got {found}")
    if scheduler.get("rescale_betas_zero_snr"):
        raise ConfigError("a schedule that ends in pure noise has no finite noise level there")
    trained = scheduler.get("trained_betas")
    if trained is not None:
        if not isinstance(trained, (list, tuple)) or not all(map(_is_share, trained)):
            raise ConfigError("expected trained_betas as numbers between 0 and 1")
        return [float(beta) for beta in trained]
    count, name = scheduler.get("num_train_timesteps", 1000), scheduler.get("beta_schedule")
    first, last = (
        scheduler.get(f"beta_{key}", value) for key, value in (("start", 1e-4), ("end", 0.02))
    )
    if type(count) is not int or not 2 <= count <= MOST_STEPS:
        raise ConfigError(f"expected num_train_timesteps from 2 to {MOST_STEPS}, got {count!r}")
    if not (_is_share(first) and _is_share(last)):
        raise ConfigError(f"expected beta_start and beta_end between 0 and 1, got {first}, {last}")
    if name in ("linear", None):
        spaced = torch.linspace(first, last, count, dtype=torch.float64, device="cpu")
    elif name == "scaled_linear":
        roots = torch.linspace(first**0.5, last**0.5, count, dtype=torch.float64, device="cpu")
        spaced = roots.square()
    elif name == "squaredcos_cap_v2":
        at = torch.arange(count + 1, dtype=torch.float64, device="cpu") / count
        kept = ((at + 0.008) / 1.008 * (math.pi / 2)).cos().square()
        spaced = (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
    else:
        raise ConfigError(f"the beta_schedule is {name!r}, expected {', '.join(SCHEDULES)}")
    betas: list[float] = spaced.tolist()
    return betas


def _is_share(value: object) -> bool:
    return type(value) in (int, float) and 0 < float(value) < 1  # type: ignore[arg-type]
