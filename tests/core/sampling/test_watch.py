"""Which step spoils an image, and with what norms."""

from __future__ import annotations

import pytest
import torch

from merge_rl.core.sampling.solvers import NormWatch
from merge_rl.errors import NonFiniteSamplesError, NonFiniteWeightsError


def test_the_first_step_and_its_norms() -> None:
    # Image 1 has norms 5, 10 and then infinity; image 0 breaks a step later.
    x = torch.tensor([[1.0, 0.0], [3.0, 4.0]])[:, :, None, None]
    watch = NormWatch(x)
    watch(0, 2 * x)
    watch.check()
    broken = x.clone()
    broken[1, 0] = -torch.inf
    watch(1, broken)
    watch(2, torch.full_like(x, torch.nan))
    message = (
        "^samples are not finite after step 2 of 3: the norm of image 1 of the batch went from 10 "
        "to inf$"
    )
    with pytest.raises(NonFiniteSamplesError, match=message):
        watch.check()
    assert issubclass(NonFiniteSamplesError, NonFiniteWeightsError)


def test_noise_that_is_not_finite() -> None:
    watch = NormWatch(torch.tensor([[0.0], [torch.nan]]))
    with pytest.raises(NonFiniteSamplesError, match="starting noise of image 1 of the batch is no"):
        watch.check()
