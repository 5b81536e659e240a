"""Names that wrappers grow, and state dicts beside one another."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from merge_rl.core.network import load_exactly
from merge_rl.core.state_dicts import hold, is_average, names_for, unwrapped
from merge_rl.errors import CheckpointError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])


def plain() -> Mapping[str, Tensor]:
    return Net().state_dict()


class Attribute(nn.Module):
    """A program's own module around the network."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)


WRAPPERS = {
    "compiled": lambda net: Attribute("_orig_mod", net),  # the attribute of torch.compile
    "data parallel": lambda net: nn.DataParallel(net),
    "averaged": lambda net: AveragedModel(net),
    "net": lambda net: Attribute("net", net),
    "model": lambda net: Attribute("model", net),
    "compiled, then averaged": lambda net: AveragedModel(Attribute("_orig_mod", net)),
    "parallel in a model, compiled": lambda net: Attribute(
        "_orig_mod", Attribute("model", nn.DataParallel(net))
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_torchs_own_wrappers_are_taken_off(wrapper: str) -> None:
    net = Net()
    state = WRAPPERS[wrapper](net).state_dict()  # type: ignore[no-untyped-call]
    held = hold(state, Tensor)
    ((_, found),) = held.states.items()
    assert list(found) == list(net.state_dict())
    assert all(torch.equal(found[name], t) for name, t in net.state_dict().items())
    assert held.others == (["n_averaged"] if "averaged" in wrapper else [])


def test_parts_that_are_compiled_by_themselves() -> None:
    net = Net()
    expected = list(net.state_dict())
    net.blocks[1] = Attribute("_orig_mod", net.blocks[1])
    assert list(net.state_dict()) != expected
    assert list(unwrapped(net.state_dict())) == expected


def test_names_stay_where_two_would_become_one() -> None:
    state = {"a._orig_mod.w": 1, "a.w": 2}
    assert unwrapped(state) == state
    # Names of networks that only resemble a wrapper's.
    for kept in ({"model.a": 1, "modeling.b": 2}, {"nets.a": 1}, {"module": 1}, {}):
        assert unwrapped(kept) == kept
    assert unwrapped({"model.model.a": 1, "model.net.a": 2}) == {"model.a": 1, "net.a": 2}


def test_raw_weights_and_their_average_are_told_apart() -> None:
    state = dict(plain())
    average = {name: tensor + 1 for name, tensor in state.items()}
    flat = {f"model.{k}": t for k, t in state.items()}
    flat |= {f"model_ema.module.{k}": t for k, t in average.items()}
    flat |= {"model_ema.n_averaged": torch.tensor(3), "loss.scale": torch.tensor(2.0)}
    nested = {"model": state, "model_ema": {"module": average}, "epoch": 3, "optimizer": {"a": 1}}
    lightning = {"state_dict": flat, "hyper_parameters": {"lr": 1e-4}}
    for data, places, others in (
        (flat, ["model", "model_ema/module"], {"loss.scale", "model_ema/n_averaged"}),
        (nested, ["model", "model_ema/module"], {"epoch", "optimizer"}),
        (
            lightning,
            ["state_dict/model", "state_dict/model_ema/module"],
            {"hyper_parameters", "state_dict/loss.scale", "state_dict/model_ema/n_averaged"},
        ),
    ):
        held = hold(data, Tensor)
        assert list(held.states) == places
        assert [is_average(place) for place in places] == [False, True]
        assert (held.among(averaged=False), held.among(averaged=True)) == (places[:1], places[1:])
        assert set(held.others) == others
        assert list(held.states[places[0]]) == list(held.states[places[1]]) == list(state)
        assert torch.equal(held.states[places[1]]["first.weight"], average["first.weight"])


def test_state_dicts_under_names_of_a_programs_own() -> None:
    state = dict(plain())
    average = {name: tensor + 1 for name, tensor in state.items()}
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [], "lr.x": 0.1}
    for data, raw, averaged in (
        ({"params": state, "params_ema": average, "opt": optimizer}, ["params"], ["params_ema"]),
        ({"G": state, "G_ema": average}, ["G"], ["G_ema"]),
        ({"student": state, "teacher": average, "x": {"y": 1}}, ["student", "teacher"], []),
        ({"model": state, "ema": {"shadow": average, "decay": 1}}, ["model"], ["ema/shadow"]),
        # Where raw weights have their usual name all else is beside them.
        ({"model": state, "teacher": average}, ["model"], []),
    ):
        held = hold(data, Tensor)
        assert (held.among(averaged=False), held.among(averaged=True)) == (raw, averaged)
        assert list(held.states[raw[0]]) == list(state)
    assert not hold({"optimizer": optimizer, "rng": {"cpu": torch.ones(3)}}, Tensor).states


def test_what_holds_no_tensors() -> None:
    assert hold({"model": {"a": 1}, "b": 2}, Tensor).states == {}
    endless: dict[str, object] = {}
    endless["model"] = endless
    assert hold(endless, Tensor).states == {}


def test_what_is_loaded_has_the_networks_names_and_shapes() -> None:
    weights = dict(plain())
    net = Net()
    load_exactly(net, weights, "a net")
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in weights.items())
    odd = {
        "found nothing, expected (3,)": {k: t for k, t in weights.items() if k != "first.bias"},
        "found (2,), expected (3,)": {**weights, "first.bias": torch.ones(2)},
        "found (1,), expected nothing": {**weights, "extra": torch.ones(1)},
    }
    for told, given in odd.items():
        with pytest.raises(CheckpointError) as refused:
            load_exactly(net, given, "a net")
        assert str(refused.value).startswith("not weights of a net: 1 tensors do not fit, first ")
        assert told in str(refused.value)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in weights.items())


def test_optional_tensors_may_lack_and_ignored_ones_be_there() -> None:
    weights = {k: t for k, t in plain().items() if k != "first.bias"}
    net = Net()
    bias = net.first.bias.detach().clone()
    load_exactly(
        net, {**weights, "extra": torch.ones(1)}, "a net",
        optional=lambda name: name == "first.bias", ignored=lambda name: name == "extra",
    )  # fmt: skip
    assert torch.equal(net.first.bias, bias)
    assert torch.equal(net.first.weight, weights["first.weight"])
    with pytest.raises(CheckpointError, match="first 'first.bias': found"):  # there, it has to fit
        load_exactly(
            net, {**weights, "first.bias": torch.ones(2)}, "a net", optional=lambda _name: True
        )


@pytest.mark.parametrize(
    ("found", "wanted", "names"),
    [
        ("model.a model.b", "model.a model.b", "model.a model.b"),  # its own, and no wrapper's
        ("module.net.a module.c", "net.a c", "module.net.a module.c"),
        ("a b", "model.a model.b", "a b"),  # the network wraps what was saved
        ("net.a net.b", "model.a model.b", "net.a net.b"),
        ("model.a ema.a model.b ema.b", "net.a net.b", "ema.a ema.b"),
        ("a b", "a c", "a b"),  # they do not meet
    ],
)
def test_names_of_a_file_meet_those_of_a_network(found: str, wanted: str, names: str) -> None:
    made = names_for(found.split(), wanted.split())
    meeting = wanted if wanted != "a c" else found
    assert made == dict(zip(meeting.split(), names.split(), strict=True))


def test_parts_of_a_network_are_no_networks() -> None:
    data = {"model": {"net.a": 1, "net.b": 2, "head": 3}, "step": "7"}
    assert hold(data, int, whole=True).states == {"model": {"net.a": 1, "net.b": 2, "head": 3}}
    averaged = {"model.a": 1, "ema.a": 2}
    assert hold(averaged, int, whole=True).states == hold(averaged, int).states


def test_a_loose_tensor_beside_a_state_dict_is_no_network() -> None:
    weights = {"first.weight": torch.ones(2), "first.bias": torch.ones(1)}
    held = hold({"model": weights, "rng_state": torch.zeros(9)}, Tensor)
    assert (list(held.states), held.others) == (["model"], ["rng_state"])
    alone = hold({"model.weight": torch.ones(2), "model.bias": torch.ones(1)}, Tensor)
    assert list(map(len, alone.states.values())) == [2]  # a flat file has nothing beside


def test_a_quarter_of_the_largest_is_a_state_dict_and_less_is_none() -> None:
    large = {f"w{i}": torch.ones(1) for i in range(8)}
    few = {name: large[name] for name in ("w0", "w1")}
    assert hold({"model": large, "ema": few}, Tensor).states.keys() == {"model", "ema"}
    held = hold({"model": large, "ema": {"w0": large["w0"]}}, Tensor)
    assert (list(held.states), held.others) == (["model"], ["ema/w0"])


def test_any_beginning_of_all_names_may_be_left_out() -> None:
    wanted = ["first.weight", "last.weight"]
    for wrapper in ("denoiser", "model.diffusion_model", "a.b.c"):
        found = [f"{wrapper}.{name}" for name in wanted]
        assert names_for(found, wanted) == dict(zip(wanted, found, strict=True))
        assert names_for(wanted, found) == dict(zip(found, wanted, strict=True))
        other = [f"inner.{name}" for name in wanted]
        assert names_for(other, found) == dict(zip(found, other, strict=True))
    other = ["a.first.weight", "b.last.weight"]
    assert names_for(other, wanted) == {name: name for name in other}


def test_averages_say_so_by_a_word_of_their_key() -> None:
    raw, mean = plain(), plain()
    for data, expected in (
        ({"model": raw, "ema_state": {"module": mean}}, "ema_state/module"),
        ({"generator": raw, "generator_ema": mean}, "generator_ema"),
        ({"net": raw, "EMA_weights_0.999": mean}, "EMA_weights_0.999"),
        ({"model": raw, "ema-2": mean}, "ema-2"),
    ):
        held = hold(data, Tensor)
        assert held.among(averaged=True) == [expected]
        assert len(held.among(averaged=False)) == 1
        assert held.states[expected] == mean
    # Settings of an average, and an optimizer's own, are none; a word is a whole one.
    # Nor is the average of another network, whose names are none of the raw weights'.
    alien = {f"heads.{i}.w": torch.zeros(1) for i in range(6)}
    other = {"ema_config": {"decay": 0.999}, "ema_optimizer": mean, "schema": mean}
    other |= {"discriminator_ema": alien}
    held = hold({"model": raw, **other}, Tensor)
    assert list(held.states) == ["model"]
    assert held.others == list(other)
