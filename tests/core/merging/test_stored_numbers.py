"""Stored numbers to float32 and back: every half, and torch's own rounding for the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from merge_rl.core.merging.stored_numbers import as_numbers, finite_halves, narrow, product, widen

pytestmark = pytest.mark.numerics

ALL = np.arange(1 << 16, dtype=np.uint16)
HALVES = ALL[np.isfinite(ALL.view(np.float16))]
BFLOATS = ALL[(ALL & 0x7F80) != 0x7F80]


def widened(raw: np.ndarray, code: str) -> np.ndarray:
    out = np.empty(len(raw), np.float32)
    widen(raw, code, out)
    return out


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).tolist()


@pytest.mark.parametrize(
    ("code", "raw", "dtype"), [("F16", HALVES, torch.float16), ("BF16", BFLOATS, torch.bfloat16)]
)
def test_every_number_is_widened_exactly(code: str, raw: np.ndarray, dtype: torch.dtype) -> None:
    expected = torch.from_numpy(raw.view(np.int16)).view(dtype).float()
    assert bits(torch.from_numpy(widened(raw, code))) == bits(expected)


@pytest.mark.parametrize("factor", [0.3, -1.7, 2.0**-140, 2.0**15, -1e6, 3e38, -0.0])
def test_a_product_is_rounded_once(factor: float) -> None:
    # Float64 holds a product of half and float32 exactly: its cast is the one rounding there is.
    factor = float(np.float32(factor))
    out = np.empty(len(HALVES), np.float32)
    with np.errstate(over="ignore"):
        product(HALVES, "F16", factor, out)
        exact = HALVES.view(np.float16).astype(np.float64) * factor
        expected = exact.astype(np.float32)
    assert bits(torch.from_numpy(out)) == bits(torch.from_numpy(expected))


@pytest.mark.parametrize(("code", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_narrow_rounds_to_even_as_ieee_says(code: str, dtype: torch.dtype) -> None:
    # Each half, the middle to its neighbour, and what is next to the middle on either side.
    halves = np.abs(widened(HALVES, "F16"))
    steps = np.abs(np.diff(np.unique(halves), append=np.float32(65504))) / 2
    middle = np.unique(halves) + steps
    near = [np.nextafter(middle, np.float32(s)) for s in (-1e9, 1e9)]
    rng = np.random.default_rng(0)
    scales = np.exp2(rng.uniform(-40, 15, 20_000))
    random = (rng.standard_normal(20_000) * scales).clip(-6e4, 6e4)
    values = np.concatenate([halves, -halves, middle, *near, -middle, random]).astype(np.float32)
    values = values[np.abs(values) < 65520]
    found = narrow(values, code)
    assert found is not None
    assert found.view(np.int16).tolist() == bits(torch.from_numpy(values).to(dtype))


def test_what_a_type_cannot_hold_is_told() -> None:
    edge = np.array([1.0, 65519.996, -65519.996], np.float32)
    found = narrow(edge, "F16")
    assert found is not None
    assert found.view(np.float16).tolist() == [1, 65504, -65504]
    for most in (65520.0, -65520.0, 3e38):
        assert narrow(np.array([1.0, most], np.float32), "F16") is None
    assert narrow(np.array([-3.4e38], np.float32), "BF16") is None
    assert narrow(np.empty(0, np.float32), "F16") is not None


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
def test_halves_that_are_not_finite_are_seen(value: float) -> None:
    raw = np.array([65504, -65504, 0], np.float16)
    assert finite_halves(raw.view(np.uint16))
    raw[1] = value
    assert not finite_halves(raw.view(np.uint16))


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2", "F64", "I16", "BOOL", "U8"])
def test_other_types_are_those_of_torch(code: str) -> None:
    kinds = {
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F64": torch.float64,
        "I16": torch.int16, "BOOL": torch.bool, "U8": torch.uint8,
    }  # fmt: skip
    given = torch.tensor([0.0, 1.0, 0.3, 1e-3]).to(torch.float64).sqrt().to(kinds[code])
    raw = given.view(torch.uint8).numpy()
    raw = raw.view({"F64": np.float64, "I16": np.int16}.get(code, np.uint8))
    assert widened(raw, code).tolist() == given.float().tolist()


def test_exponents_without_a_mantissa_are_powers_of_two() -> None:
    raw = np.arange(256, dtype=np.uint8)
    found = widened(raw, "F8_E8M0").tolist()
    assert found[:255] == [2.0 ** (exponent - 127) for exponent in range(255)]
    assert np.isnan(found[255])
    if hasattr(torch, "float8_e8m0fnu"):
        theirs = torch.from_numpy(raw).view(torch.float8_e8m0fnu).float().tolist()
        assert found[:255] == theirs[:255]
        assert np.isnan(theirs[255])


def test_halves_survive_where_small_numbers_are_lost() -> None:
    small = np.array([2.0**-24, -(2.0**-20), 1.0], np.float16)
    if not torch.set_flush_denormal(True):
        pytest.skip("the processor has no such mode")
    try:
        raw = as_numbers(small.view(np.uint16), "F16")
        found = widened(raw, "F16").tolist()
    finally:
        torch.set_flush_denormal(False)
    assert found == [2.0**-24, -(2.0**-20), 1.0]
