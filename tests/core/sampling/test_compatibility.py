"""What a sampler and a network have to agree on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from merge_rl.config.sampler import SamplerConfig
from merge_rl.core.sampling.compatibility import (
    balanced_labels,
    has_open_end,
    require_class_ids,
    require_reward_solver,
)
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
