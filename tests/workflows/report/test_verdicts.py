"""One sentence for what a run came to: of numbers given by hand."""

from __future__ import annotations

from typing import Any

import pytest

from merge_rl.progress import level_text, number
from merge_rl.workflows.report import compare_verdict, finetune_verdict, outcome, run_verdict


def summary(mean: float | None) -> dict[str, Any]:
    ends = (None, None) if mean is None else (mean - 0.05, mean + 0.05)
    return {"mean": mean, "low": ends[0], "high": ends[1], "values": [mean, mean]}


def gain(low: float | None, high: float | None) -> dict[str, Any]:
    mean = None if low is None or high is None else (low + high) / 2
    return {"mean": mean, "low": low, "high": high}


def comparison(start: tuple[float, float], single: tuple[float, float]) -> dict[str, Any]:
    entries = {"start": 1.0, "uniform": 2.0, "best single": 1.0, "result": 0.9}
    return {
        "headline": "heldout",
        "best_single": "snap-7",
        "entries": {name: {"heldout": summary(mean)} for name, mean in entries.items()},
        "gain_over": {
            "start": gain(*start), "uniform": gain(1.0, 1.2), "best single": gain(*single),
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((0.01, 0.2), "better"), ((-0.2, -0.01), "worse"), ((-0.1, 0.2), "no clear difference"),
        ((0.0, 0.2), "no clear difference"), ((None, None), "not finite"),
        ((float("nan"), float("nan")), "not finite"),
    ],
)  # fmt: skip
def test_an_interval_that_holds_0_tells_nothing(
    ends: tuple[float | None, float | None], expected: str
) -> None:
    assert outcome(gain(*ends)) == expected


def test_a_result_that_is_better_than_all() -> None:
    found = run_verdict(comparison((0.08, 0.12), (0.08, 0.12)))
    assert found.tone == "good"
    assert found.claim == (
        "Better than its start, the uniform average and the best single checkpoint (snap-7)."
    )
    assert (
        found.numbers == "Held-out FID went from 1.000 to 0.900, a gain of +0.100 [+0.080, +0.120]."
    )
    assert found.line == "better: held-out FID 1.000 to 0.900, +0.100 [+0.080, +0.120]"


def test_distances_of_any_size_are_told_in_digits_that_say_something() -> None:
    """A gain of a hundredth of a small distance is no 0.000."""
    told = comparison((0.0004, 0.0005), (0.0004, 0.0005))
    for entry, mean in (("start", 0.0335), ("result", 0.03305)):
        told["entries"][entry] = {"heldout": summary(mean)}
    line = "better: held-out FID 0.03350 to 0.03305, +0.00045 [+0.00040, +0.00050]"
    assert run_verdict(told).line == line


@pytest.mark.parametrize(
    ("value", "like", "shown"),
    [
        (0.0, None, "0.000"), (0.01, None, "0.010"), (0.0099, None, "0.0099"),
        (0.00012, None, "0.00012"), (0.0000123, None, "1.23e-05"), (-0.0123, None, "-0.012"),
        (0.5, 0.002, "0.5000"), (0.002, 0.5, "0.002"), (None, None, "not finite"),
    ],
)  # fmt: skip
def test_three_decimals_become_more_for_small_numbers(
    value: float | None, like: float | None, shown: str
) -> None:
    assert number(value, like=like) == shown


def test_rounds_say_small_distances_too() -> None:
    assert level_text({"pool_after": 0.00357, "distance": "FID"}) == "pool FID 0.0036"
    assert level_text({"pool_after": None, "rewards": [-0.002, None]}) == "best candidate 0.0020"


def test_what_is_not_clear_is_not_called_a_gain() -> None:
    found = run_verdict(comparison((-0.02, 0.22), (0.1, 0.3)))
    assert found.tone == "even"
    assert found.claim == (
        "Better than the uniform average and the best single checkpoint (snap-7); no clear "
        "difference from its start."
    )
    assert found.line.startswith("no clear difference: held-out FID 1.000 to 0.900, +0.100 [-0.020")
    assert len(found.line) <= 80


@pytest.mark.parametrize("start", [(0.08, 0.12), (-0.02, 0.22)])
def test_a_result_behind_a_merge_without_a_search_is_no_success(start: tuple[float, float]) -> None:
    told = comparison(start, (-0.3, -0.1))
    told["entries"]["best single"] = {"heldout": summary(0.7)}
    found = run_verdict(told)
    assert found.tone == "bad"
    assert found.claim.endswith("; worse than the best single checkpoint (snap-7).")
    line = "worse than best single: held-out FID 0.700 to 0.900, -0.200 [-0.300, -0.100]"
    assert found.line == line
    assert len(found.line) <= 80
    # By the numbers of the best of those that are ahead.
    told["gain_over"]["uniform"], told["entries"]["uniform"] = (
        gain(-0.5, -0.3),
        {"heldout": summary(0.5)},
    )
    found = run_verdict(told)
    line = (
        "worse than uniform and best single: held-out FID 0.500 to 0.900, -0.400 [-0.500, -0.300]"
    )
    assert found.line == line


def test_no_score_is_no_verdict() -> None:
    document = comparison((0.0, 0.0), (0.0, 0.0))
    document["gain_over"]["start"] = gain(None, None)
    found = run_verdict(document)
    assert (found.tone, found.line) == ("bad", "not finite: no held-out FID to judge by")


LABELS = {"ode-train": "ODE, 4 steps", "ode-eval": "ODE, 8 steps", "sde-eval": "SDE, 9 steps"}


def tuned(**gains: tuple[float | None, float | None]) -> dict[str, Any]:
    entries = {"start": {"reference": summary(2.0)}, "result": {"reference": summary(1.5)}}
    return {
        "headline": "reference",
        "curves": {
            name.replace("_", "-"): {"entries": entries, "gain": gain(*ends)}
            for name, ends in gains.items()
        },
    }


def test_fine_tuning_says_under_which_sampler() -> None:
    document = tuned(ode_train=(0.4, 0.6), ode_eval=(0.4, 0.6), sde_eval=(-0.3, -0.1))
    found = finetune_verdict(document, LABELS)
    assert found.tone == "even"
    assert found.claim == (
        "Better under ODE with 4 steps and ODE with 8 steps; worse under SDE with 9 steps."
    )
    assert found.line == (
        "better under 2, worse under 1 samplers (ODE, 8 steps: +0.500 [+0.400, +0.600])"
    )
    everywhere = tuned(ode_train=(0.4, 0.6), ode_eval=(0.4, 0.6), sde_eval=(0.1, 0.3))
    assert finetune_verdict(everywhere, LABELS).tone == "good"
    nowhere = tuned(ode_train=(None, None), ode_eval=(None, None), sde_eval=(None, None))
    assert finetune_verdict(nowhere, LABELS).tone == "bad"


def searched(name: str, *values: float) -> dict[str, Any]:
    ends = sorted(values)
    found = {"median": ends[len(ends) // 2], "low": ends[0], "high": ends[-1], "values": values}
    return {"searcher": name, "fid": {"heldout": found}, "ratio": 1.0}


def compared(*lines: dict[str, Any], free: float = 1.0) -> dict[str, Any]:
    seeds = range(len(lines[0]["fid"]["heldout"]["values"]))
    best = {"entry": "best single", "fid": free}
    return {
        "headline": "heldout", "seeds": list(seeds), "searchers": list(lines), "best_free": best,
    }  # fmt: skip


def test_searchers_whose_ranges_touch_are_not_told_apart() -> None:
    apart = compared(searched("b", 0.8, 0.9, 0.7), searched("a", 0.5, 0.6, 0.55))
    found = compare_verdict(apart)
    assert found.tone == "good"
    assert found.claim == "a found the best merges; ahead of b (0.800) with every seed."
    assert found.numbers == (
        "Held-out FID 0.550 [0.500, 0.600], median of 3 seeds. The best merge without a search, "
        "best single, has 1.000."
    )
    assert found.line == "best: a, held-out FID 0.550 [0.500, 0.600], median of 3 seeds"
    touching = compared(searched("b", 0.8, 0.9, 0.6), searched("a", 0.5, 0.6, 0.55))
    assert compare_verdict(touching).tone == "even"
    assert "no clear difference from b (0.800)." in compare_verdict(touching).claim
    alone = compared(searched("b", 0.8), searched("a", 0.5))
    assert "no clear difference from b (0.800), which one seed" in compare_verdict(alone).claim


def test_a_search_that_loses_to_a_free_merge_is_no_success() -> None:
    found = compare_verdict(compared(searched("a", 0.5, 0.6, 0.55), free=0.4))
    assert found.tone == "bad"
    assert found.claim == "No search beat the merges without one."
    assert found.line == "none beat best single: 0.550 [0.500, 0.600], median of 3 seeds"
