"""Weights to images to features: placement, execution, the same work on several processes."""

from merge_rl.workflows.rollout.compiled import prepare_network
from merge_rl.workflows.rollout.derivatives import (
    Room,
    made_again,
    pull_back,
    require_derivative,
    without_derivative,
)
from merge_rl.workflows.rollout.device import (
    choose_place,
    cpu_workers,
    device_facts,
    free_memory,
    free_on,
    on_device,
    own_device,
    place_weights,
    require_device,
    unused_gpu,
)
from merge_rl.workflows.rollout.differentiable import DifferentiableRollout, Differentiated
from merge_rl.workflows.rollout.distributed import (
    DistributedRollout,
    require_agreement,
    require_same_everywhere,
)
from merge_rl.workflows.rollout.execution import (
    Failures,
    calls_an_image,
    exact_products,
    fast_hint,
    is_out_of_memory,
    matmul_precision,
)
from merge_rl.workflows.rollout.functions import (
    AsTheyAre,
    Generate,
    GivenRollout,
    Subject,
    as_tensor,
    is_plain,
    made_without_gradient,
    with_gradient,
    without_gradient,
    written,
)
from merge_rl.workflows.rollout.rollout import MergedRollout, Rollout, WorkItem
from merge_rl.workflows.rollout.timing import (
    Timing,
    image_seconds,
    is_long,
    make_images,
    stepped,
    timings,
)
from merge_rl.workflows.rollout.tuned import TunedRollout

__all__ = [
    "AsTheyAre",
    "DifferentiableRollout",
    "Differentiated",
    "DistributedRollout",
    "Failures",
    "Generate",
    "GivenRollout",
    "MergedRollout",
    "Rollout",
    "Room",
    "Subject",
    "Timing",
    "TunedRollout",
    "WorkItem",
    "as_tensor",
    "calls_an_image",
    "choose_place",
    "cpu_workers",
    "device_facts",
    "exact_products",
    "fast_hint",
    "free_memory",
    "free_on",
    "image_seconds",
    "is_long",
    "is_out_of_memory",
    "is_plain",
    "made_again",
    "made_without_gradient",
    "make_images",
    "matmul_precision",
    "on_device",
    "own_device",
    "place_weights",
    "prepare_network",
    "pull_back",
    "require_agreement",
    "require_derivative",
    "require_device",
    "require_same_everywhere",
    "stepped",
    "timings",
    "unused_gpu",
    "with_gradient",
    "without_derivative",
    "without_gradient",
    "written",
]
