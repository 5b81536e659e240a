"""`mergerl optimize --searcher`: every family from the command line, and what is refused there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("no_network_here")

Mergerl = Callable[..., Any]
QUICK = [
    "--budget", 160, "--subset", 10, "--final-images", 10, "--repeats", 3,
    "--set", "evaluation.selection_images=10",
]  # fmt: skip
# Others are searched with in tests/workflows/optimize/test_searchers_resume.py.
WHOLE = [  # searcher, options, track, most candidates of a round
    ("nevergrad:TBPSA", ["--population", 3], "raw", 3),
    ("scipy:differential-evolution", ["--population", 5], "raw", 5),
    ("best-checkpoint", [], "raw", 4),
    ("ema-grid", ["--budget", 400], "ema", 16),
]


@pytest.mark.parametrize(("searcher", "options", "track", "most"), WHOLE, ids=[w[0] for w in WHOLE])
def test_a_run_from_end_to_end(
    searcher: str, options: list[Any], track: str, most: int, mergerl: Mergerl, tiny: Path
) -> None:
    code, out, err = mergerl(
        "optimize", tiny, "--track", track, "--searcher", searcher, "--out", "run", *QUICK,
        *options, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert Path("run/merged/model.safetensors").is_file()
    events = [json.loads(line) for line in Path("run/events.jsonl").read_text().splitlines()]
    rounds = [event for event in events if event["kind"] == "round"]
    assert 1 <= max(len(event["candidates"]) for event in rounds) <= most
    # Scored by their own images: no pool, so that every image is a candidate's.
    spent = 10 * sum(len(event["candidates"]) for event in rounds)
    assert rounds[0]["pool_after"] is None
    assert spent <= json.loads(out)["search_images"] <= 400
    assert "best candidate " in err


def test_uniform_needs_no_search(mergerl: Mergerl, tiny: Path) -> None:
    code, out, err = mergerl(
        "optimize", tiny, "--track", "raw", "--searcher", "uniform", "--out", "run", *QUICK,
        "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["search_images"] == 0
    (row,) = json.loads(Path("run/result.json").read_text())["coefficients"]
    assert row == pytest.approx([1 / len(row)] * len(row))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--searcher", "nevergrad:TBSPA"], "unknown searcher 'nevergrad:TBSPA'; did you mean"),
        (["--searcher", "scipy:bfgs"], "unknown searcher 'scipy:bfgs'"),
        (["--searcher", "scipy:powell", "--population", 4], "one candidate after the other"),
        (["--searcher", "greedy-soup", "--population", 4], "expected no population, got 4"),
        (["--searcher", "ema-grid"], "ema-grid needs nimg and ema_std of every checkpoint in the"),
        (
            ["--searcher", "lcsc", "--map", "softmax"],
            "which the map softmax does not reach; choose",
        ),
        (["--searcher", "best-checkpoint", "--map", "softmax"], "choose the map whitened, affine"),
        (
            ["--searcher", "best-checkpoint", "--budget", 39],
            "best-checkpoint begins with 4 candidates of 10 images: expected at least 40",
        ),
    ],
)
def test_what_is_refused(options: list[str], message: str, mergerl: Mergerl, tiny: Path) -> None:
    code, out, err = mergerl("optimize", tiny, "--track", "raw", "--out", "run", *QUICK, *options)
    assert (code, out) == (1, "")
    assert message in " ".join(err.split())
    assert not Path("run").exists()
