"""Maps from theta to coefficients: values by hand, invariants, starting points, groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from merge_rl.core.merging.ema_profiles import posthoc_coefficients
from merge_rl.core.merging.groups import Groups, assign_groups
from merge_rl.core.merging.maps import CoefficientMap, initial_coefficients, make_map
from merge_rl.errors import ConfigError, UnknownNameError

KINDS = ("affine", "ema", "free", "softmax")
NIMG = (1024, 4096, 4096, 8192)
EMA_STD = (0.05, 0.05, 0.10, 0.10)


def build(
    kind: str, *, init: Tensor | None = None, base: int = 3, num_groups: int = 1, scale: float = 0.5
) -> CoefficientMap:
    start = initial_coefficients("newest", num_checkpoints=4, base=base) if init is None else init
    return make_map(
        kind,
        num_checkpoints=4,
        num_groups=num_groups,
        base=base,
        scale=scale,
        init=start,
        nimg=NIMG,
        ema_std=EMA_STD,
    )


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_groups", [1, 3])
def test_sizes_and_names(kind: str, num_groups: int, generator: torch.Generator) -> None:
    mapping = build(kind, num_groups=num_groups)
    per_group = {"affine": 3, "ema": 2, "free": 4, "softmax": 4}[kind]
    assert (mapping.kind, mapping.num_checkpoints, mapping.num_groups) == (kind, 4, num_groups)
    assert mapping.dim == num_groups * per_group
    coefficients = mapping(torch.randn(mapping.dim, generator=generator))
    assert coefficients.shape == (num_groups, 4)
    assert coefficients.dtype == torch.float64


@pytest.mark.parametrize("kind", ["affine", "free"])
@pytest.mark.parametrize("base", [0, 1, 3])
def test_zero_is_exactly_the_start(kind: str, base: int) -> None:
    init = row(0.7, -0.2, 0.4, 0.1)
    mapping = build(kind, init=init, base=base, num_groups=2)
    assert torch.equal(mapping(torch.zeros(mapping.dim)), init.expand(2, 4))


@pytest.mark.parametrize("base", range(4))
def test_zero_of_the_ema_map_is_exactly_its_checkpoint(base: int) -> None:
    expected = initial_coefficients("newest", num_checkpoints=4, base=base)
    assert torch.equal(build("ema", base=base)(torch.zeros(2)), expected[None])


def test_affine_map_by_hand() -> None:
    # Start (0, 1, 0, 0), base 1, scale ½, theta (2, −4, 6): the others move by (1, −2, 3) and the
    # base by −(1 − 2 + 3) = −2.
    mapping = build("affine", base=1)
    assert mapping(row(2, -4, 6)).tolist() == [[1.0, -1.0, -2.0, 3.0]]


def test_affine_rows_keep_the_sum_of_the_start(generator: torch.Generator) -> None:
    mapping = build("affine", init=row(0.5, 0.5, 0.5, -0.2), num_groups=3, base=2)
    coefficients = mapping(3 * torch.randn(mapping.dim, generator=generator))
    torch.testing.assert_close(coefficients.sum(1), torch.full((3,), 1.3, dtype=torch.float64))
    assert len({tuple(r) for r in coefficients.tolist()}) == 3


def test_free_map_by_hand() -> None:
    mapping = build("free", init=row(0.25, 0.25, 0.25, 0.25), num_groups=2)
    expected = [[0.75, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, -0.75]]
    assert mapping(row(1, 0, 0, 0, 0, 0, 0, -2)).tolist() == expected


def test_softmax_map_by_hand() -> None:
    # theta · ½ = ln 3 on the second: (1, 2·3, 3, 4) / 14 from a start of (1, 2, 3, 4) / 10.
    mapping = build("softmax", init=row(0.1, 0.2, 0.3, 0.4))
    coefficients = mapping(row(0, 2 * math.log(3), 0, 0))
    torch.testing.assert_close(coefficients, row(1, 6, 3, 4)[None] / 14)
    torch.testing.assert_close(mapping(torch.zeros(4)), row(0.1, 0.2, 0.3, 0.4)[None])


def test_softmax_start_with_zeros_is_smoothed() -> None:
    # 0.9 · (0, 0, 0, 1) + 0.1 / 4.
    expected = row(0.025, 0.025, 0.025, 0.925)
    torch.testing.assert_close(build("softmax")(torch.zeros(4)), expected[None])


def test_softmax_rows_are_averages(generator: torch.Generator) -> None:
    mapping = build("softmax", num_groups=5, scale=10)
    coefficients = mapping(torch.randn(20, generator=generator))
    assert bool((coefficients >= 0).all())
    torch.testing.assert_close(coefficients.sum(1), torch.ones(5, dtype=torch.float64))


def test_ema_map_follows_width_and_end_time() -> None:
    # Group 0: width 0.10 · 2 at the newest time. Group 1: end 8192 / 1.5 = 5461, so that the last
    # checkpoint is out; its width stays 0.10.
    mapping = build("ema", num_groups=2, scale=1)
    coefficients = mapping(row(math.log(2), 0, 0, -math.log(1.5)))
    wide = posthoc_coefficients(NIMG, EMA_STD, [8192], [0.2])[:, 0]
    early = posthoc_coefficients(NIMG[:3], EMA_STD[:3], [8192 / 1.5], [0.1])[:, 0]
    torch.testing.assert_close(coefficients[0], wide)
    torch.testing.assert_close(coefficients[1], torch.cat([early, row(0)]))
    torch.testing.assert_close(coefficients.sum(1), torch.ones(2, dtype=torch.float64))


def test_ema_map_stays_inside_the_run() -> None:
    mapping = build("ema", scale=1)
    assert torch.equal(mapping(row(0, 5)), mapping(row(0, 0)))  # nothing is newer than the newest
    assert mapping(row(0, -100)).tolist() == [[1.0, 0.0, 0.0, 0.0]]  # nor older than the oldest
    for extreme in (-1e4, 1e4):
        assert mapping(row(extreme, extreme)).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_theta_is_data(kind: str) -> None:
    mapping = build(kind, num_groups=2)
    theta = torch.zeros(mapping.dim)
    theta[0] = torch.nan
    coefficients = mapping(theta)
    assert coefficients[0].isnan().any()
    assert torch.equal(coefficients[1], mapping(torch.zeros(mapping.dim))[1])


@pytest.mark.parametrize("kind", KINDS)
def test_maps_leave_theta_alone(kind: str) -> None:
    mapping = build(kind)
    theta = torch.linspace(-1, 1, mapping.dim, dtype=torch.float64)
    before = theta.clone()
    mapping(theta)
    assert torch.equal(theta, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_theta_of_another_length_is_refused(kind: str) -> None:
    mapping = build(kind)
    with pytest.raises(ConfigError, match=rf"shape \({mapping.dim},\), got \({mapping.dim + 1},\)"):
        mapping(torch.zeros(mapping.dim + 1))


def test_starting_points() -> None:
    assert initial_coefficients("newest", num_checkpoints=3, base=1).tolist() == [0.0, 1.0, 0.0]
    assert initial_coefficients("uniform", num_checkpoints=4, base=0).tolist() == [0.25] * 4
    with pytest.raises(UnknownNameError, match="did you mean 'newest'"):
        initial_coefficients("newst", num_checkpoints=3, base=1)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown coefficient map 'afine'.*'affine'"):
        build("afine")


@pytest.mark.parametrize("base", [-1, 4])
def test_base_outside_the_checkpoints_is_refused(base: int) -> None:
    with pytest.raises(ConfigError, match=rf"base in 0\.\.3, got {base}"):
        build("affine", init=torch.ones(4), base=base)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_unusable_scale_is_refused(kind: str, scale: float) -> None:
    with pytest.raises(ConfigError, match=f"scale > 0, got {scale}"):
        build(kind, scale=scale)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="one group, got 4 checkpoints and 0 groups"):
        build("free", num_groups=0)
    with pytest.raises(ConfigError, match=r"shape \(4,\), got \(3,\)"):
        build("free", init=torch.ones(3))
    with pytest.raises(ConfigError, match="finite init"):
        build("free", init=row(0, math.nan, 0, 1))
    with pytest.raises(ConfigError, match="at least 2 checkpoints"):
        make_map("affine", num_checkpoints=1, base=0, scale=1, init=torch.ones(1))
    for init in (row(-0.5, 0.5, 0.5, 0.5), row(0.5, 0.5, 0.5, 0.5)):
        with pytest.raises(ConfigError, match="init >= 0 with sum 1"):
            build("softmax", init=init)


def test_ema_map_needs_every_profile_and_a_checkpoint_to_start_at() -> None:
    with pytest.raises(ConfigError, match="start at checkpoint 3 alone"):
        build("ema", init=torch.full((4,), 0.25))
    init = row(0, 1)
    with pytest.raises(ConfigError, match=r"ema_std of all 2 checkpoints .* got 1 of them"):
        make_map(
            "ema", num_checkpoints=2, base=1, scale=1, init=init, nimg=[1, 2], ema_std=[None, 0.1]
        )
    with pytest.raises(ConfigError, match=r"nimg of all 2 checkpoints .* got 0 of them"):
        make_map("ema", num_checkpoints=2, base=1, scale=1, init=init, ema_std=[0.1, 0.1])
    with pytest.raises(ConfigError, match="more than one of nimg 5"):
        make_map(
            "ema", num_checkpoints=2, base=1, scale=1, init=init, nimg=[5, 5], ema_std=[0.1, 0.1]
        )
    with pytest.raises(ConfigError, match=r"0\.001 to 0\.288 at the start, got 0\.0005"):
        make_map(
            "ema", num_checkpoints=2, base=1, scale=1, init=init, nimg=[4, 5], ema_std=[0.1, 0.0005]
        )


NAMES = ("enc.conv.weight", "enc.attn.weight", "dec.conv.weight", "out_gain")


def test_tensors_go_to_the_first_pattern_that_is_found() -> None:
    groups = assign_groups(NAMES, {"attention": r"attn", "encoder": r"^enc\."})
    assert groups == Groups(names=("attention", "encoder", "rest"), index=(1, 0, 2, 2))


def test_no_rest_without_unmatched_tensors() -> None:
    assert assign_groups(NAMES, {"gains": "gain$", "all": ""}).names == ("gains", "all")
    assert assign_groups(NAMES, {}) == Groups(names=("rest",), index=(0, 0, 0, 0))


def test_each_text_of_a_pattern_is_a_group() -> None:
    names = ("b.1.w", "a.0.w", "b.0.w", "b.1.v", "final")
    patterns = {"a": "^a", "block": r"(?P<each>b\.\d+)"}
    assert assign_groups(names, patterns) == Groups(
        names=("a", "block b.1", "block b.0", "rest"), index=(1, 0, 2, 1, 3)
    )
    # Where the part takes no text, the group is the pattern's own.
    assert assign_groups(names, {"all": r"(?P<each>a)?"}).names == ("all", "all a")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"mid": "mid"}, "'mid' of group 'mid' .* got 0 of 4"),
        ({"all": "", "encoder": "enc"}, "'enc' of group 'encoder'"),
        ({"broken": "enc("}, r"regular expression for group 'broken', got 'enc\('"),
        ({"rest": "enc"}, 'other than "rest"'),
        ({"x": "(?P<each>enc)", "x enc": "dec"}, "different names, got x enc, x enc"),
    ],
)
def test_patterns_that_form_no_group_are_refused(patterns: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assign_groups(NAMES, patterns)
