"""The policy-gradient searcher: its draws, its first step by hand, schedules, saved state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_rl.config.optimize import SearchConfig
from merge_rl.errors import ConfigError, UnknownNameError
from merge_rl.rng import stream
from merge_rl.searchers.base import SearchSpace
from merge_rl.searchers.policy_gradient import EMANet, PolicyGradient

POLICIES = ["direct", "mlp"]
OPTIMUM = torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=torch.float64)


def build(dim: int = 4, seed: int = 0, **settings: Any) -> PolicyGradient:
    return PolicyGradient(SearchConfig(**settings), SearchSpace.plain(dim), seed)


def quadratic(thetas: Tensor) -> Tensor:
    return -(thetas - OPTIMUM).square().sum(1)


def search(searcher: PolicyGradient, rounds: int) -> PolicyGradient:
    for _ in range(rounds):
        thetas = searcher.ask()
        searcher.tell(thetas, quadratic(thetas))
    return searcher


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_starts_at_zero(policy: str, seed: int) -> None:
    searcher = build(seed=seed, policy=policy)
    assert searcher.mean.tolist() == [0.0] * 4
    assert searcher.std.tolist() == [1.0] * 4


def test_proposals_are_antithetic_about_the_mean() -> None:
    searcher = search(build(population=7, std=0.5), 3)
    thetas, mean = searcher.ask(), searcher.mean
    assert float(mean.abs().min()) > 0
    for i in range(0, 6, 2):
        torch.testing.assert_close(thetas[i] + thetas[i + 1], 2 * mean)
        assert not torch.equal(thetas[i], thetas[i + 1])
    plain = build(antithetic=False).ask()
    assert not torch.allclose(plain[0], -plain[1])


def test_a_clip_needs_several_epochs() -> None:
    # In the first epoch the policy is the one that drew, and every ratio is 1.
    def means(clip: float, epochs: int) -> Tensor:
        return search(build(clip=clip, epochs=epochs, learning_rate=0.3), 5).mean

    assert torch.equal(means(1e-4, 1), means(1e9, 1))
    assert not torch.equal(means(1e-4, 3), means(1e9, 3))


def test_proposals_have_the_configured_spread() -> None:
    # 1,000 pairs in 4 dimensions: relative standard error of the mean square 2.2 %.
    thetas = build(population=2000, std=0.3).ask()
    assert float(thetas.square().mean()) == pytest.approx(0.09, rel=0.1)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_first_step_is_the_learning_rate(policy: str) -> None:
    # Adam's first step is rate * sign(gradient), so each theta moves by the learning rate, up or
    # down, for a free mean and for EMANet alike; REINFORCE's gradient is mean(A theta) at mean 0.
    searcher = build(policy=policy, learning_rate=0.25)
    thetas = searcher.ask()
    rewards = quadratic(thetas)
    advantages = (rewards - rewards.mean()) / rewards.std(correction=0)
    expected = 0.25 * (advantages[:, None] * thetas).mean(0).sign()
    searcher.tell(thetas, rewards)
    torch.testing.assert_close(searcher.mean, expected, rtol=1e-6, atol=0)


def test_only_the_kept_candidates_move_the_mean() -> None:
    # Half of four: the pair along axis 0 decides, the pair along axis 1 is dropped.
    thetas = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 5.0], [0.0, -5.0]], dtype=torch.float64)
    rewards = torch.tensor([4.0, 3.0, 1.0, -6.0], dtype=torch.float64)
    searcher = build(dim=2, top_fraction=0.5, population=4, learning_rate=0.5)
    searcher.tell(thetas, rewards)
    # Advantages of the kept are positive, 3.5 and 2.5 over the std: 2 * 3.5 - 1 * 2.5 > 0.
    torch.testing.assert_close(searcher.mean, torch.tensor([0.5, 0.0], dtype=torch.float64))


def test_step_and_exploration_decay_to_a_floor() -> None:
    searcher = build(std=2.0, decay=0.5, min_decay=0.2, learning_rate=0.5)
    stds, steps = [], []
    for _ in range(5):
        thetas, before = searcher.ask(), searcher.mean
        stds.append(float(searcher.std[0]))
        # The same reward, linear in every theta, keeps Adam at full steps in one direction.
        searcher.tell(thetas, thetas.sum(1))
        steps.append(float((searcher.mean - before).abs().mean()))
    assert stds == pytest.approx([2.0, 1.0, 0.5, 0.4, 0.4])
    assert steps[0] == pytest.approx(0.5)
    assert steps[4] < 0.25 * steps[0]


def test_the_schedule_scales_the_draws_alone() -> None:
    early, late = build(decay=0.5, min_decay=0.01), build(decay=1.0)
    for searcher in (early, late):
        for _ in range(3):
            searcher.tell(searcher.ask(), torch.full((16,), math.nan))
    torch.testing.assert_close(early.ask(), late.ask() / 8)


def test_learned_std() -> None:
    # Reward -theta^2 at its optimum 0: exploring less is better, so the std shrinks; the reward
    # theta^2 makes it grow. d/d log std of log N is z^2 - 1, and Adam's first step is the rate.
    for sign, expected in ((-1.0, math.exp(-0.05)), (1.0, math.exp(0.05))):
        searcher = build(dim=1, learn_std=True, population=64, decay=1.0)
        thetas = searcher.ask()
        searcher.tell(thetas, sign * thetas.square().sum(1))
        assert float(searcher.std[0]) == pytest.approx(expected, rel=1e-6)
    fixed = search(build(decay=1.0), 5)
    assert fixed.std.tolist() == [1.0] * 4


@pytest.mark.parametrize("policy", POLICIES)
def test_several_updates_of_one_batch_are_clipped(policy: str) -> None:
    # With a tiny clip the ratio leaves the interval at once and the gradient stops: what is left
    # of later updates is Adam's momentum.
    tight = build(policy=policy, epochs=10, clip=1e-6)
    loose = build(policy=policy, epochs=10, clip=math.inf)
    thetas = tight.ask()
    for searcher in (tight, loose):
        searcher.tell(thetas, quadratic(thetas))
    assert float(tight.mean.norm()) < 0.7 * float(loose.mean.norm())


def test_damping() -> None:
    searcher = build(learning_rate=0.4)
    searcher.damp(0.5)
    thetas = searcher.ask()
    searcher.tell(thetas, quadratic(thetas))
    assert searcher.mean.abs().tolist() == pytest.approx([0.2] * 4, rel=1e-6)
    for _ in range(9):
        searcher.damp(0.5)
    assert searcher.damping == 0.1
    for _ in range(9):
        searcher.damp(1.9)
    assert searcher.damping == 1.0


def test_emanet_is_a_function_of_its_stream() -> None:
    before = EMANet(3, stream(5, "search", "emanet")).state_dict()
    torch.manual_seed(99)
    again = EMANet(3, stream(5, "search", "emanet")).state_dict()
    other = EMANet(3, stream(6, "search", "emanet")).state_dict()
    for name in before:
        assert torch.equal(before[name], again[name]), name
    assert not torch.equal(before["embedding"], other["embedding"])
    # The embedding and both hidden layers are random, the last layer is 0.
    random = {name for name, value in before.items() if bool((value != 0).any())}
    assert random == {"embedding", "hidden.0.weight", "hidden.1.weight"}


def test_emanet_by_hand() -> None:
    # Width 2: z = (1, -2); layer 1 = identity, so relu gives (1, 0); layer 2 maps to (3, -1) + bias
    # (0, 2) = (3, 1), relu keeps it; last row (2, -1) plus bias 0.5: 6 - 1 + 0.5.
    net = EMANet(1, torch.Generator(), width=2)
    values = {
        "embedding": [1.0, -2.0],
        "hidden.0.weight": [[1.0, 0.0], [0.0, 1.0]],
        "hidden.0.bias": [0.0, 0.0],
        "hidden.1.weight": [[3.0, 9.0], [-1.0, 9.0]],
        "hidden.1.bias": [0.0, 2.0],
        "last.weight": [[2.0, -1.0]],
        "last.bias": [0.5],
    }
    state = {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
    net.load_state_dict(state)
    assert net().tolist() == [5.5]
    assert net.reach == 1 + 3 + 1


def test_the_state_holds_everything_that_moves() -> None:
    searcher = search(build(policy="mlp", learn_std=True), 2)
    state = searcher.state_dict()
    moved = {name for name in state["tensors"] if name.startswith("adam.")}
    # Seven tensors of EMANet and the log std, each with Adam's two moments and its count.
    assert len(moved) == 8 * 3
    assert state["scalars"]["round_index"] == 2
    saved = {name: tensor.clone() for name, tensor in state["tensors"].items()}
    search(searcher, 1)
    for name, tensor in state["tensors"].items():
        assert torch.equal(tensor, saved[name]), f"{name} is a live view"


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"nothing to search: theta has 0 dimensions"):
        build(dim=0)
    with pytest.raises(UnknownNameError, match=r"unknown policy 'dirct'; did you mean 'direct'\?"):
        build(policy="dirct")
    with pytest.raises(ConfigError, match="the saved search belongs to another seed"):
        build(seed=1).load_state_dict(build(seed=0).state_dict())
