"""The order of names: numbers in them count as numbers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from merge_rl.storage.files.naming import (
    in_training_order,
    natural_key,
    reference_file,
    training_key,
    with_thousands,
    without_numbers,
)


@pytest.mark.parametrize(
    "expected",
    [
        ["a2.png", "a/img.png", "a/img_9.png", "a/img_010.png", "a/img_10.png", "b/1.png"],
        ["step_250", "step_500", "step_750", "step_1000", "step_2000", "step_20000"],
        ["ema-0.050", "ema-0.1", "ema-0.10", "ema-0.25", "ema-1"],
        ["epoch=9-loss=0.2", "epoch=10-loss=0.02", "epoch=10-loss=0.1"],
        ["v1.9", "v1.10"],
        ["ckpt-5e5", "ckpt-1e6", "ckpt-2E6"],
        ["step_9500", "step_10k", "step_500k", "step_1M", "step_1.5M"],
        ["lr-1e-4-0", "lr-0.001-0", "lr-1e-2-0"],
        ["step-750k-ema", "step-1000k-ema", "step-1.5m-ema", "step-1B-ema"],
        ["iter_8Ki", "iter_16Ki", "iter_17k", "iter_1Mi"],
        ["a\u0662.png", "a3.png", "a\u0661\u0660.png", "a\uff11\uff11.png"],
        ["run3a-1800x", "run3a-2k", "run12e5f"],
        ["a", "a0", "a00", "a01", "a1", "b"],
    ],
)
def test_the_natural_order(expected: list[str]) -> None:
    for seed in range(5):
        names = random.Random(seed).sample(expected, len(expected))
        assert sorted(names, key=natural_key) == expected


def test_words_for_the_newest_come_last_in_a_training() -> None:
    names = ["best", "500", "750", "LAST", "final_ema"]
    assert sorted(names[-2::-1], key=training_key) == names[:-1]
    assert training_key("final_ema") > training_key("model_750")
    text = ["blast", "last-2", "net-5", "other"]  # no such words, or with a number
    assert sorted(text, key=training_key) == text


def test_units_stand_after_a_word_for_what_is_counted() -> None:
    for ordered in (
        ["step9500", "step10k", "step500k", "step1M"],
        ["it9e3", "it2e4", "it1e5"],
        ["a-500kimg", "a-2000kimg", "a-10Mimg"],
        ["net-900k", "net-2Mi", "net-1Gi"],
        ["run12e5f", "s1e10", "s2e3"],  # a hash, and seeds with epochs
    ):
        assert sorted({*ordered}, key=natural_key) == ordered


def test_thousands_that_are_set_apart_are_one_number_where_nothing_else_fits() -> None:
    for ordered in (
        ["step_50", "step_900", "step_10_000", "step_1_000_000", "last"],
        ["ema-50-step_900", "ema-50-step_1_000"],
        ["900_000", "1_000_000"],
    ):
        assert in_training_order(sorted(ordered), str) == ordered
    for two in (
        ["run_1", "run_1_500", "run_2"],  # goes on where another ends
        ["run_1_500", "run_1_600", "run_2_100"],  # a series as it is
        ["step_2000", "step_900", "step_1_000"],  # 2000 is not set apart
        ["a_900", "a_1_00", "a_1_000"],
        ["a_900", "a_1_000", "b_900", "b_1_000"],
    ):
        assert with_thousands(two) == {name: name for name in two}
        assert in_training_order(two, str) == sorted(two, key=training_key)


def test_scores_and_capitals_count_where_all_else_is_equal() -> None:
    scored = ["val_loss=0.4-step=100", "val_loss=0.31-step=500", "val_loss=0.29-step=1000"]
    assert sorted({*scored}, key=training_key) == scored
    assert sorted(["fid5-a", "fid3-a"], key=training_key) == ["fid3-a", "fid5-a"]
    unnamed = ["ckpt_0.512345_500", "ckpt_12.340000_2000", "ckpt_0.012345_30000"]
    assert sorted({*unnamed}, key=training_key) == unnamed
    plain = ["0.1000", "0.2000", "1.1000", "v1.10_5", "v1.9_7"]  # an index, a version
    assert sorted({*plain}, key=training_key) == [*plain[:3], "v1.9_7", "v1.10_5"]
    mixed = ["step_500", "STEP_786", "step_1000"]
    assert sorted({*mixed}, key=training_key) == mixed


def test_numbers_may_be_of_any_length() -> None:
    long = "9" * 10_000  # too long for a number of Python's
    assert natural_key(long) < natural_key("1" + long)


def test_names_of_a_series_differ_in_numbers_alone() -> None:
    assert without_numbers("step_750") == without_numbers("step_02000") == "step_#"
    assert without_numbers("e=1-loss=0.5") == without_numbers("e=10-loss=12.25") == "e=#-loss=#"
    assert without_numbers("step_500k") == without_numbers("step_1.5M") == "step_#"
    assert without_numbers("last") == "last"


def test_a_path_with_a_hash_sign_is_a_path(tmp_path: Path) -> None:
    assert reference_file("a/b.pkl#fid") == (Path("a/b.pkl"), "fid")
    assert reference_file("a/b#c.safetensors") == (Path("a/b#c.safetensors"), None)
    odd = tmp_path / "a.pkl#b"
    odd.touch()
    assert reference_file(odd) == (odd, None)
