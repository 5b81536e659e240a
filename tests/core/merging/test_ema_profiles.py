"""Power-function EMA: official numbers, identities of the profiles, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from merge_rl.config.numbers import nimg_from_kimg
from merge_rl.core.merging.ema_profiles import (
    Profiles,
    ema_beta,
    exponent_from_std,
    parse_std_list,
    posthoc_coefficients,
    sparse_profile,
    std_from_exponent,
)
from merge_rl.core.merging.maps import EmaMap
from merge_rl.errors import ConfigError


@pytest.fixture(scope="module")
def official(golden: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((golden / "edm2/phema/phema.json").read_text())
    return values


def test_width_of_small_exponents_by_hand() -> None:
    # γ = 0: 1/(4·3) = 1/12.  γ = 1: 2/(9·4) = 1/18.  γ = 6: 7/(64·9) = 7/576.
    assert std_from_exponent(0.0) == pytest.approx(12**-0.5, rel=1e-15)
    assert std_from_exponent(1) == pytest.approx(18**-0.5, rel=1e-15)
    assert exponent_from_std(18**-0.5) == pytest.approx(1, rel=1e-13)
    assert exponent_from_std(7**0.5 / 24) == pytest.approx(6, rel=1e-13)


def test_exponents_and_widths_match_official(official: dict[str, Any]) -> None:
    widths, exponents = np.array(official["std_to_exp"]).T
    np.testing.assert_allclose(exponent_from_std(widths), exponents, rtol=1e-9)
    exponents, widths = np.array(official["exp_to_std"]).T
    np.testing.assert_allclose(std_from_exponent(exponents), widths, rtol=1e-9)


def test_exponent_inverts_width_over_the_whole_range() -> None:
    gamma = torch.logspace(-3, 4, 200, dtype=torch.float64)
    torch.testing.assert_close(
        exponent_from_std(std_from_exponent(gamma)), gamma, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("ema_std", [0.0, -0.1, 1e-320, 0.2887, 1.0, float("nan")])
def test_width_without_a_profile_is_refused(ema_std: float) -> None:
    with pytest.raises(ConfigError, match=r"expected 1e-07 <= ema_std < 0\.288675 .*got"):
        exponent_from_std(ema_std)
    with pytest.raises(ConfigError, match="ema_std"):
        exponent_from_std([0.1, ema_std])


def test_negative_exponent_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"got \[-0\.5\]"):
        std_from_exponent(-0.5)


def test_betas_match_official(official: dict[str, Any]) -> None:
    for case in official["power_function_beta"]:
        beta = ema_beta(case["std"], case["t_next"], case["t_delta"])
        assert beta == pytest.approx(case["beta"], rel=1e-9, abs=0)


@pytest.mark.parametrize(("nimg", "batch"), [(1024, 0), (1024, 2048), (0, 0)])
def test_impossible_step_is_refused(nimg: int, batch: int) -> None:
    with pytest.raises(ConfigError, match=f"got {batch} and {nimg}"):
        ema_beta(0.1, nimg, batch)


def profile_correlation(nimg_a: Any, std_a: Any, nimg_b: Any, std_b: Any) -> Tensor:
    """Inner products (A, B) of profiles by their ends and widths."""
    return Profiles.of_widths(nimg_a, std_a).overlap(Profiles.of_widths(nimg_b, std_b)).exp()


def test_correlations_match_official(official: dict[str, Any]) -> None:
    for case in official["power_function_correlation"]:
        value = profile_correlation(
            [case["a_ofs"]], [case["a_std"]], [case["b_ofs"]], [case["b_std"]]
        )
        assert float(value) == pytest.approx(case["value"], rel=1e-9)


def test_correlation_equals_the_integral() -> None:
    # Midpoint rule for ∫ p_a p_b with p(t) = (γ+1)/T (t/T)^γ on [0, T], a ending before b.
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 100_000
    ends, widths = torch.tensor([1.3, 2.0]), [0.15, 0.08]
    gammas = exponent_from_std(widths)
    a, b = (
        (g + 1) / e * (t / e) ** g * (t <= e)
        for g, e in zip(gammas.tolist(), ends.double().tolist(), strict=True)
    )
    expected = (a * b).sum() / 100_000
    value = profile_correlation(ends[:1], widths[:1], ends[1:], widths[1:])
    assert float(value) == pytest.approx(float(expected), rel=1e-4)


def test_posthoc_coefficients_match_official(official: dict[str, Any]) -> None:
    for case in official["solve_posthoc_coefficients"]:
        arguments = [case[key] for key in ("in_ofs", "in_std", "out_ofs", "out_std")]
        coefficients = posthoc_coefficients(*arguments)
        for key in ("coefs", "coefs_60_digit_solution"):
            np.testing.assert_allclose(
                coefficients, case[key], rtol=0, atol=1e-9, err_msg=case["name"]
            )
        in_, out = arguments[:2], arguments[2:]
        raw = torch.linalg.solve(profile_correlation(*in_, *in_), profile_correlation(*in_, *out))
        np.testing.assert_allclose(raw.sum(0), case["coefs_sum_before_normalisation"], rtol=1e-8)


def test_an_output_equal_to_an_input_is_exactly_that_input() -> None:
    nimg, widths = [1024, 1024, 4096, 4096], [0.05, 0.10, 0.05, 0.10]
    coefficients = posthoc_coefficients(nimg, widths, nimg[1:3], widths[1:3])
    assert coefficients.T.tolist() == [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]


def test_coefficients_do_not_depend_on_the_unit_of_time() -> None:
    nimg, widths = torch.tensor([3.0, 5.0, 8.0]), [0.05, 0.10, 0.07]
    per_image = posthoc_coefficients(1024 * nimg, widths, [7 * 1024], [0.15])
    torch.testing.assert_close(per_image, posthoc_coefficients(nimg, widths, [7], [0.15]))
    assert float(per_image.sum()) == pytest.approx(1, rel=1e-14)


def test_a_narrow_output_far_from_every_input_stays_finite() -> None:
    # (1/1000)^γ with γ near 1000 is 10^-3000, below the smallest float64.
    coefficients = posthoc_coefficients([1.0, 0.5], [0.1, 0.1], [1000.0], [0.001])
    assert coefficients.isfinite().all()


def test_tracked_and_rebuilt_emas_match_official(golden: Path) -> None:
    run = np.load(golden / "edm2/phema/tracker.npz")
    batch, widths = int(run["batch_size"]), run["stds"].tolist()
    ema = np.zeros((len(widths), run["theta"].shape[1]))
    snapshots: dict[tuple[int, float], np.ndarray[Any, Any]] = {}
    for nimg, weights, expected in zip(run["nimg"].tolist(), run["theta"], run["ema"], strict=True):
        beta = np.array([[ema_beta(width, nimg, batch)] for width in widths])
        ema = beta * ema + (1 - beta) * weights
        np.testing.assert_allclose(ema, expected, rtol=0, atol=1e-5)
        snapshots |= {(nimg, w): row for w, row in zip(widths, expected, strict=True)}
    nimg_in, std_in, std_out = (run[f"posthoc_{k}"] for k in ("in_nimg", "in_std", "out_std"))
    coefficients = posthoc_coefficients(nimg_in, std_in, [nimg_in.max()] * 2, std_out)
    np.testing.assert_allclose(coefficients, run["posthoc_coefs"], rtol=0, atol=1e-9)
    inputs = [snapshots[key] for key in zip(nimg_in.tolist(), std_in.tolist(), strict=True)]
    rebuilt = coefficients.numpy().T @ np.array(inputs, dtype=np.float64)
    np.testing.assert_allclose(rebuilt, run["posthoc_reconstruction"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("nimg", "widths", "message"),
    [
        ([8, 8, 9], [0.1, 0.1, 0.1], "more than one of nimg 8 with ema_std 0.1"),
        ([8, 8], [0.1, 0.1 + 1e-9], "almost equal"),
        ([8, 9], [0.1], r"shapes \(2,\) and \(1,\)"),
        ([], [], r"shapes \(0,\)"),
        ([0, 8], [0.1, 0.1], r"nimg > 0, got \[0"),
    ],
)
def test_unusable_inputs_are_refused(nimg: list[int], widths: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        posthoc_coefficients(nimg, widths, [9], [0.1])


def test_lists_of_widths_match_official(official: dict[str, Any]) -> None:
    for text, expected in official["parse_std_list"]:
        np.testing.assert_allclose(parse_std_list(text), expected, rtol=1e-9)


def test_widths_of_a_range_are_the_decimals_a_reader_writes() -> None:
    assert parse_std_list("0.010, 0.015, ..., 0.030") == [0.01, 0.015, 0.02, 0.025, 0.03]
    assert parse_std_list("0.2,0.1,0.2") == [0.1, 0.2]


@pytest.mark.parametrize(
    "text", ["", "0.1,...,0.2", "0.1,0.2,...", "0.01,0.02,...,0.055", "0.2,0.1,...,0.05", "0.1,x"]
)
def test_malformed_lists_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a list of widths"):
        parse_std_list(text)


def test_kimg_of_file_names_gives_exact_nimg(official: dict[str, Any]) -> None:
    for kimg, nimg in official["kimg_to_nimg"]["values"]:
        assert nimg_from_kimg(kimg) == nimg
    # 41 · 1024 = 41984 and 42 · 1024 = 43008: no multiple of 1024 has kimg 42.
    with pytest.raises(ConfigError, match="got 42"):
        nimg_from_kimg(42)
    with pytest.raises(ConfigError, match="got -1"):
        nimg_from_kimg(-1)


def tracked(gamma: float, update_every: int, ends: list[int]) -> Tensor:
    """Weight of each training step (E, T + 1) in averages that skip steps, as ema-pytorch's do."""
    weights, rows = torch.zeros(max(ends) + 1, dtype=torch.float64), []
    for k in range(max(ends)):
        if k == 0:
            weights[1] = 1
        elif k % update_every == 0:
            beta = (1 - 1 / (k + 2)) ** (gamma + 1)
            weights *= beta
            weights[k + 1] += 1 - beta
        if k + 1 in ends:
            rows.append(weights.clone())
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("ema_std", "update_every"), [(0.05, 1), (0.05, 10), (0.28, 10), (0.05, 80)]
)
def test_averages_that_skip_steps_are_as_wide_as_is_said(ema_std: float, update_every: int) -> None:
    end = 4000
    weights = tracked(exponent_from_std(ema_std), update_every, [end])[0]
    gamma, start = sparse_profile(exponent_from_std(ema_std), update_every)
    time = torch.arange(end + 1, dtype=torch.float64) / end
    mean = float((weights * time).sum())
    std = float((weights * (time - mean).square()).sum().sqrt())
    # A step more or less of those that are taken, of the whole run: the sums are no integrals.
    bound = update_every / end
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), abs=bound)
    expected = ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5
    assert std == pytest.approx(expected, abs=bound)
    assert float(weights[1]) == pytest.approx((start / end) ** (gamma + 1), rel=bound, abs=1e-12)


def test_skipped_steps_make_exponents_below_the_flat_profile() -> None:
    # (7 + 1) / 4 - 1 = 1; 0.25 / 2 - 1. One step at a time leaves the exponent as it is.
    assert sparse_profile(7, 4)[0] == 1
    assert sparse_profile(-0.75, 2)[0] == -0.875
    # Γ(3) / Γ(2) = 2; u = 2: 2 (Γ(2) / Γ(1.5))² = 8 / π.
    assert sparse_profile(7, 1)[0] == 7
    assert sparse_profile(7, 1)[1] == pytest.approx(2)
    assert sparse_profile(7, 2)[1] == pytest.approx(8 / math.pi)
    for gamma, update_every in ((7, 0), (-1, 2)):  # an exponent of -1 has no mass but at 0
        with pytest.raises(ConfigError, match="expected update_every >= 1 and an exponent > -1"):
            sparse_profile(gamma, update_every)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_profiles_rebuilt_from_seldom_updated_averages(width: float) -> None:
    # Random walks, whose averages over time differ as much as their profiles do.
    ends, every = list(range(500, 4001, 500)), 10
    nominal = [exponent_from_std(std) for std in (0.05, 0.28)]
    averages = torch.cat([tracked(gamma, every, ends) for gamma in nominal])
    true = [sparse_profile(gamma, every) for gamma in nominal]
    assert true[1][0] < -0.8
    nimg = torch.tensor(ends * 2, dtype=torch.float64)
    walk = torch.randn(4001, 20, generator=torch.Generator().manual_seed(0)).double().cumsum(0)
    time = torch.arange(4001, dtype=torch.float64) / 4000
    wanted = (time.pow(exponent_from_std(width) + 1).diff() @ walk[1:]) / walk[-1].norm()
    errors = []
    for gammas in ([gamma for gamma, _ in true], nominal):
        exponents = torch.tensor(gammas).double().repeat_interleave(len(ends))
        row = Profiles(nimg, exponents, true[0][1]).row(4000, exponent_from_std(width))
        errors.append(
            float((row @ averages @ walk / walk[-1].norm() - wanted).square().mean().sqrt())
        )
    assert errors[0] < 0.01
    assert errors[1] > 10 * errors[0]


def test_overlaps_with_a_start_are_those_of_their_sums() -> None:
    nimg, gamma = torch.tensor([50.0, 80.0, 80.0]), torch.tensor([-0.9, -0.5, 1.5])
    profiles = Profiles(nimg, gamma, 2.0)
    time = torch.linspace(0, 80, 800_001, dtype=torch.float64)[1:]
    density = [
        torch.where(time <= 2, (2 / t) ** (g + 1) / 2, (g + 1) / t * (time / t) ** g) * (time <= t)
        for t, g in zip(nimg.double(), gamma.double(), strict=True)
    ]
    sums = torch.stack([torch.stack([(a * b).sum() for b in density]) for a in density]) * 1e-4
    torch.testing.assert_close(profiles.overlap(profiles).exp(), sums, rtol=1e-3, atol=0)


def test_a_start_far_in_the_past_changes_nothing() -> None:
    times, widths, out = [500.0, 1000.0, 1000.0], [0.1, 0.1, 0.25], exponent_from_std(0.2)
    plain = Profiles.of_widths(times, widths)
    begun = Profiles(plain.nimg, plain.gamma, 1e-9)
    torch.testing.assert_close(begun.row(1000, out), plain.row(1000, out), rtol=1e-8, atol=0)


def test_profiles_are_known_where_nothing_of_them_is_unknown() -> None:
    found = Profiles.known([10, 20.0], [0.5, -0.5], 3.0)
    assert found is not None
    assert (found.nimg.tolist(), found.gamma.tolist(), found.start) == ([10, 20], [0.5, -0.5], 3)
    assert Profiles.known([10, None], [0.5, -0.5]) is None
    assert Profiles.known([10, 20], [None, -0.5]) is None


def test_profiles_without_a_distance_are_refused() -> None:
    times = torch.tensor([10.0, 20.0])
    with pytest.raises(ConfigError, match="exponents as small as -0.8 .* expected ema_start"):
        Profiles(times, torch.tensor([-0.8, -0.8])).row(20.0, 1.0)
    for start in (10.0, 15.0):
        with pytest.raises(ConfigError, match=f"end after their start at {start:g} images"):
            Profiles(times, torch.tensor([0.5, 0.5]), start)
    with pytest.raises(ConfigError, match="expected exponents > -1"):
        Profiles(times, torch.tensor([0.5, -1.0]))


def test_a_start_wider_than_the_flat_profile_moves_by_its_exponent() -> None:
    profiles = Profiles(torch.tensor([50.0, 80.0, 80.0]), torch.tensor([-0.9, -0.5, 1.5]), 2.0)
    moved = EmaMap(profiles=profiles, base=1, scale=1.0)
    at = moved(torch.tensor([math.log(2), 0.0], dtype=torch.float64))
    torch.testing.assert_close(at[0], profiles.row(80.0, -0.75))  # 0.5 / 2 - 1
    torch.testing.assert_close(
        moved(torch.zeros(2, dtype=torch.float64))[0], torch.tensor([0.0, 1, 0]).double()
    )
