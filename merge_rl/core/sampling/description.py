"""Networks that say what they predict, over which time: made such as the samplers take them."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from merge_rl.config import PATH_NAMES
from merge_rl.core.network import Network
from merge_rl.core.sampling.paths import VP
from merge_rl.core.sampling.steps import BETAS, SPACINGS, StepLevels, betas_of
from merge_rl.errors import ConfigError

PREDICTIONS: Final = ("denoised", "velocity", "noise")
TIMES: Final = ("sigma", "up", "down")
_KNOWN: Final = {
    "prediction": PREDICTIONS, "time": TIMES, "path": PATH_NAMES, "spacing": SPACINGS,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What a network computes; see `describe`."""

    prediction: str
    time: str
    sample_shape: tuple[int, ...]
    path: str | None = None
    betas: tuple[float, ...] | None = None
    label_dim: int = 0
    null_label: int | None = None
    spacing: str = "linspace"
    offset: int = 0

    def __post_init__(self) -> None:
        for what, names in _KNOWN.items():
            found = getattr(self, what)
            if found not in names and (what, found) != ("path", None):
                raise ConfigError(f"expected {what} {', '.join(names)}, got {found!r}")
        shape: Any = self.sample_shape
        if type(shape) is not tuple or not all([shape, *(type(n) is int and n > 0 for n in shape)]):
            raise ConfigError(f"expected sample_shape of whole numbers > 0, got {shape!r}")
        for what in ("label_dim", "null_label"):
            if type(count := getattr(self, what) or 0) is not int or count < 0:
                raise ConfigError(f"expected {what} a whole number >= 0, got {count!r}")
        self._require_schedule()

    def _require_schedule(self) -> None:
        given = [name for name in ("path", "betas") if getattr(self, name) is not None]
        if self.time == "sigma" and (given or self.prediction == "velocity"):
            found = given[0] if given else "velocity"
            raise ConfigError(f"expected no {found} over noise levels (time sigma), got one")
        if self.time != "sigma" and len(given) != 1:
            found = " and ".join(given) or "neither"
            raise ConfigError(f"expected path or betas for the time {self.time!r}, got {found}")
        if self.betas is not None:
            if self.time != "down":
                raise ConfigError("expected time 'down' with betas: steps rise with the noise")
            odd = [beta for beta in self.betas if not 0 < beta < 1]
            if odd or len(self.betas) < 2:
                raise ConfigError(f"{BETAS}, got {odd[0] if odd else self.betas}")
        if type(self.offset) is not int or not 0 <= self.offset < len(self.betas or (0,)):
            raise ConfigError(
                f"expected an offset within the steps of the betas, got {self.offset}"
            )

    @property
    def family(self) -> str:
        """What samplers see: a velocity along a path, or else a denoiser over noise levels."""
        return "velocity" if self.path and self.prediction == "velocity" else "denoised"

    def own_time(self, sigma: Tensor) -> Tensor:
        """The network's time at noise levels: the level, t, or a (fractional) step of the betas."""
        if self.time == "sigma":
            return sigma
        if self.betas is not None:
            return _levels(self.betas).step_of(sigma)
        t = _TIMES_OF[str(self.path)](sigma)
        return t if self.time == "up" else 1 - t

    def scale(self, sigma: Tensor) -> Tensor:
        """What x at noise levels is multiplied by before the network sees it: the data's share."""
        if self.time == "sigma":
            return torch.ones_like(sigma)
        return 1 / (1 + sigma) if self.path == "linear" else (1 + sigma.square()).rsqrt()


def describe(
    module: nn.Module,
    *,
    prediction: str = "",
    time: str = "",
    sample_shape: Sequence[int] = (),
    path: str | None = None,
    betas: Sequence[float] | Tensor | None = None,
    label_dim: int = 0,
    null_label: int | None = None,
    spacing: str = "linspace",
    offset: int = 0,
) -> Network:
    """The module as a network that every command takes; its weights keep their names.

    It is called as `module(x, t)`, with x (B, ...) and t (B,) float32, and with labels (B,) int64
    behind them where it has classes.

        >>> import torch, merge_rl as mrl
        >>> class Flow(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(3, 2)
        ...     def forward(self, x, t):
        ...         return self.layer(torch.cat([x, t[:, None]], 1))
        >>> flow = mrl.describe(
        ...     Flow(), prediction="velocity", time="up", path="linear", sample_shape=[2]
        ... )
        >>> mrl.sample(flow, torch.zeros(5, 2), num_steps=4).shape
        torch.Size([5, 2])

    Args:
        module: changed in place, and returned.
        prediction: "denoised" (the clean sample d), "noise" (the unit noise e) or "velocity": dx/dt
            along a path x = alpha d + sigma e, and with betas alpha e - sigma d.
        time: "sigma" for noise levels of x = d + sigma e; "up" where t rises from noise (0) to data
            (1); "down" where it falls from noise (1, or the last step of the betas) to data (0).
        sample_shape: of one sample, of any rank.
        path: "linear", "gvp" or "vp", of a network over t.
        betas: of a network over discrete steps 0..T-1 (Ho et al., 2020, arXiv:2006.11239); of an
            output with twice the channels the first half is taken.
        label_dim: number of classes; 0: the module takes no labels.
        null_label: the class id that means no class.
        spacing, offset: how steps of the betas are chosen, see `StepLevels.ladder`.

    Networks over noise levels, and all that predict the clean sample or the noise, are sampled over
    noise levels as EDM's are, those of betas at the levels of their steps (Euler's step is DDIM's);
    velocities along their path. Raises ConfigError where `prediction`, `time` or `sample_shape` is
    missing, or where arguments do not fit each other.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(f"expected a torch module, got {type(module).__name__}")
    steps = None if betas is None else betas_of(betas)
    shape: Any = tuple(sample_shape) if isinstance(sample_shape, Sequence) else sample_shape
    statement = Statement(
        prediction=prediction, time=time, sample_shape=shape, path=path, betas=steps,
        label_dim=label_dim, null_label=null_label, spacing=spacing, offset=offset,
    )  # fmt: skip
    return _stating(module, statement)


def _stating(module: nn.Module, statement: Statement) -> Network:
    """The module itself, of a class of its own that answers for its statement, the last one."""
    kind = type(module).__bases__[1] if isinstance(module, StatedNetwork) else type(module)
    stated = types.new_class(kind.__name__, (StatedNetwork, kind))
    stated.__module__ = kind.__module__
    module.__class__ = stated
    module.__dict__["statement"] = statement
    made: Network = module  # type: ignore[assignment]
    return made


def network_of(built: Any, name: str) -> Network:
    """What a factory returned as a network: described already, or by its attributes.

    Raises ConfigError for what is no module, or does not say what it predicts over which time.
    """
    if not isinstance(built, nn.Module):
        raise ConfigError(f"network {name!r}: expected a torch module, got {type(built).__name__}")
    if isinstance(built, Network):
        return built
    for what, known in (
        ("prediction", PREDICTIONS),
        ("time", TIMES),
        ("sample_shape", ("(C, H, W)",)),
    ):
        if getattr(built, what, None) is None:
            raise ConfigError(
                f"network {name!r} does not state its {what}: expected an attribute {what!r} "
                f"({', '.join(known)}), or merge_rl.describe"
            )
    given = {
        key: getattr(built, key)
        for key in Statement.__dataclass_fields__.keys() - {"spacing", "offset"}  # common names
        if getattr(built, key, None) is not None
    }
    try:
        return describe(built, **given)
    except ConfigError as error:
        raise ConfigError(f"network {name!r}: {error}") from None


class StatedNetwork(Network):
    """What `describe` puts before a module's own class: its forward pass as samplers call it."""

    statement: Statement

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return self.statement.sample_shape

    @property
    def prediction(self) -> str:
        """What samplers see."""
        return self.statement.family

    @property
    def stated_path(self) -> str | None:
        """The path that its velocities are along."""
        return self.statement.path if self.statement.family == "velocity" else None

    @property
    def noise_levels(self) -> Callable[..., Tensor] | None:
        """(num_steps, dtype) -> the levels of its own steps, where it was trained on such."""
        said = self.statement
        if said.betas is None:
            return None
        ladder = _levels(said.betas).ladder
        return functools.partial(ladder, spacing=said.spacing, offset=said.offset)

    @property
    def label_dim(self) -> int:
        """Number of classes."""
        return self.statement.label_dim

    @property
    def null_label(self) -> int | None:
        """The class id of no class."""
        return self.statement.null_label

    def forward(self, x: Tensor, level: Tensor, labels: Tensor | None = None) -> Tensor:
        """The denoised sample at a noise level, or the velocity at t: level is 0-dim or (B,)."""
        said, levels = self.statement, level.to(x).expand(len(x))
        given = () if said.label_dim == 0 else (self._labels(labels, x),)
        if said.family == "velocity":
            up = said.time == "up"
            made = self._made(x, levels if up else 1 - levels, *given)
            return made if up else -made
        scale = _wide(said.scale(levels), x)
        seen = scale * x
        made = self._made(seen, said.own_time(levels), *given)
        sigma = _wide(levels, x)
        if said.prediction == "noise":
            return x - sigma * made
        return made if said.prediction == "denoised" else scale * seen - scale * sigma * made

    def _made(self, x: Tensor, t: Tensor, *given: Tensor | None) -> Tensor:
        """What the module's own class makes, of the shape of x, which arithmetic would widen to."""
        made: object = super().forward(x, t, *given)
        if isinstance(made, Tensor):
            if self.statement.betas is not None and made.shape[1:2] == (2 * x.shape[1],):
                made = made[:, : x.shape[1]]  # the rest is a learned variance
            if made.shape == x.shape:
                return made
        found = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ConfigError(
            f"the network {type(self).__name__} returned {found} for samples {tuple(x.shape)}; "
            "expected a tensor of their shape"
        )

    def _labels(self, labels: Tensor | None, x: Tensor) -> Tensor | None:
        if labels is None and self.null_label is not None:
            return torch.full((len(x),), self.null_label, dtype=torch.int64, device=x.device)
        return labels


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _linear(sigma: Tensor) -> Tensor:
    """sigma = (1 - t) / t."""
    return 1 / (1 + sigma)


def _gvp(sigma: Tensor) -> Tensor:
    """sigma = cot(pi t / 2)."""
    return 2 / math.pi * torch.atan2(torch.ones_like(sigma), sigma)


def _vp(sigma: Tensor) -> Tensor:
    """log alpha = -log(1 + sigma^2) / 2 is a square in 1 - t."""
    square, slope = (VP.beta_max - VP.beta_min) / 4, VP.beta_min / 2
    left = (slope**2 + 2 * square * torch.log1p(sigma.square())).sqrt() - slope
    return (1 - left / (2 * square)).clamp(0, 1)


_TIMES_OF: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "linear": _linear, "gvp": _gvp, "vp": _vp,
}  # fmt: skip


@functools.lru_cache(maxsize=8)
def _levels(betas: tuple[float, ...]) -> StepLevels:
    return StepLevels(torch.tensor(betas, dtype=torch.float64, device="cpu"))
