"""Power-function EMA: official numbers, identities of the profiles, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merge_rl.config.numbers import nimg_from_kimg
from merge_rl.core.merging.ema_profiles import (
    ema_beta,
    ema_response,
    exponent_from_std,
    parse_std_list,
    posthoc_coefficients,
    profile_correlation,
    std_from_exponent,
)
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


@pytest.mark.parametrize("ema_std", [0.0, -0.1, 0.2887, 1.0, float("nan")])
def test_width_without_a_profile_is_refused(ema_std: float) -> None:
    with pytest.raises(ConfigError, match=r"expected 0 < ema_std < 0\.288675 .*got"):
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


def test_responses_match_official(official: dict[str, Any]) -> None:
    for case in official["power_function_response"]:
        response = ema_response(case["ofs"], case["std"], case["len"])
        np.testing.assert_allclose(response, case["response"], rtol=1e-9)


def test_response_needs_room_for_its_end() -> None:
    with pytest.raises(ConfigError, match="end 12 and length 12"):
        ema_response(12, 0.1, 12)


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
