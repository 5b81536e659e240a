"""What a sampler and a network have to agree on."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from merge_rl.config.sampler import SamplerConfig
from merge_rl.core.sampling.compatibility import (
    balanced_labels,
    has_open_end,
    require_class_ids,
    require_reward_solver,
    require_sampler,
)
from merge_rl.core.sampling.description import describe
from merge_rl.errors import ConfigError


@pytest.mark.parametrize(
    ("labels", "odd"), [([0, 12], 12), ([3, -2, 9], -2), ([-1, 10], -1), ([10], 10)]
)
def test_labels_outside_the_classes_are_named(labels: list[int], odd: int) -> None:
    with pytest.raises(ConfigError, match=f"^expected labels in 0..9, found {odd}$"):
        require_class_ids(torch.tensor(labels), 10)


@pytest.mark.parametrize("labels", [[], [0], [9, 0], [9, 9, 4]])
def test_labels_of_classes_pass(labels: list[int]) -> None:
    require_class_ids(torch.tensor(labels, dtype=torch.int64), 10)


def test_which_networks_cannot_be_asked_at_the_end() -> None:
    assert has_open_end(SimpleNamespace(prediction="denoised"))
    assert not has_open_end(SimpleNamespace(prediction="velocity"))
    assert has_open_end(SimpleNamespace(prediction="velocity", open_end=True))


def test_labels_take_turns() -> None:
    assert balanced_labels(5, 3).tolist() == [0, 1, 2, 0, 1]
    assert balanced_labels(3, 1).tolist() == balanced_labels(3, 0).tolist() == [0, 0, 0]


def test_an_image_of_a_reward_does_not_depend_on_its_batch() -> None:
    require_reward_solver(SamplerConfig(solver="heun"))
    with pytest.raises(ConfigError, match="dopri5 chooses its steps by the whole batch"):
        require_reward_solver(SamplerConfig(solver="dopri5"))


def stated(prediction: str, shape: int = 2, classes: int = 0) -> nn.Module:
    """A network that says what it is."""
    time: dict[str, Any] = {"time": "sigma"}
    if prediction == "velocity":
        time = {"time": "up", "path": "linear"}
    return describe(
        nn.Identity(), prediction=prediction, sample_shape=[shape], label_dim=classes, **time
    )


@pytest.mark.parametrize(
    ("prediction", "guide", "interval", "told"),
    [
        ("velocity", {"shape": 3}, None, r"the guide's samples are \[3\], the network's \[2\]"),
        ("velocity", {"classes": 4}, None, "the guide has 4 classes, the network 3; expected as"),
        ("velocity", {"classes": 3}, (0.19, 1.61), "times from 0 for noise to 1, got 0.19,1.61"),
        ("velocity", {"classes": 3}, (1.0, math.inf), "times from 0 for noise to 1, got 1,inf"),
        ("denoised", {"classes": 3}, (80.0, 90.0), "noise levels below 80, got 80,90"),
        ("denoised", {"classes": 3}, (79.0, 90.0), None),
        ("velocity", {}, (0.9, 1.0), None),  # without classes
        ("velocity", {"classes": 3}, (0.9, math.inf), None),
    ],
)
def test_guides_are_of_the_networks_samples_and_intervals_of_its_units(
    prediction: str, guide: dict[str, int], interval: tuple[float, float] | None, told: str | None
) -> None:
    settings = SamplerConfig(guidance=2.0, guidance_interval=interval)
    pair = stated(prediction, classes=3), stated(prediction, **guide)
    if told is None:
        require_sampler(settings, *pair)
        return
    with pytest.raises(ConfigError, match=told):
        require_sampler(settings, *pair)
