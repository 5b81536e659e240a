"""The learner: one place where weights change, and a state that goes on exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from merge_rl.config.finetune import UpdateConfig
from merge_rl.models.edm2 import EDM2
from merge_rl.models.sit import SiT
from merge_rl.workflows.finetune.learner import Learner, trainable
from tests.finetuning import SIT

pytestmark = pytest.mark.numerics


class Line(nn.Module):
    """w x + b."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.b = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w * x + self.b


def line_of(learner: Learner) -> Line:
    assert isinstance(learner.network, Line)
    return learner.network


def step(learner: Learner, target: float) -> None:
    learner.begin()
    loss = (learner.policy(torch.tensor([1.0, 2.0])) - target).square().sum()
    loss.backward()
    learner.gradient_norm()
    learner.apply()


def test_the_first_step_is_adams() -> None:
    # Adam's first step is the learning rate times the sign of the gradient.
    learner = Learner(Line(), UpdateConfig(learning_rate=0.01))
    step(learner, 10.0)
    torch.testing.assert_close(line_of(learner).w.detach(), torch.tensor([1.01, -1.99]))


def test_warmup_scales_the_first_steps() -> None:
    learner = Learner(Line(), UpdateConfig(learning_rate=0.01, warmup_steps=4))
    step(learner, 10.0)
    torch.testing.assert_close(line_of(learner).w.detach(), torch.tensor([1.0025, -1.9975]))


def test_gradients_are_clipped_by_their_norm() -> None:
    learner = Learner(Line(), UpdateConfig(max_grad_norm=0.5))
    line_of(learner).w.grad = torch.tensor([3.0, 0.0])
    line_of(learner).b.grad = torch.tensor(4.0)
    assert learner.gradient_norm() == pytest.approx(5)
    torch.testing.assert_close(line_of(learner).w.grad, torch.tensor([0.3, 0.0]))


def test_the_average_by_hand() -> None:
    # Decays 1/10, 2/11, then the bound of 0.15.
    learner = Learner(Line(), UpdateConfig(learning_rate=0.1, ema_decay=0.15))
    values = [float(line_of(learner).b.detach())]
    for _ in range(2):
        step(learner, 10.0)
        values.append(float(line_of(learner).b.detach()))
    first = 0.1 * values[0] + 0.9 * values[1]
    expected = 0.15 * first + 0.85 * values[2]
    assert isinstance(learner.average, Line)
    assert float(learner.average.b) == pytest.approx(expected, rel=1e-6)
    assert not learner.average.b.requires_grad


def test_without_an_average_the_weights_are_it() -> None:
    learner = Learner(Line(), UpdateConfig(ema_decay=0.0))
    assert learner.average is learner.network


def test_a_saved_state_goes_on_to_the_same_bits() -> None:
    settings = UpdateConfig(learning_rate=0.03, weight_decay=0.1)
    learner = Learner(Line(), settings)
    for _ in range(3):
        step(learner, 4.0)
    saved = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    other = Learner(Line(), settings)
    other.load_state_dict(saved, learner.updates)
    for _ in range(3):
        step(learner, 4.0)
        step(other, 4.0)
    ours, theirs = learner.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_state_of_another_network_is_refused() -> None:
    learner = Learner(Line(), UpdateConfig())
    state = learner.state_dict()
    state["weights.w"] = torch.zeros(3)
    with pytest.raises(RuntimeError):
        learner.load_state_dict(state, 0)


def test_constants_and_loss_modules_are_not_trained() -> None:
    sit = trainable(SiT(**{k: v for k, v in SIT.items() if k != "model"}))
    assert [n for n, p in sit.named_parameters() if not p.requires_grad] == ["pos_embed"]
    edm2 = trainable(EDM2(
        img_resolution=8, img_channels=1, label_dim=2, model_channels=8, channel_mult=[1],
        num_blocks=1, attn_resolutions=[], channels_per_head=8,
    ))  # fmt: skip
    frozen = [n for n, p in edm2.named_parameters() if not p.requires_grad]
    assert frozen == ["logvar_linear.weight"]


def test_weights_are_copies() -> None:
    learner = Learner(Line(), UpdateConfig())
    before = copy.deepcopy(learner.weights(average=False))
    kept = learner.weights(average=False)
    step(learner, 3.0)
    assert all(torch.equal(before[name], kept[name]) for name in kept)
