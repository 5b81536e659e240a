"""SciPy's minimisers behind ask and tell: "scipy:nelder-mead", "scipy:differential-evolution".

SciPy runs a search itself and calls the objective. Control is turned around by replay: the
objective answers the calls from the log, in order, and raises at the first one that the log does
not hold, which is what to ask next. No threads, nothing to save but the log, and a restored search
is checked along the way. N candidates cost N²/2 answers from the log, microseconds each for most
methods; COBYLA's own algebra takes milliseconds a candidate, and it seldom asks more than a few
hundred (`nevergrad:Cobyla` keeps a thread waiting instead).

Nelder-Mead, Powell and COBYLA begin with steps of `std`, evaluate one candidate after the other
and end when their steps fall below `std` / 1000. Differential evolution stays in a box of
half-width `box` around its centre, asks its whole population at once and has no end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merge_rl.config import SearchConfig
from merge_rl.errors import UnknownNameError
from merge_rl.searchers import base as population
from merge_rl.searchers.base import SearchSpace
from merge_rl.searchers.replayed import Replayed

Array = npt.NDArray[np.float64]
SERIAL = {"cobyla": "COBYLA", "nelder-mead": "Nelder-Mead", "powell": "Powell"}
EVOLUTION = "differential-evolution"
RESOLUTION = 1e-3  # of the last steps, in the first ones
NO_LIMIT = 10**9  # of evaluations: the budget is not SciPy's to keep


class Scipy(Replayed):
    """Searcher around one of SciPy's minimisers."""

    _ended: bool

    def __init__(self, config: SearchConfig, space: SearchSpace, seed: int) -> None:
        super().__init__(config, space, seed)
        self.method = method_of(config)
        self.population = self.population_of(config)
        self._begin()

    @staticmethod
    def methods() -> list[str]:
        """All names after the colon."""
        return [*SERIAL, EVOLUTION]

    @staticmethod
    def population_of(config: SearchConfig) -> int:
        """Candidates a round: 1, or those of a generation of differential evolution."""
        if method_of(config) == EVOLUTION:
            return population.parallel(config, least=5)
        return population.serial(config)

    @property
    def done(self) -> bool:
        """Whether the method came to its end."""
        if self._asked is None and not self._ended:
            found = self._next()
            self._asked, self._ended = found, found is None
        return self._ended

    @property
    def _skips_lost_rounds(self) -> bool:
        return False  # SciPy asks on only once it has its answer

    def _begin(self) -> None:
        self._ended = False

    def _propose(self) -> Tensor:
        found = self._next()
        self._ended = found is None
        return torch.empty(0, self.space.dim) if found is None else found

    def _feed(self, rewards: Tensor) -> None:
        """Nothing: the log is all that SciPy is told from."""

    def _replay(self, thetas: Tensor, rewards: Tensor) -> None:
        # Each round is compared when SciPy calls for it.
        self._log(thetas, rewards)

    def _recommend(self) -> Tensor:
        # The round that is being learned from is in the log already.
        thetas, rewards = torch.cat(self._thetas), torch.cat(self._rewards)
        return thetas[int(rewards.argmax())].clone()

    def _next(self) -> Tensor | None:
        """The thetas (P, D) of the first call that the log does not answer; None at the end."""
        answers = zip(self._thetas, self._rewards, strict=True)

        def objective(asked: Array) -> Array:
            thetas = torch.from_numpy(np.atleast_2d(np.array(asked, dtype=np.float64)))
            logged = next(answers, None)
            if logged is None:
                raise _Unanswered(thetas)
            self._require_same(thetas, logged[0])
            return -logged[1].numpy()

        try:
            if self.method == EVOLUTION:
                self._evolve(lambda columns: objective(columns.T))
            else:
                self._descend(lambda theta: float(objective(theta)[0]))
        except _Unanswered as call:
            return call.thetas
        return None

    def _descend(self, objective: Callable[[Array], float]) -> None:
        from scipy.optimize import minimize

        start, step = self.centre.numpy().copy(), self.spread
        axes = step * np.eye(len(start))
        last = RESOLUTION * step
        options: Mapping[str, Mapping[str, object]] = {
            "cobyla": {"rhobeg": step, "tol": last},
            # The spread of noisy rewards says little: a simplex that is small is the end.
            "nelder-mead": {
                "initial_simplex": np.vstack([start, start + axes]),
                "xatol": last, "fatol": np.inf, "maxfev": NO_LIMIT,
            },
            "powell": {"direc": axes, "xtol": last, "ftol": 1e-9, "maxfev": NO_LIMIT},
        }  # fmt: skip
        with np.errstate(all="ignore"):
            minimize(
                objective, start, method=SERIAL[self.method],
                options={"maxiter": NO_LIMIT, **options[self.method]},
            )  # fmt: skip

    def _evolve(self, objective: Callable[[Array], Array]) -> None:
        from scipy.optimize import differential_evolution

        generator = np.random.default_rng(self._seed("evolution"))
        # Narrowed by `halve` as the first steps of the other methods are.
        reach = self.config.box * self.spread / self.config.std
        centre = self.centre.numpy()
        first = centre + reach * generator.uniform(-1, 1, size=(self.population, len(centre)))
        first[0] = centre
        with np.errstate(all="ignore"):
            differential_evolution(
                objective, np.stack([centre - reach, centre + reach], axis=1), init=first,
                maxiter=NO_LIMIT, tol=0, atol=-1,  # equal rewards are not the end
                vectorized=True, updating="deferred", polish=False, seed=generator,
            )  # fmt: skip


def method_of(config: SearchConfig) -> str:
    """The method's name, lower case; UnknownNameError names the known ones."""
    method = config.name.partition(":")[2].lower()
    known = (*SERIAL, EVOLUTION)
    if method not in known:
        raise UnknownNameError("searcher", f"scipy:{method}", [f"scipy:{name}" for name in known])
    return method


class _Unanswered(Exception):  # noqa: N818 (a message, not an error)
    """SciPy asks for thetas that the log does not hold."""

    def __init__(self, thetas: Tensor) -> None:
        super().__init__()
        self.thetas = thetas
