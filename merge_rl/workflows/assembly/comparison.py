"""The sizes of the final comparison, which are part of a budget unless they are given."""

from __future__ import annotations

import dataclasses
import math

from merge_rl import registry
from merge_rl.config import MOST_FINAL, MOST_SELECTION, EvaluationConfig, OptimizeConfig
from merge_rl.core.sampling.compatibility import VELOCITY, prediction_of
from merge_rl.errors import BudgetError
from merge_rl.storage.checkpoints import CheckpointSet

LEAST_FINAL, SELECTION_PARTS = 10, 6  # images of a score; part of the comparison that selects
COMPARED, COMPARED_SDE, PICTURES = 4, 2, 60  # models of the final comparison; images to look at


def resolve_evaluation(config: OptimizeConfig, checkpoints: CheckpointSet) -> EvaluationConfig:
    """The final comparison with N: as it is said, or what its share of the budget pays for.

    Raises BudgetError where that is too little to tell models apart.
    """
    found, count = config.evaluation, len(checkpoints)
    if found.num_images is not None or found.reserved:
        return found
    total = int(found.share * config.budget)
    few = min(MOST_SELECTION, max(LEAST_FINAL, total // (SELECTION_PARTS * count)))
    selection = found.selection_images or few
    looks = found.repeats * (COMPARED + (COMPARED_SDE if _scored_by_sde(checkpoints) else 0))
    images = min(MOST_FINAL, (total - PICTURES - count * selection) // looks)
    if images < LEAST_FINAL:
        least = PICTURES + count * (found.selection_images or LEAST_FINAL) + looks * LEAST_FINAL
        raise BudgetError(
            f"a budget of {config.budget} images leaves {max(0, images)} for a repeat of the final "
            f"comparison, expected at least {LEAST_FINAL}: a budget of "
            f"{math.ceil(least / found.share)}, or --final-images N, which come on top of it"
        )
    reserved = PICTURES + count * selection + looks * images
    return dataclasses.replace(
        found, num_images=images, selection_images=selection, reserved=reserved
    )


def _scored_by_sde(checkpoints: CheckpointSet) -> bool:
    """Whether start and result are compared under an SDE too."""
    if checkpoints.config is None:
        return False
    return prediction_of(registry.build_on_meta(checkpoints.config)) == VELOCITY
