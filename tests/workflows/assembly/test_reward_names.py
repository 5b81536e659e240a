"""What a reward may be called."""

from __future__ import annotations

import pytest

from merge_rl.config.optimize import RewardConfig
from merge_rl.config.reward import RewardTerm, parse_reward
from merge_rl.errors import ConfigError, UnknownNameError
from merge_rl.registry import REWARDS
from merge_rl.workflows.assembly.reward import known_terms


@pytest.mark.parametrize("name", REWARDS)
def test_registered_names_are_rewards(name: str) -> None:
    assert known_terms(RewardConfig(name=name)) == (RewardTerm(name, name, None, 1.0),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fd-dinov2-subset", [("fid-subset", "dinov2", 1.0)]),
        ("fid-inception-tf1-influence", [("fid-influence", "inception-tf1", 1.0)]),
        ("fd-subset", [("fid-subset", None, 1.0)]),
        ("mmd-digits-full", [("mmd-full", "digits", 1.0)]),
        ("fd-my.module:make_it-subset", [("fid-subset", "my.module:make_it", 1.0)]),
        ("  2*kid-subset ", [("kid-subset", None, 2.0)]),
        (
            "fid-subset + 0.2 * fd-dinov2-subset",
            [("fid-subset", None, 1.0), ("fid-subset", "dinov2", 0.2)],
        ),
        (
            "1e3*kid-subset+.5 *fid-full+2.5E-1* mmd-subset",
            [("kid-subset", None, 1000.0), ("fid-full", None, 0.5), ("mmd-subset", None, 0.25)],
        ),
    ],
)
def test_names_and_sums(text: str, expected: list[tuple[str, str | None, float]]) -> None:
    found = [(term.base, term.extractor, term.weight) for term in parse_reward(text)]
    assert found == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected NAME or NUMBER \\* NAME, joined by \\+, found nothing after ''"),
        ("fid-subset +", "found nothing after 'fid-subset \\+'"),
        ("fid-subset - 0.2 * kid-subset", r"found '- 0.2 \* kid-subset' after 'fid-subset'"),
        ("fid-subset * 2", r"found '\* 2' after 'fid-subset'"),
        ("2 fid-subset", r"found '2 fid-subset' after ''"),
        ("(fid-subset)", r"found '\(fid-subset\)' after ''"),
        ("fid-subset + -1 * kid-subset", r"found '-1 \* kid-subset' after 'fid-subset \+'"),
        ("__import__('os')", 'found "__import__'),
        ("0 * fid-subset", "expected weights above 0, got 0"),
        ("1e999 * fid-subset", "expected weights above 0, got 1e999"),
        ("fid-subset + 2 * fid-subset", "'fid-subset' comes twice; give it one weight"),
        ("fd-dinov2-subset + fid-dinov2-subset", "'fd-dinov2-subset' comes twice"),
    ],
)
def test_what_is_no_sum_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_reward(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fid-subst", "unknown reward 'fid-subst'; did you mean 'fid-subset'"),
        ("fid", "unknown reward 'fid'; did you mean 'fid-"),
        ("kid-influence", "unknown reward 'kid-influence'; did you mean 'fid-influence'"),
        ("fid-subset + fdd-subset", "unknown reward 'fdd-subset'"),
        ("fd-dinov9-subset", "unknown extractor 'dinov9'; did you mean 'dinov"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(text: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        known_terms(RewardConfig(name=text))
