"""Directions in which unit steps change the weights alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from merge_rl.core.merging import linear_maps as whitening
from merge_rl.core.merging.buffers import FlatCheckpoints, FlatLayout
from merge_rl.core.merging.groups import Groups
from merge_rl.core.merging.linear_maps import AffineMap, WhitenedMap, weight_gram, whitened_basis
from merge_rl.core.merging.maps import BoundedMap, make_map
from merge_rl.errors import ConfigError
from merge_rl.storage.checkpoints.merging import MappedCheckpoints

F64 = torch.float64


def gram_of(weights: Tensor) -> Tensor:
    return weights.double() @ weights.double().T


@pytest.fixture
def weights(generator: torch.Generator) -> Tensor:
    """Four checkpoints of 50 parameters; the last two are nearly alike."""
    rows = torch.randn(4, 50, generator=generator)
    rows[3] = rows[2] + 0.01 * rows[3]
    return rows


def test_gram_of_groups(generator: torch.Generator) -> None:
    shapes = {"a": (3, 4), "b": (5,)}
    layout = FlatLayout.of(shapes, Groups(("one", "two"), (1, 0)))
    matrix = torch.randn(3, 17, generator=generator).half()
    gram = weight_gram(FlatCheckpoints(layout, matrix, {}))
    # Group "one" holds b, and comes first.
    torch.testing.assert_close(gram[0], gram_of(matrix[:, :5]))
    torch.testing.assert_close(gram[1], gram_of(matrix[:, 5:]))


def test_gram_has_the_same_bits_from_every_storage(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"a": (70, 30), "b": (5,), "none": (0, 2), "c": (1300,), "d": (1,)}
    layout = FlatLayout.of(shapes, Groups(("one", "two"), (0, 0, 1, 0, 1)))
    matrix = torch.randn(3, layout.size, generator=generator)
    flat = FlatCheckpoints(layout, matrix, {})
    # As in a file that is mapped: each tensor elsewhere, at a multiple of its element's size.
    spread = torch.zeros(3, layout.size + 4 * len(shapes))
    starts = [offset + 4 * i + 1 for i, offset in enumerate(layout.offsets)]
    rows: list[dict[str, Tensor]] = []
    for values, memory in zip(matrix, spread, strict=True):
        views = layout.views(values)
        parts = zip(views, starts, strict=True)
        rows.append({n: memory[s : s + views[n].numel()].view(views[n].shape) for n, s in parts})
        for name, view in views.items():
            rows[-1][name].copy_(view)
    mapped = MappedCheckpoints(layout, rows, {})
    for size in (1 << 20, 999):
        monkeypatch.setattr(whitening, "_CHUNK", size)
        assert torch.equal(weight_gram(mapped), weight_gram(flat))
        torch.testing.assert_close(
            weight_gram(flat)[0], gram_of(matrix[:, : layout.group_bounds[1]])
        )
        covered = [block[:3] for block in flat.blocks(size)]
        assert covered == [block[:3] for block in mapped.blocks(size)]
        assert all(stop - start <= size for start, stop, _ in covered)
        assert sum(stop - start for start, stop, _ in covered) == layout.size


def test_a_unit_step_changes_the_weights_by_the_reach(weights: Tensor) -> None:
    basis = whitened_basis(gram_of(weights), 0.01, 1e6)
    norm = weights.double().square().sum(1).mean().sqrt()
    moves = basis.T @ weights.double()
    torch.testing.assert_close(moves @ moves.T / norm**2, 1e-4 * torch.eye(3, dtype=F64))


def test_by_hand() -> None:
    # Weights (1, 1) and (1, -1), mean squared norm 2: the one direction is (1, -1) / sqrt 2, which
    # moves them by (0, 2) / sqrt 2, of relative squared norm 2 / 2 = 1 = lambda.
    gram = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=F64)
    # rho = (0.3 / 0.4)^2 = 0.5625; the step is 0.3 / sqrt(1.5625) = 0.24.
    basis = whitened_basis(gram, 0.3, 0.4)
    torch.testing.assert_close(basis.abs()[:, 0], torch.full((2,), 0.24 / 2**0.5, dtype=F64))
    assert float(basis.sum()) == pytest.approx(0)


def test_steps_between_twins_are_capped(weights: Tensor) -> None:
    basis = whitened_basis(gram_of(weights), 0.1, 0.5)
    assert float(basis.abs().max()) <= 0.5
    free = whitened_basis(gram_of(weights), 0.1, 1e6)
    assert float(free.abs().max()) > 5  # what the cap is for
    # The direction between distant checkpoints hardly notices it.
    torch.testing.assert_close(basis[:, -1], free[:, -1], rtol=0.05, atol=0.01)


def test_twins_are_no_trouble(weights: Tensor) -> None:
    weights[3] = weights[2]
    basis = whitened_basis(gram_of(weights), 0.1, 0.5)
    assert bool(basis.isfinite().all())
    assert float(basis.abs().max()) <= 0.5


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.ones(1, 1), "expected at least 2 checkpoints for the whitened map, got 1"),
        (torch.full((2, 2), torch.nan), "the whitened map needs finite weights"),
    ],
)
def test_refusals(gram: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        whitened_basis(gram.double(), 0.1, 0.5)


def test_weights_of_0_are_twins() -> None:
    # Nothing that a step changes: every column is of length cap, along moves whose sum is 0.
    basis = whitened_basis(torch.zeros(3, 3, dtype=F64), 0.1, 0.5)
    torch.testing.assert_close(basis.T @ basis, 0.25 * torch.eye(2, dtype=F64))
    torch.testing.assert_close(basis.sum(0), torch.zeros(2, dtype=F64))


# ------------------------------------------------------------------------------------ the maps


def test_a_group_of_0_has_coefficients_as_any_other() -> None:
    gram = torch.stack([torch.zeros(2, 2, dtype=F64), 2 * torch.eye(2, dtype=F64)])
    init = torch.tensor([0.25, 0.75], dtype=F64)
    whitened = WhitenedMap(init=init, scale=0.3, num_groups=2, gram=gram)
    theta = torch.tensor([-0.5, 0.25], dtype=F64)
    torch.testing.assert_close(whitened.theta_of(whitened(theta)), theta)
    with pytest.raises(ConfigError, match="the whitened map needs weights that are not all 0"):
        WhitenedMap(init=init, scale=0.3, num_groups=2, gram=torch.zeros_like(gram))


def test_whitened_rows_keep_their_sum_and_can_be_inverted(
    weights: Tensor, generator: torch.Generator
) -> None:
    gram = torch.stack([gram_of(weights), gram_of(weights[:, :20])])
    init = torch.tensor([0.5, 0.2, -0.1, 0.4], dtype=F64)
    whitened = WhitenedMap(init=init, scale=0.02, num_groups=2, gram=gram)
    assert whitened.dim == 6
    theta = torch.randn(6, generator=generator, dtype=F64)
    rows = whitened(theta)
    torch.testing.assert_close(rows.sum(1), torch.ones(2, dtype=F64))
    torch.testing.assert_close(rows[1], init + whitened.bases[1] @ theta[3:])
    torch.testing.assert_close(whitened.theta_of(rows), theta)
    with pytest.raises(ConfigError, match="the whitened map keeps the sum 1 of a row"):
        whitened.theta_of(rows + 0.1)
    assert bool(whitened(theta * torch.nan).isnan().all())


def test_make_map_needs_the_gram_matrix(weights: Tensor) -> None:
    init = torch.full((4,), 0.25)
    with pytest.raises(ConfigError, match="needs the Gram matrix"):
        make_map("whitened", num_checkpoints=4, base=3, scale=0.1, init=init)
    with pytest.raises(ConfigError, match=r"expected a Gram matrix \(1, 4, 4\)"):
        make_map("whitened", num_checkpoints=4, base=3, scale=0.1, init=init, gram=torch.eye(4))
    made = make_map(
        "whitened", num_checkpoints=4, base=3, scale=0.1, init=init, gram=gram_of(weights)[None]
    )
    assert (made.kind, made.dim) == ("whitened", 3)


def test_inverses_of_affine_and_free(generator: torch.Generator) -> None:
    init = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    for kind in ("affine", "free"):
        chosen = make_map(kind, num_checkpoints=3, num_groups=2, base=1, scale=0.05, init=init)
        theta = torch.randn(chosen.dim, generator=generator, dtype=F64)
        torch.testing.assert_close(chosen.theta_of(chosen(theta)), theta)
        with pytest.raises(ConfigError, match=r"expected coefficients \(2, 3\), got \(3, 2\)"):
            chosen.theta_of(torch.zeros(3, 2))
    soft = make_map("softmax", num_checkpoints=3, base=1, scale=0.5, init=init)
    rows = torch.tensor([[0.1, 0.2, 0.7]], dtype=F64)
    torch.testing.assert_close(soft(soft.theta_of(rows)), rows)
    with pytest.raises(ConfigError, match="reaches rows above 0 with sum 1"):
        soft.theta_of(torch.tensor([[1.0, 0.0, 0.0]]))


def test_a_bound_draws_back_towards_the_start() -> None:
    init = torch.tensor([0.0, 0.0, 1.0], dtype=F64)
    affine = AffineMap(init=init, scale=1.0, base=2)
    bounded = BoundedMap(affine, 1.5)
    # (-1, 0.2) asks for (-1, 0.2, 1.8): 1 + t 0.8 <= 1.5 allows t = 0.625.
    theta = torch.tensor([-1.0, 0.2], dtype=F64)
    expected = torch.tensor([[-0.625, 0.125, 1.5]], dtype=F64)
    torch.testing.assert_close(bounded(theta), expected)
    # The lower side: (-8, 8, 1): -8 t >= -1.5.
    far = bounded(torch.tensor([-8.0, 8.0], dtype=F64))
    torch.testing.assert_close(far, torch.tensor([[-1.5, 1.5, 1.0]], dtype=F64))
    inside = torch.tensor([0.3, -0.4], dtype=F64)
    torch.testing.assert_close(bounded(inside), affine(inside))
    assert torch.equal(bounded(torch.zeros(2, dtype=F64)), init[None])
    torch.testing.assert_close(bounded.theta_of(bounded(inside)), inside)
    with pytest.raises(ConfigError, match="expected coefficients within 1.5, got 2"):
        bounded.theta_of(torch.tensor([[-1.0, 0.0, 2.0]]))
    with pytest.raises(ConfigError, match="the start has a coefficient of 1, expected a bound"):
        BoundedMap(affine, 0.5)
