"""Any optimiser of the nevergrad library by its name, "nevergrad:TBPSA", behind ask and tell.

It begins at theta 0 with the standard deviation `std`; a round is `population` candidates, which
nevergrad calls workers. Its draws come from a generator of its own. Some of its optimisers draw
from NumPy's global generator all the same: that one is set before every call and put back after
it, so that a search neither depends on it nor moves it.
"""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from merge_rl.config import SearchConfig
from merge_rl.errors import ConfigError, UnknownNameError
from merge_rl.searchers import base as population
from merge_rl.searchers.base import SearchSpace
from merge_rl.searchers.replayed import Replayed

COMMON = ("CMA", "DiagonalCMA", "NGOpt", "OnePlusOne", "TBPSA", "TwoPointsDE")


class Nevergrad(Replayed):
    """Searcher around `nevergrad.optimizers.registry[name]`."""

    def __init__(self, config: SearchConfig, space: SearchSpace, seed: int) -> None:
        super().__init__(config, space, seed)
        self.population = self.population_of(config)
        self._begin()

    @staticmethod
    def methods() -> list[str]:
        """All names after the colon."""
        return sorted(_library().optimizers.registry)

    @staticmethod
    def population_of(config: SearchConfig) -> int:
        """Candidates a round; refuses unknown names, and populations of serial optimisers.

        Raises ConfigError too for what would hang with the installed SciPy.
        """
        method = find_optimizer(method_name(config))
        _require_reentrant(config.name)
        if getattr(method, "no_parallelization", False):
            return population.serial(config)
        return population.parallel(config, least=1)

    @property
    def done(self) -> bool:
        """Only for designs that are drawn up at once: when all of it was asked."""
        return self._asked is None and self._left == 0

    @property
    def finalists(self) -> dict[str, Tensor]:
        """What nevergrad recommends; of CMA-ES, which recommends its best draw, its mean too."""
        found = {"mean": self.mean}
        method = self._method
        while getattr(method, "_optim", None) is not None:  # one that chose another
            method = method._optim
        centre = getattr(getattr(method, "_es", None), "mean", None)
        if centre is not None and np.shape(centre) == (self.space.dim,):
            place = self.centre + self.spread * torch.from_numpy(np.array(centre, dtype=np.float64))
            found["distribution"] = place
        return found

    @property
    def _skips_lost_rounds(self) -> bool:
        return self.population > 1  # a serial one waits for its answer

    @property
    def _left(self) -> int | None:
        """Candidates that are left to ask, None without an end."""
        if not getattr(self._method, "one_shot", False):
            return None
        return max(0, self._budget - self.num_logged)

    def _begin(self) -> None:
        nevergrad = _library()
        self._pending: list[Any] = []
        self._ahead: list[Any] = []
        self._budget = max(self.population, self.space.evaluations - self.spent)
        sigma, name = self.spread, method_name(self.config)

        def make() -> Any:
            where = nevergrad.p.Array(init=self.centre.numpy().copy())
            where.set_mutation(sigma=sigma)
            # Before the optimiser is made: it would draw a seed from the global generator.
            where.random_state = np.random.RandomState(self._seed("method"))
            # A copy: some optimisers write into the entry they were made from.
            method = copy.deepcopy(find_optimizer(name))
            return method(where, budget=self._budget, num_workers=self.population)

        self._method = self._call("begin", make)

    def _call(self, what: str, job: Callable[[], Any]) -> Any:
        """Run a job of the library: warnings silenced, its failures as sentences."""
        try:
            with _quiet(self._seed(what, len(self._rewards))), _numbers_as_before():
                return job()
        except ImportError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{self.config.name} needs a package that nevergrad does not bring: {reason}"
            ) from None
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__} {error}".split())
            raise ConfigError(
                f"{self.config.name} failed (dimensions of theta: {self.space.dim}, population:"
                f" {self.population}): {reason}; expected another optimiser"
            ) from None

    def _propose(self) -> Tensor:
        count = self.population if self._left is None else min(self.population, self._left)
        if not self._ahead:
            self._ahead = self._call("ask", lambda: [self._method.ask() for _ in range(count)])
        self._pending, self._ahead = self._ahead, []
        return torch.from_numpy(np.stack([candidate.value for candidate in self._pending]))

    def _feed(self, rewards: Tensor) -> None:
        pending, self._pending = self._pending, []
        if bool(rewards.isnan().all()):
            return  # never told of: the next candidates are others

        def tell() -> None:
            for candidate, reward in zip(pending, rewards.tolist(), strict=True):
                self._method.tell(candidate, -reward)  # nevergrad minimises
            # A method in a thread of its own would go on unsilenced: wait until it asks again.
            if self.population == 1 and self._left is None:
                self._ahead = [self._method.ask()]

        self._call("tell", tell)

    def _recommend(self) -> Tensor:
        best = self._call("recommend", lambda: self._method.provide_recommendation().value)
        return torch.from_numpy(np.array(best, dtype=np.float64))


def method_name(config: SearchConfig) -> str:
    """The part of "family:method" after the colon."""
    return config.name.partition(":")[2]


def find_optimizer(name: str) -> Any:
    """nevergrad's optimiser of that name; UnknownNameError names the nearest ones."""
    known: Mapping[str, Any] = _library().optimizers.registry
    if name in known:
        return known[name]
    spelled = {key.lower(): key for key in known}
    near = difflib.get_close_matches(name.lower(), spelled, n=6, cutoff=0.5)
    # Hundreds of names are no help: the near ones, best first, and the common ones.
    nearest = [f"nevergrad:{spelled[key]}" for key in near]
    shown = {*nearest, *(f"nevergrad:{key}" for key in COMMON)}
    raise UnknownNameError("searcher", f"nevergrad:{name}", shown, nearest=nearest)


def _library() -> Any:
    with _quiet(0):  # the first import draws from the global generator
        import nevergrad
    return nevergrad


def _require_reentrant(name: str) -> None:
    # Before 1.16 SciPy's COBYLA lets in one caller at a time. nevergrad's waits inside for its
    # answer, and a second one, such as a restored search, would wait for the first for ever.
    if "Cobyla" in name and tuple(map(int, scipy.__version__.split(".")[:2])) < (1, 16):
        raise ConfigError(
            f"{name} needs scipy >= 1.16, found {scipy.__version__}; expected another searcher, "
            "such as scipy:cobyla"
        )


@contextmanager
def _quiet(seed: int) -> Iterator[None]:
    """No warnings, and NumPy's global generator at a seed of ours, its state put back after."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


@contextmanager
def _numbers_as_before() -> Iterator[None]:
    from nevergrad.optimization import metamodel

    # NumPy 2.4 no longer takes an array of one number for a number; nevergrad 1.0.12, whose NGOpt
    # fits models with this module, hands it one.
    vars(metamodel)["float"] = _number
    try:
        yield
    finally:
        del vars(metamodel)["float"]


def _number(value: Any) -> float:
    return float(np.asarray(value).item())
