"""Gradients of weights, coefficients and theta: by hand, and against central differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from merge_rl.core.merging.buffers import FlatCheckpoints, FlatLayout
from merge_rl.core.merging.groups import Groups
from merge_rl.core.merging.live_model import coefficient_gradient, theta_gradient
from merge_rl.core.merging.maps import (
    BoundedMap,
    CoefficientMap,
    initial_coefficients,
    make_map,
)
from merge_rl.errors import ConfigError
from merge_rl.storage.checkpoints.merging import MappedCheckpoints

SHAPES = {"a": (2, 3), "b": (5,), "c": (), "d": (4,)}
GROUPS = Groups(("x", "y"), (0, 1, 0, 1))


def stored(generator: torch.Generator) -> tuple[FlatCheckpoints, MappedCheckpoints]:
    """The same three checkpoints in two kinds of storage, float16."""
    layout = FlatLayout.of(SHAPES, GROUPS)
    matrix = torch.randn(3, layout.size, generator=generator).half()
    rows = [layout.views(row) for row in matrix]
    return FlatCheckpoints(layout, matrix, {}), MappedCheckpoints(layout, rows, {})


def test_by_hand() -> None:
    layout = FlatLayout.of({"a": (2,), "b": (1,)}, Groups(("x", "y"), (0, 1)))
    checkpoints = FlatCheckpoints(layout, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), {})
    # Group x: <(10, 1), (1, 2)> = 12 and <(10, 1), (4, 5)> = 45; group y: -1 times 3 and 6.
    found = coefficient_gradient(checkpoints, torch.tensor([10.0, 1.0, -1.0]))
    assert found.tolist() == [[12.0, 45.0], [-3.0, -6.0]]
    assert found.dtype == torch.float64


def test_any_storage_and_any_groups(generator: torch.Generator) -> None:
    flat, mapped = stored(generator)
    gradient = torch.randn(flat.layout.size, generator=generator)
    by_group = coefficient_gradient(flat, gradient)
    assert torch.equal(by_group, coefficient_gradient(mapped, gradient))
    fine = FlatLayout.of(SHAPES, Groups(tuple(SHAPES), (0, 1, 2, 3)))
    order = flat.layout.views(gradient)
    moved = torch.cat([order[name].reshape(-1) for name in fine.names])
    rows = [{name: flat.layout.views(row)[name] for name in fine.names} for row in flat.matrix]
    by_tensor = coefficient_gradient(MappedCheckpoints(fine, rows, {}), moved)
    summed = torch.stack([by_tensor[0] + by_tensor[2], by_tensor[1] + by_tensor[3]])
    torch.testing.assert_close(summed, by_group, rtol=1e-12, atol=1e-12)


def test_another_shape_is_refused(generator: torch.Generator) -> None:
    flat, _ = stored(generator)
    with pytest.raises(ConfigError, match=r"expected a gradient \(16,\), got \(3,\)"):
        coefficient_gradient(flat, torch.zeros(3))


def maps() -> list[CoefficientMap]:
    gram = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3)).double()
    made = []
    for kind in ("affine", "free", "softmax", "ema", "whitened"):
        start = "newest" if kind == "ema" else "uniform"
        made.append(
            make_map(
                kind, num_checkpoints=4, num_groups=2, base=3, scale=0.3,
                init=initial_coefficients(start, num_checkpoints=4, base=3),
                nimg=(1024, 4096, 4096, 8192), ema_std=(0.05, 0.05, 0.10, 0.10),
                gram=gram @ gram.mT,
            )
        )  # fmt: skip
    return [*made, *(BoundedMap(m, 1.05) for m in made if m.kind in ("affine", "free", "whitened"))]


@pytest.mark.parametrize("mapping", maps(), ids=lambda m: f"{type(m).__name__}-{m.kind}")
@pytest.mark.parametrize("length", [0.0, 0.7, 4.0])
def test_every_map_against_central_differences(mapping: CoefficientMap, length: float) -> None:
    generator = torch.Generator().manual_seed(11)
    theta = length * torch.randn(mapping.dim, generator=generator, dtype=torch.float64)
    if mapping.kind == "ema":  # a later end than the newest checkpoint's is drawn back to it
        theta[1::2] = -theta[1::2].abs() - (length == 0) * 0.1
    weights = torch.randn(2, 4, generator=generator, dtype=torch.float64)

    def value(point: Tensor) -> Tensor:
        return (mapping(point) * weights).sum()

    step = 1e-6
    moves = step * torch.eye(mapping.dim, dtype=torch.float64)
    expected = [(value(theta + move) - value(theta - move)) / (2 * step) for move in moves]
    found = theta_gradient(mapping, theta, weights)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_a_profile_at_its_start_can_leave_it() -> None:
    # Where a profile equals a checkpoint the coefficients are exact, and still have a derivative.
    mapping = next(m for m in maps() if m.kind == "ema")
    origin = torch.zeros(mapping.dim, dtype=torch.float64)
    weights = torch.arange(8.0, dtype=torch.float64).reshape(2, 4)
    found = theta_gradient(mapping, origin, weights)
    step = torch.tensor([1e-6, 0.0, 0.0, 0.0], dtype=torch.float64)
    change = (mapping(origin + step) - mapping(origin - step)) / 2e-6
    torch.testing.assert_close(found[0], (change * weights).sum(), rtol=1e-5, atol=1e-6)
    assert float(found[0].abs()) > 1e-3
