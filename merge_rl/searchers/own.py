"""Searchers of the user's: what to derive from, and how the contract is held."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from merge_rl.config import SearchConfig
from merge_rl.errors import ConfigError, MergeRLError
from merge_rl.searchers.base import SearchSpace

_APART = "saved apart"
NEEDED = ("ask", "tell", "mean", "recenter", "state_dict", "load_state_dict")


class Searcher:
    """A method of one's own: derive from it, and hand over the class, or its name.

    It is made of the settings of the search, the space of thetas (`space.dim` numbers each, of unit
    scale, 0 where the search begins) and the seed. `ask` and `tell` are the method; `mean` is what
    it would report, which `tell` moves. A method with a state beside `mean` saves it too, so that
    an interrupted run ends as if it had not been. `done`, `finalists`, `halve`, `damp` and
    `population_of`, of `merge_rl.interfaces.Searcher`, may be there.

        >>> import torch, merge_rl as mrl
        >>> class Climber(mrl.Searcher):
        ...     def ask(self):
        ...         self.draw = torch.Generator().manual_seed(self.seed + self.rounds)
        ...         noise = torch.randn(8, self.space.dim, generator=self.draw)
        ...         return self.mean + 0.3 * noise.double()
        ...     def tell(self, thetas, rewards):
        ...         self.mean = thetas[rewards.nan_to_num(-1e9).argmax()]
        ...         self.rounds += 1
    """

    def __init__(self, config: SearchConfig, space: SearchSpace, seed: int) -> None:
        self.config, self.space, self.seed = config, space, seed
        self.mean, self.rounds = space.origin.clone(), 0

    def ask(self) -> Tensor:
        """The next thetas (P, D); asking again before telling gives the same."""
        raise NotImplementedError

    def tell(self, thetas: Tensor, rewards: Tensor) -> None:
        """Rewards (P,) of thetas (P, D), higher is better; NaN marks a failed candidate."""
        raise NotImplementedError

    def recenter(self, theta: Tensor) -> None:
        """Go on from theta (D,)."""
        self.mean = theta

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and texts by name: all to go on exactly."""
        return {"mean": self.mean, "rounds": self.rounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.mean, self.rounds = state["mean"], int(state["rounds"])


class OwnSearcher:
    """What the user's object proposes, checked; what it leaves out of the contract does nothing.

    Its saved state may be any mapping of tensors, numbers and texts. Raises ConfigError for an
    object that lacks what is needed, for thetas of another shape, for a state that cannot be saved,
    and for whatever the object itself raises.
    """

    def __init__(self, inner: Any, name: str, dim: int) -> None:
        self.inner, self.name, self.dim = inner, name, dim
        missing = [what for what in NEEDED if self._member(what) is None]
        if missing:
            raise ConfigError(
                f"searcher {name!r}: {type(inner).__name__} lacks {', '.join(missing)}; expected "
                "what merge_rl.Searcher has"
            )
        _ = self.mean

    def _told(self, what: str, action: Callable[[], Any]) -> Any:
        """What it gives; a failure of the user's code with the name of what failed."""
        try:
            return action()
        except MergeRLError:
            raise
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            raise ConfigError(f"searcher {self.name!r}: its {what} failed: {problem}") from error

    def _member(self, what: str) -> Any:
        return self._told(what, lambda: getattr(self.inner, what, None))

    @property
    def done(self) -> bool:
        """Whether there is nothing left to ask."""
        return bool(self._member("done"))

    def ask(self) -> Tensor:
        """Thetas (P, D) float64."""
        return self._theta("ask()", self._told("ask", self.inner.ask), 2)

    def tell(self, thetas: Tensor, rewards: Tensor) -> None:
        """Rewards (P,) of thetas (P, D); the object may do with both what it likes."""
        self._told("tell", lambda: self.inner.tell(thetas.clone(), rewards.clone()))

    @property
    def mean(self) -> Tensor:
        """The theta (D,) to report now."""
        return self._theta("mean", self._member("mean"), 1)

    @property
    def finalists(self) -> Mapping[str, Tensor]:
        """Thetas (D,) worth another look, the mean among them."""
        found = self._member("finalists") or {}
        named = {key: self._theta(f"finalists[{key!r}]", theta, 1) for key, theta in found.items()}
        return {"mean": self.mean, **named}

    def halve(self) -> None:
        """Pass on that all candidates failed."""
        self._told("halve", getattr(self.inner, "halve", lambda: None))

    def damp(self, factor: float) -> None:
        """Pass on that steps should be smaller, or may be larger."""
        damp = getattr(self.inner, "damp", lambda _factor: None)
        self._told("damp", lambda: damp(factor))

    def recenter(self, theta: Tensor) -> None:
        """Go on from theta (D,)."""
        self._told("recenter", lambda: self.inner.recenter(theta.clone()))

    def state_dict(self) -> dict[str, Any]:
        """The user's state, tensors apart from the rest."""
        state = self._told("state_dict", self.inner.state_dict)
        if not isinstance(state, Mapping):
            raise self._unsaved(type(state).__name__)
        if state.keys() == {"tensors", "scalars"}:  # apart already
            return {"tensors": state["tensors"], "scalars": {**state["scalars"], _APART: True}}
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        scalars = {key: value for key, value in state.items() if key not in tensors}
        for key, value in scalars.items():
            try:
                json.dumps({key: value})
            except (TypeError, ValueError):
                raise self._unsaved(f"{type(value).__name__} at {key!r}") from None
        return {"tensors": tensors, "scalars": scalars}

    def _unsaved(self, found: str) -> ConfigError:
        return ConfigError(
            f"searcher {self.name!r}: expected state_dict() of tensors, numbers and texts by name, "
            f"got {found}"
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        scalars = dict(state["scalars"])
        if scalars.pop(_APART, False):
            given = {"tensors": state["tensors"], "scalars": scalars}
        else:
            given = {**state["tensors"], **scalars}
        self._told("load_state_dict", lambda: self.inner.load_state_dict(given))

    def _theta(self, what: str, value: object, ndim: int) -> Tensor:
        found, expected = (
            type(value).__name__,
            f"({self.dim},)" if ndim == 1 else f"(P, {self.dim})",
        )
        if isinstance(value, Tensor):
            found = f"{tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
        good = isinstance(value, Tensor) and value.ndim == ndim and value.shape[-1] == self.dim
        if not isinstance(value, Tensor) or not good or 0 in value.shape or value.is_complex():
            raise ConfigError(
                f"searcher {self.name!r}: expected {what} a tensor {expected}, got {found}"
            )
        theta = value.detach().to("cpu", torch.float64).clone()
        if not theta.isfinite().all():
            raise ConfigError(
                f"searcher {self.name!r}: expected {what} finite, found NaN or infinity"
            )
        return theta
