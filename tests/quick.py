"""What takes long, left out where a test does not look at it: figures, networks, libraries."""

from __future__ import annotations

import functools
import importlib.util
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_rl.workflows.compare import match
from merge_rl.workflows.finetune import scores
from merge_rl.workflows.optimize import prepare
from merge_rl.workflows.report import figures, writing
from merge_rl.workflows.rollout.rollout import Rollout


class Late:
    """Stands for a module until a name of it is asked for.

    Every worker collects all tests; few need the seconds that some libraries take to load.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(import_module(self._name), name)

    def needed(self) -> pytest.MarkDecorator:
        """Skips the tests of a module where the library is not installed."""
        missing = importlib.util.find_spec(self._name) is None
        return pytest.mark.skipif(missing, reason=f"needs {self._name}")


def spare() -> None:
    """From now on nothing is drawn or estimated that takes longer than a tiny search.

    Pages have no figures, as where matplotlib is missing; pictures are as few as those of large
    images; nobody takes the time of images before a search.
    """
    figures.find_spec = _not_found  # type: ignore[attr-defined]
    prepare.SMALL = 0  # type: ignore[misc]
    scores.GRID_IMAGES = 10  # type: ignore[misc]
    for module in (prepare, match):
        module.image_seconds = lambda *_: 1e-4  # type: ignore[attr-defined]


def as_users_see_it(patch: pytest.MonkeyPatch) -> None:
    """Estimates and all pictures of a search again, until `patch` is undone."""
    for name, usual in _usual.items():
        patch.setattr(prepare, name, usual)


_usual = {name: getattr(prepare, name) for name in ("SMALL", "image_seconds")}


def _not_found(name: str, package: str | None = None) -> None:
    """No library, in place of `find_spec`."""


def draw_figures(patch: pytest.MonkeyPatch) -> None:
    """Pages have figures until `patch` is undone; the test is skipped without matplotlib."""
    pytest.importorskip("matplotlib")
    patch.setattr(figures, "find_spec", importlib.util.find_spec)


@functools.cache
def _shares(sizes: tuple[int, ...]) -> Tensor:
    """What makes a sum over all weights the sum of the means of tensors of these sizes."""
    counts = torch.tensor(sizes)
    return (1 / counts).repeat_interleave(counts)


def without_network(patch: pytest.MonkeyPatch) -> None:
    """Samples that cost next to nothing: noise times the sum of the weights' means, and the
    class."""

    def latents(self: Rollout, noise: Tensor, labels: Tensor, **_: object) -> Tensor:
        weights = list(self.model.parameters())  # type: ignore[attr-defined]
        flat = torch.cat([weight.reshape(-1).float() for weight in weights])
        level = (flat * _shares(tuple(weight.numel() for weight in weights))).sum()
        made: Tensor = (level * noise + labels[:, None, None, None] / 20) / 2
        return made

    patch.setattr(Rollout, "latents", latents)


def without_pages(patch: pytest.MonkeyPatch) -> None:
    """Runs end without a page, which a run that was interrupted has as any other."""
    patch.setattr(writing, "write_report", lambda run: writing.Report(run, None, None, None))


def with_network(patch: pytest.MonkeyPatch) -> None:
    """Samples of the network again, until `patch` is undone."""
    patch.setattr(Rollout, "latents", _of_the_network)


_of_the_network = Rollout.latents
