"""What the command line says where there are several ranks: rank 0 alone talks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from merge_rl.cli import ranks
from merge_rl.errors import ParallelError


class Ended(NamedTuple):
    """How a command ended, as the fixture `mergerl` gives it."""

    code: int
    out: str
    err: str


Mergerl = Callable[..., Ended]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What this rank lets rank 0 know; there is no store here to tell it to."""
    sentences: list[str] = []
    monkeypatch.setattr(ranks, "tell", sentences.append)
    return sentences


@pytest.mark.parametrize("rank", [0, 1])
def test_a_refusal_is_one_sentence_of_rank_0(
    rank: int, mergerl: Mergerl, told: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # a follower's is put away
    ended = mergerl("optimize", tmp_path / "nowhere")
    assert ended.code == 1
    assert ended.out == ""
    assert len(told) == 1
    assert "nowhere" in told[0]
    assert ended.err.count("error:") == (1 if rank == 0 else 0)


def test_commands_of_one_process_are_refused(
    mergerl: Mergerl, told: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    ended = mergerl("demo", tmp_path / "digits")
    assert ended.code == 1
    assert "demo works in one process, got 8; start it without torchrun" in ended.err
    assert not (tmp_path / "digits").exists()
    with pytest.raises(ParallelError):
        ranks.require_parallel("merge")
    for name in ranks.PARALLEL_COMMANDS:
        ranks.require_parallel(name)


def test_one_process_of_torchrun_is_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert not ranks.launched()
    assert ranks.leads()
    ranks.require_parallel("demo")
