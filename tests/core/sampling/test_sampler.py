"""Sampling with velocities: the official SiT samplers' runs, guidance, refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from merge_rl.config.sampler import FIXED_SOLVERS, SDE_SOLVERS
from merge_rl.core.sampling.compatibility import count_network_calls
from merge_rl.core.sampling.edm import Churn
from merge_rl.core.sampling.guidance import autoguided, classifier_free
from merge_rl.core.sampling.paths import time_grid
from merge_rl.core.sampling.sampler import FOR_RUNS, sample
from merge_rl.core.sampling.solvers import solve_adaptive, solve_fixed
from merge_rl.errors import ConfigError, UnknownNameError
from merge_rl.models.sit import SiT

CASES = json.loads((Path(__file__).parents[2] / "golden/sit/sampler/cases.json").read_text())
# What torchdiffeq calls our methods; the others keep their names.
OURS = {"heun2": "heun"}
FORWARD = sorted(
    name
    for name, case in CASES["ode"].items()
    if not case["reverse"] and case["method"] != "adaptive_heun"
)


class Counted:
    """A network that notes at which times it is asked, and with how many images."""

    prediction = "velocity"

    def __init__(self, model: SiT) -> None:
        self.model, self.null_label, self.label_dim = model, model.null_label, model.label_dim
        self.times: list[float] = []
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None, /) -> Tensor:
        self.times.append(float(t))
        self.batches.append(len(x))
        velocity: Tensor = self.model(x, t, labels)
        return velocity


@pytest.fixture(scope="module")
def nets(golden: Path) -> dict[str, SiT]:
    configs = json.loads((golden / "sit/tiny/configs.json").read_text())
    found = {}
    for name in ("a", "b"):
        found[name] = SiT(**configs[name]["config"]).eval()
        found[name].load_state_dict(load_file(golden / f"sit/tiny/{name}.weights.safetensors"))
    return found


@pytest.fixture
def model(nets: dict[str, SiT]) -> Counted:
    return Counted(nets["a"])


@pytest.fixture(scope="module")
def inputs(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "sit/sampler/inputs.safetensors")


def _start(case: dict[str, Any], inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, float]:
    """Noise, labels and guidance of a recorded run; of a doubled batch the half that counts."""
    if case["cfg_scale"] is None:
        return inputs["noise"], inputs["y"], 1.0
    return inputs["cfg_noise"][:3], inputs["cfg_y"][:3], case["cfg_scale"]


@pytest.mark.parametrize("name", FORWARD)
def test_recorded_odes(name: str, model: Counted, inputs: dict[str, Tensor], golden: Path) -> None:
    case, data = CASES["ode"][name], load_file(golden / f"sit/sampler/ode_{name}.safetensors")
    noise, labels, guidance = _start(case, inputs)
    expected = data.get("output_first_half", data["output"])
    solver = OURS.get(case["method"], case["method"])
    settings: dict[str, Any] = {"solver": solver, "rtol": case["rtol"], "atol": case["atol"]}
    tolerance = 5e-5
    if case["dtype"] == "float64":  # the limit that accurate solvers share
        settings, tolerance = {"solver": "rk4", "num_steps": 60, "dtype": torch.float64}, 1e-5
    elif solver in FIXED_SOLVERS:
        settings["num_steps"] = case["num_steps"] - 1  # recorded: points; ours: intervals
    else:
        tolerance = 5e-3  # steps follow the error norm of the whole batch, doubled or not
    found = sample(model, noise, labels, guidance=guidance, **settings)
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) < tolerance
    if solver in FIXED_SOLVERS:
        assert model.times == pytest.approx(data["t_evaluated"].tolist(), abs=1e-6)
        calls = count_network_calls(solver, settings["num_steps"], prediction="velocity")
        assert len(model.times) == calls == case["num_model_calls"]
        assert set(model.batches) == {3 if guidance == 1 else 6}


def test_recorded_run_from_data_to_noise(
    model: Counted, inputs: dict[str, Tensor], golden: Path
) -> None:
    data = load_file(golden / "sit/sampler/ode_euler_reverse_n5.safetensors")
    with torch.no_grad():
        found = solve_fixed(
            lambda x, t: model(x, t, inputs["y"]), inputs["noise"], time_grid(4).flip(0),
            solver="euler",
        )  # fmt: skip
    assert float((found - data["output"]).abs().max()) < 5e-5
    assert model.times == pytest.approx(data["t_evaluated"].tolist(), abs=1e-6)


def test_another_adaptive_method(model: Counted, inputs: dict[str, Tensor], golden: Path) -> None:
    case = CASES["ode"]["adaptive_heun_n2"]
    data = load_file(golden / "sit/sampler/ode_adaptive_heun_n2.safetensors")
    with torch.no_grad():
        found = solve_adaptive(
            lambda x, t: model(x, t, inputs["y"]), inputs["noise"], 0.0, 1.0,
            rtol=case["rtol"], atol=case["atol"], method="adaptive_heun",
        )  # fmt: skip
    assert float((found - data["output"]).abs().max()) < 5e-3
    assert len(model.times) == case["num_model_calls"]


def _sde_settings(recorded: dict[str, Any]) -> dict[str, Any]:
    last = (recorded["last_step"] or "none").lower()
    return {
        "solver": f"sde-{recorded['sampling_method'].lower()}",
        # Recorded: grid points up to the last step; ours: intervals, the last step among them.
        "num_steps": recorded["num_steps"] - (last == "none"),
        "diffusion": recorded["diffusion_form"].lower(),
        "diffusion_norm": recorded["diffusion_norm"],
        "last_step": last,
        "last_step_size": recorded["last_step_size"],
    }


@pytest.mark.parametrize("name", sorted(CASES["sde"]))
def test_recorded_sdes(name: str, model: Counted, inputs: dict[str, Tensor], golden: Path) -> None:
    case, data = CASES["sde"][name], load_file(golden / f"sit/sampler/sde_{name}.safetensors")
    noise, labels, guidance = _start(case, inputs)
    draws = iter(data["randn"][:, :3])  # of a doubled batch the second half has no say
    settings = _sde_settings(case["settings"])
    found = sample(model, noise, labels, guidance=guidance, draw=lambda: next(draws), **settings)
    assert next(draws, None) is None
    assert float((found - data.get("output_first_half", data["output"])).abs().max()) < 5e-5
    calls = count_network_calls(
        settings["solver"], settings["num_steps"], prediction="velocity",
        last_step=settings["last_step"],
    )  # fmt: skip
    # One call gives velocity and score; the recorded runs made two where both are needed.
    assert len(model.times) == calls <= case["num_model_calls"]
    recorded = data["t_evaluated"].tolist()
    assert {round(t, 5) for t in model.times} == {round(t, 5) for t in recorded}


def test_recorded_failures(model: Counted, inputs: dict[str, Tensor]) -> None:
    # The release's library default is infinite at t = 0. Its other failures are slips of its
    # program, not of the mathematics: those forms are finite, and work here.
    for name, case in CASES["errors"].items():
        settings = _sde_settings(case["settings"])
        if case["error"] == "non-finite samples":
            with pytest.raises(ConfigError, match="'sbdm' is infinite at t = 0 on the linear path"):
                sample(model, inputs["noise"], inputs["y"], **settings)
            assert model.times == []
        else:
            found = sample(model, inputs["noise"], inputs["y"], check_finite=True, **settings)
            assert found.shape == inputs["noise"].shape, name


@pytest.mark.parametrize("solver", [*FIXED_SOLVERS, *SDE_SOLVERS])
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_every_solver_on_every_path(
    solver: str, path: str, model: Counted, inputs: dict[str, Tensor]
) -> None:
    found = sample(
        model, inputs["noise"], inputs["y"], solver=solver, path=path, num_steps=3,
        check_finite=True,
    )  # fmt: skip
    assert found.shape == inputs["noise"].shape
    assert max(model.times) <= (0.999 + 1e-6 if path == "vp" else 1)
    assert len(model.times) == count_network_calls(solver, 3, prediction="velocity")


# -------------------------------------------------------------------------------------- guidance


def _velocity(gain: float, x: Tensor, labels: Tensor | None) -> Tensor:
    assert labels is not None
    return gain * labels.float()[:, None, None, None].expand(x.shape)


class Ids:
    """v = gain * label: class 2 of 5 gives 2 gain, the null class 5 gain."""

    prediction, null_label, label_dim = "velocity", 5, 5

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None, /) -> Tensor:
        return _velocity(self.gain, x, labels)


@pytest.mark.parametrize("low_memory", [False, True])
def test_guidance_by_hand(low_memory: bool) -> None:
    # 5 + 1.5 (2 - 5) = 0.5 in the guided channels, 2 in the others.
    x, labels, t = torch.zeros(2, 4, 1, 1), torch.tensor([2, 2]), torch.tensor(0.5)
    for channels, expected in (
        (3, [0.5, 0.5, 0.5, 2]), (1, [0.5, 2, 2, 2]), (None, [0.5] * 4), (9, [0.5] * 4),
    ):  # fmt: skip
        net = classifier_free(Ids(), 5, 1.5, channels=channels, low_memory=low_memory)
        found = net(x, t, labels)
        assert torch.equal(found[:, :, 0, 0], torch.tensor([expected, expected]))
    # One channel of three: all that there are.
    net = classifier_free(Ids(), 5, 1.5, low_memory=low_memory)
    assert torch.equal(net(x[:, :1], t, labels), torch.full((2, 1, 1, 1), 0.5))
    assert torch.equal(net(x, t, None), torch.full_like(x, 5))


def test_two_passes_are_one_of_twice_the_batch(model: Counted, inputs: dict[str, Tensor]) -> None:
    settings: dict[str, Any] = {"guidance": 4.0, "num_steps": 4}
    one = sample(model, inputs["noise"], inputs["y"], **settings)
    two = sample(model, inputs["noise"], inputs["y"], low_memory=True, **settings)
    assert float((one - two).abs().max() / one.abs().max()) < 5e-5
    assert model.batches == [6] * 8 + [3] * 16
    every = sample(model, inputs["noise"], inputs["y"], guidance_channels=None, **settings)
    assert float((every - one).abs().max()) > 0.1


def test_a_guide_guides_all_channels(nets: dict[str, SiT], inputs: dict[str, Tensor]) -> None:
    x, labels, t = torch.zeros(1, 4, 1, 1), torch.tensor([2]), torch.tensor(0.5)
    # 2 * 0.5 + 3 (2 - 1) = 4.
    assert torch.equal(autoguided(Ids(), Ids(0.5), 3.0)(x, t, labels), torch.full_like(x, 4))
    # It goes before the null class; guided by itself a network is itself.
    noise, y = inputs["noise"], inputs["y"]
    plain = sample(nets["a"], noise, y, num_steps=3)
    own = sample(nets["a"], noise, y, num_steps=3, guidance=3.0, guide=nets["a"])
    torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-5)
    weaker = copy.deepcopy(nets["a"])
    with torch.no_grad():
        weaker.final_layer.linear.weight.mul_(0.8)
    other = sample(nets["a"], noise, y, num_steps=3, guidance=3.0, guide=weaker)
    assert float((other - plain).abs().max()) > 0.1


def test_labels_left_out_are_the_null_class(model: Counted, inputs: dict[str, Tensor]) -> None:
    null = torch.full((3,), 10)
    expected = sample(model, inputs["noise"], null, num_steps=3)
    assert torch.equal(sample(model, inputs["noise"], num_steps=3), expected)


def test_an_sde_makes_an_image_of_its_noise_alone(
    model: Counted, inputs: dict[str, Tensor]
) -> None:
    noise, y = inputs["noise"], inputs["y"]
    settings: dict[str, Any] = {"solver": "sde-euler", "num_steps": 5, "guidance": 1.5}
    whole = sample(model, noise, y, **settings)
    alone = sample(model, noise[1:2], y[1:2], **settings)
    assert float((whole[1:2] - alone).abs().max()) < 5e-5


def test_refusals(nets: dict[str, SiT], model: Counted, inputs: dict[str, Tensor]) -> None:
    noise, y = inputs["noise"], inputs["y"]

    def refused(message: str, error: type[ConfigError] = ConfigError, **kwargs: Any) -> None:
        with pytest.raises(error, match=message):
            sample(kwargs.pop("net", model), noise, kwargs.pop("labels", y), **kwargs)

    refused("needs a network with a null class, or a guide", net=nets["b"], guidance=1.5)
    refused("num_steps >= 1, got 0", num_steps=0)
    refused("need num_steps >= 2 for an SDE, got 1", num_steps=1, solver="sde-euler")
    refused("unknown solver 'sde-hen'; .* 'sde-heun'", UnknownNameError, solver="sde-hen")
    refused("unknown path 'vpp'; did you mean 'vp'", UnknownNameError, path="vpp")
    refused(r"expected labels in 0\.\.10, found 11", labels=torch.tensor([0, 1, 11]))
    refused(r"expected labels in 0\.\.10, found -1", labels=torch.tensor([0, -1, 1]))
    refused(r"expected labels in 0\.\.9, found 10", net=nets["b"], labels=torch.tensor([0, 1, 10]))
    refused("churn is for", churn=Churn(amount=1.0))
    refused(
        "the guide predicts 'denoised', the network 'velocity'; expected two networks of one fam",
        guidance=2.0, guide=lambda x, t, c=None, /: x,
    )  # fmt: skip
    assert model.times == []
    assert bool(sample(model, noise, y, num_steps=1).isfinite().all())


@pytest.mark.parametrize("name", [*sorted(FOR_RUNS), "num_stps"])
def test_settings_that_sampling_does_not_read_are_refused(name: str, nets: dict[str, SiT]) -> None:
    noise = torch.zeros(1, *nets["a"].sample_shape)
    unread: dict[str, Any] = {name: 3}
    with pytest.raises(UnknownNameError, match=f"unknown setting of sample '{name}'") as caught:
        sample(nets["a"], noise, **unread)
    assert ("did you mean 'num_steps'?" in str(caught.value)) == ("num" in name)
