"""What a searcher knows of the problem it searches: sizes, the map, the checkpoints' places."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from merge_rl.core.coefficients import CoefficientMap, FreeMap
from merge_rl.errors import ConfigError


@dataclass(frozen=True, eq=False, kw_only=True)
class SearchSpace:
    """The vectors theta (D,), the coefficients (G, K) they stand for, and what these weigh.

    `names`, `nimg` and `ema_std` are of the K checkpoints, None where a manifest does not say.
    `evaluations` is about how many candidates the budget pays for, for methods that plan ahead.
    """

    map: CoefficientMap
    names: tuple[str, ...]
    nimg: tuple[int | None, ...] = ()
    ema_std: tuple[float | None, ...] = ()
    evaluations: int = 100
    origin: Tensor = field(init=False)  # (D,) theta = 0, where every search begins

    def __post_init__(self) -> None:
        count = self.map.num_checkpoints
        unknown = (None,) * count
        object.__setattr__(self, "nimg", self.nimg or unknown)
        object.__setattr__(self, "ema_std", self.ema_std or unknown)
        object.__setattr__(self, "origin", torch.zeros(self.map.dim, dtype=torch.float64))
        for name in ("names", "nimg", "ema_std"):
            if len(getattr(self, name)) != count:
                raise ConfigError(
                    f"expected {name} of {count} checkpoints, got {len(getattr(self, name))}"
                )
        if self.dim < 1:
            raise ConfigError(f"nothing to search: theta has {self.dim} dimensions")
        if self.evaluations < 1:
            raise ConfigError(f"expected at least 1 evaluation, got {self.evaluations}")

    @classmethod
    def plain(cls, dim: int, evaluations: int = 100) -> SearchSpace:
        """A space without structure: coefficients are theta itself, of `dim` checkpoints."""
        if dim < 1:
            raise ConfigError(f"nothing to search: theta has {dim} dimensions")
        init = torch.zeros(dim, dtype=torch.float64)
        names = tuple(f"checkpoint-{i}" for i in range(dim))
        return cls(map=FreeMap(init=init, scale=1.0), names=names, evaluations=evaluations)

    @property
    def dim(self) -> int:
        """D."""
        return self.map.dim

    @property
    def num_checkpoints(self) -> int:
        """K."""
        return self.map.num_checkpoints

    def coefficients(self, theta: Tensor) -> Tensor:
        """(D,) -> (G, K)."""
        return self.map(theta)

    def theta_of(self, coefficients: Tensor) -> Tensor:
        """The theta (D,) that stands for coefficients (K,), shared by all groups, or (G, K).

        Raises ConfigError where the map cannot reach them.
        """
        rows = coefficients.to(torch.float64)
        if rows.ndim == 1:
            rows = rows.expand(self.map.num_groups, -1)
        return self.map.theta_of(rows)
