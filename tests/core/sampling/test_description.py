"""Networks by their own statement: all of them know one Gaussian exactly, in their own terms."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import merge_rl as mrl
from merge_rl.core.sampling.compatibility import require_call
from merge_rl.core.sampling.description import StatedNetwork, network_of
from merge_rl.core.sampling.guidance import grid_of
from merge_rl.core.sampling.paths import PATHS
from merge_rl.core.sampling.sampler import sample_with
from merge_rl.errors import ConfigError
from tests.gaussian import denoised, path_velocity

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
KEPT = (1 - BETAS).cumprod(0)
LEVELS = ((1 - KEPT) / KEPT).sqrt()
# One unit in the last place of x, times what a noise level makes of it; 64 operations at most.
ROUNDING = 64 * torch.finfo(torch.float32).eps


class Known(nn.Module):
    """Any function of x and t, with one weight whose name must stay."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.weight * self.function(x, t.reshape(-1, *[1] * (x.ndim - 1)))


def of_path(name: str, prediction: str, time: str) -> Known:
    path = PATHS[name]()

    def function(x: Tensor, t: Tensor) -> Tensor:
        t = (t if time == "up" else 1 - t).double()
        alpha, sigma, wide = path.alpha(t), path.sigma(t), x.double()
        clean = denoised(wide / alpha, sigma / alpha)
        noise = (wide - alpha * clean) / sigma
        if prediction == "velocity":
            made = path.d_alpha(t) * clean + path.d_sigma(t) * noise
            return (made if time == "up" else -made).float()
        return (clean if prediction == "denoised" else noise).float()

    return Known(function)


def of_betas(prediction: str, channels: int = 1) -> Known:
    def function(x: Tensor, t: Tensor) -> Tensor:
        kept = KEPT[t.round().long()]
        assert bool((t - t.round()).abs().max() < 2e-3)  # levels of the table are whole steps
        alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
        wide = x.double()
        clean = denoised(wide / alpha, sigma / alpha)
        noise = (wide - alpha * clean) / sigma
        made = {"denoised": clean, "noise": noise, "velocity": alpha * noise - sigma * clean}
        return torch.cat([made[prediction].float()] + [x] * (channels - 1), 1)

    return Known(function)


@pytest.mark.parametrize("prediction", ["denoised", "noise"])
@pytest.mark.parametrize("where", ["sigma", "linear up", "linear down", "gvp up", "vp down"])
def test_a_network_is_the_denoiser_that_it_states(
    prediction: str, where: str, generator: torch.Generator
) -> None:
    name, _, time = where.partition(" ")
    if time:
        module, path = of_path(name, prediction, time), name
    else:
        module, path, time = Known(denoised), None, "sigma"
        if prediction == "noise":
            module = Known(lambda x, sigma: (x - denoised(x, sigma)) / sigma)
    network = mrl.describe(
        module, prediction=prediction, time=time, path=path, sample_shape=[3, 2, 2]
    )
    x = torch.randn(5, 3, 2, 2, generator=generator)
    for level in (0.01, 0.3, 1.0, 7.0, 60.0):
        sigma = torch.tensor(level)
        found, expected = network(sigma * x, sigma), denoised(sigma * x, sigma)
        # t = 1 - u loses u's last digits: relative to u, at sigma = 0.01 a hundred units of one.
        bound = ROUNDING * (1 + level) * (1 + 1 / level)
        torch.testing.assert_close(found, expected, atol=bound, rtol=bound)
    each = torch.tensor([0.2, 0.5, 1.0, 2.0, 4.0])
    rows = [network(x[i : i + 1], each[i]) for i in range(5)]
    torch.testing.assert_close(network(x, each), torch.cat(rows))


@pytest.mark.parametrize("prediction", ["denoised", "noise", "velocity"])
@pytest.mark.parametrize("channels", [1, 2])
def test_discrete_steps_are_found_by_their_noise_level(
    prediction: str, channels: int, generator: torch.Generator
) -> None:
    network = mrl.describe(
        of_betas(prediction, channels), prediction=prediction, time="down", betas=BETAS,
        sample_shape=[2],
    )  # fmt: skip
    x = torch.randn(5, 2, generator=generator)
    for step in (0, 17, 400, 999):
        sigma = LEVELS[step].float()
        found, expected = network(sigma * x, sigma), denoised(sigma * x, sigma)
        bound = ROUNDING * (1 + float(sigma)) * (1 + 1 / float(sigma))
        torch.testing.assert_close(found, expected, atol=bound, rtol=bound)


def test_steps_lie_between_their_levels_and_stop_at_the_ends() -> None:
    network = mrl.describe(
        Known(denoised), prediction="noise", time="down", betas=BETAS, sample_shape=[2]
    )
    middle = (LEVELS[40] * LEVELS[41]).sqrt().float()
    levels = torch.stack([torch.tensor(1e-5), middle, torch.tensor(1e5)])
    assert isinstance(network, StatedNetwork)
    torch.testing.assert_close(network.statement.own_time(levels), torch.tensor([0.0, 40.5, 999.0]))


@pytest.mark.parametrize("name", ["linear", "gvp", "vp"])
def test_velocities_of_either_direction_are_sampled_alike(
    name: str, generator: torch.Generator
) -> None:
    up = Known(lambda x, t: path_velocity(PATHS[name]())(x, t[:1, 0]))  # one time for all
    down = Known(lambda x, t: -path_velocity(PATHS[name]())(x, 1 - t[:1, 0]))
    noise = torch.randn(4, 2, generator=generator)
    ends = []
    for module, time in ((up, "up"), (down, "down")):
        network = mrl.describe(
            module, prediction="velocity", time=time, path=name, sample_shape=[2]
        )
        found = network(noise, torch.tensor(0.25))  # t as it is for the sampler, 1 is data
        torch.testing.assert_close(found, path_velocity(PATHS[name]())(noise, torch.tensor(0.25)))
        ends.append(mrl.sample(network, noise, num_steps=8))  # the path that it states
    torch.testing.assert_close(*ends)
    other = "gvp" if name == "linear" else "linear"
    # Noise and the grid of guidance are of that path too, where settings name none.
    own, said = (mrl.SamplerConfig(solver="sde-euler", num_steps=8, path=p) for p in ("own", name))
    assert torch.equal(sample_with(own, network, noise), sample_with(said, network, noise))
    torch.testing.assert_close(grid_of(own, network), grid_of(said, network), rtol=0, atol=0)
    with pytest.raises(ConfigError, match=f"the network's path is {name}, got {other}"):
        mrl.sample(network, noise, num_steps=8, path=other)


def test_labels_reach_networks_with_classes() -> None:
    class Classes(nn.Module):
        def forward(self, x: Tensor, _t: Tensor, labels: Tensor) -> Tensor:
            return x + labels[:, None]

    network = mrl.describe(
        Classes(), prediction="denoised", time="sigma", sample_shape=[1], label_dim=3, null_label=3
    )
    x, sigma = torch.zeros(2, 1), torch.tensor(1.0)
    assert network(x, sigma, torch.tensor([0, 2])).tolist() == [[0.0], [2.0]]
    assert network(x, sigma).tolist() == [[3.0], [3.0]]


def test_the_weights_keep_their_names_and_copies_their_own() -> None:
    network = mrl.describe(Known(denoised), prediction="denoised", time="sigma", sample_shape=[2])
    assert isinstance(network, mrl.Network)
    assert isinstance(network, Known)
    assert list(network.state_dict()) == ["weight"]
    other = copy.deepcopy(network)
    nn.init.zeros_(other.weight)
    x = torch.ones(1, 2)
    assert bool((other(x, torch.tensor(1.0)) == 0).all())
    assert bool((network(x, torch.tensor(1.0)) != 0).all())


def test_attributes_do_as_well_as_a_description() -> None:
    module = Known(denoised)
    with pytest.raises(ConfigError, match="'m:f' does not state its prediction: expected an attr"):
        network_of(module, "m:f")
    module.prediction = "denoised"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"'m:f' does not state its time.*\(sigma, up, down\)"):
        network_of(module, "m:f")
    module.time, module.sample_shape = "sigma", (2,)  # type: ignore[assignment]
    made = network_of(module, "m:f")
    assert made.sample_shape == (2,)
    assert network_of(made, "m:f") is made
    with pytest.raises(ConfigError, match="'m:f': expected a torch module, got dict"):
        network_of({}, "m:f")


def test_the_last_statement_about_a_module_holds() -> None:
    module = Known(lambda x, _t: x / 4)
    first = mrl.describe(module, prediction="denoised", time="sigma", sample_shape=[2])
    again = mrl.describe(first, prediction="noise", time="sigma", sample_shape=[2])
    x = torch.ones(1, 2)
    assert torch.equal(again(x, torch.tensor(2.0)), x - 2 * (x / 4))


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ConfigError, match="^expected a torch module, got function$"):
        mrl.describe(denoised, prediction="denoised", time="sigma", sample_shape=[2])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prediction": "score"}, "expected prediction denoised, velocity, noise, got 'score'"),
        ({"time": "t"}, "expected time sigma, up, down, got 't'"),
        ({"time": "up"}, "expected path or betas for the time 'up', got neither"),
        ({"time": "up", "path": "cosine"}, "expected path linear, gvp, vp, got 'cosine'"),
        ({"prediction": "velocity"}, "expected no velocity over noise levels"),
        ({"path": "linear"}, "expected no path over noise levels"),
        ({"time": "up", "betas": [0.1, 0.2]}, "expected time 'down' with betas"),
        ({"time": "down", "betas": [0.1, 2.0]}, "betas, two at least, between 0 and 1, got 2.0"),
        ({"time": "down", "betas": [0.1]}, r"betas, two at least, between 0 and 1, got \(0.1,\)"),
        ({"time": "down", "betas": "linear"}, "two at least, between 0 and 1, got 'linear'"),
        ({"time": "down", "betas": 0.02}, "two at least, between 0 and 1, got 0.02"),
        ({"time": "down", "betas": [[0.1, 0.2]]}, r"between 0 and 1, got \[\[0.1, 0.2\]\]"),
        ({"time": "down", "betas": [0.1, 0.2], "path": "vp"}, "got path and betas"),
        ({"sample_shape": []}, "expected sample_shape of whole numbers > 0"),
        ({"sample_shape": 2}, "expected sample_shape of whole numbers > 0, got 2"),
        ({"label_dim": -1}, "expected label_dim a whole number >= 0, got -1"),
        ({"null_label": 1.5}, "expected null_label a whole number >= 0, got 1.5"),
    ],
)
def test_what_is_no_statement_is_refused(change: dict[str, Any], sentence: str) -> None:
    said = {"prediction": "denoised", "time": "sigma", "sample_shape": [2], **change}
    with pytest.raises(ConfigError, match=sentence):
        mrl.describe(Known(denoised), **said)


@pytest.mark.parametrize(
    ("left_out", "sentence"),
    [
        ("prediction", "expected prediction denoised, velocity, noise, got ''"),
        ("time", "expected time sigma, up, down, got ''"),
        ("sample_shape", r"expected sample_shape of whole numbers > 0, got \(\)"),
    ],
)
def test_what_is_left_unstated_is_asked_for(left_out: str, sentence: str) -> None:
    said: dict[str, Any] = {"prediction": "denoised", "time": "sigma", "sample_shape": [2]}
    del said[left_out]
    with pytest.raises(ConfigError, match=sentence):
        mrl.describe(Known(denoised), **said)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        # (B, 1) would be widened to (B, 2), and merged as if it were right.
        (lambda x, _t: x[:, :1], r"the network Known returned (1, 1) for samples (1, 2); expected"),
        (lambda _x, _t: float("t"), "with x (1, 2), t (1,) failed: ValueError: could not convert"),
    ],
)
def test_a_network_that_makes_no_sample_is_refused_before_it_is_sampled(
    function: Any, sentence: str
) -> None:
    network = mrl.describe(Known(function), prediction="denoised", time="sigma", sample_shape=[2])
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        require_call(network)
