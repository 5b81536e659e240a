"""A trial of the user's function before a search: does it fail, repeat itself, have a gradient?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

from merge_rl.config import OptimizeConfig
from merge_rl.errors import ConfigError, MergeRLError
from merge_rl.parallel.group import Group
from merge_rl.storage.checkpoints import CheckpointSet, plan_merge
from merge_rl.untrusted import reason
from merge_rl.workflows.assembly import (
    Given,
    auto_note,
    build_extractor,
    own_extractors,
    own_weights,
    why_not_as_set,
)
from merge_rl.workflows.rollout import as_tensor, is_plain, made_without_gradient

AUTO_SEARCHER: Final = "auto"
ROUNDING: Final = 0.01  # of the largest value that a function makes


def settled_searcher(
    group: Group, base: OptimizeConfig, given: Given, opened: CheckpointSet
) -> tuple[OptimizeConfig, str | None]:
    """The settings with a searcher for "auto", and the note that says which.

    Rank 0 tries the function, and chooses for all.
    """
    why = _why_no_gradient(base, given, opened) if group.leads else None
    why = group.broadcast(why, phase="trying the function")
    if base.search.name != AUTO_SEARCHER:
        return base, None
    name = "policy-gradient" if why else "pathwise"
    search = dataclasses.replace(base.search, name=name)
    return dataclasses.replace(base, search=search), auto_note(name, why)


def _why_no_gradient(base: OptimizeConfig, given: Given, opened: CheckpointSet) -> str | None:
    """Why what the function makes of the newest checkpoint's weights has no gradient by them.

    Raises as `try_function`.
    """
    made = try_function(base, given, opened)
    if base.search.name != AUTO_SEARCHER:
        return None
    if (why := why_not_as_set(base)) is not None or not isinstance(made, Tensor):
        return why or "what generate returns does not depend on one"
    extractor = None
    if own_extractors(base) and made.ndim == 4:
        extractor, _ = build_extractor(base.extractor or "", own_weights(base), base.device)
    return made_without_gradient(made, extractor)


def try_function(base: OptimizeConfig, given: Given, opened: CheckpointSet) -> Any:
    """What the function makes of the newest checkpoint's weights and two seeds.

    Raises ConfigError for a function that fails, or makes something else of a seed each time or
    beside another one.
    """
    network = given.network(opened, base.device)
    plan_merge(opened, model=network)  # refuses weights that do not fit it
    network.load_state_dict(opened.read(opened.newest))
    network.requires_grad_(True)
    labels = torch.zeros(2, dtype=torch.int64, device=base.device)
    with torch.enable_grad(), _failures_told(given, opened):
        made, other = (
            as_tensor(given.generate(given.subject(network), seeds, labels))
            for seeds in ([0, 1], [1, 2])
        )
    _require_same(made, other)
    return made


def _require_same(made: Any, other: Any) -> None:
    """Of seeds 0 and 1, and of 1 and 2: seed 1 stands elsewhere, beside another neighbour.

    Kernels of some devices add in any order, which is far less than other noise makes.
    """
    if not all(isinstance(one, Tensor) and is_plain(one) and one.numel() for one in (made, other)):
        return  # refused for what it is
    first, second = made.detach().double(), other.detach().double()
    alike = first.shape == second.shape
    if alike and first.shape[:1] != (2,):
        return  # refused for that, later
    if not alike or bool((first[1] - second[0]).abs().max() > ROUNDING * first.abs().max()):
        raise ConfigError(
            "generate returned something else for the same weights, seed and label beside other "
            "seeds; expected that each row follows from its own seed, as merge_rl.seeded_noise "
            "draws it, and from no neighbour in the batch"
        )


@contextmanager
def _failures_told(given: Given, opened: CheckpointSet) -> Iterator[None]:
    """What the user's function raises as ConfigError, with the types that it has to do with."""
    try:
        yield
    except (MergeRLError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        stored = {info.type_name for info in opened.tensors.values() if info.is_floating}
        types = "" if stored <= {"float32"} else f" (stored as {', '.join(sorted(stored))})"
        model = given.model
        held = "weights by name" if model is None else type(model).__name__
        hint = "; a module that holds the weights is handed over as model" if model is None else ""
        raise ConfigError(
            f"calling generate with {held} in float32{types}, seeds [0, 1] and labels (2,) "
            f"failed: {type(error).__name__}: {reason(error)}{hint}"
        ) from error
