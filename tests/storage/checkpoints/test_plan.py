"""What a merge does with each tensor: averaged in a group, or carried, by whose word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from merge_rl.core.merging.buffers import FlatLayout
from merge_rl.core.merging.groups import Groups
from merge_rl.errors import (
    CheckpointError,
    ConfigError,
    IncompatibleCheckpointError,
    NonFiniteWeightsError,
    UnknownNameError,
)
from merge_rl.storage.checkpoints.checkpoint_set import CheckpointSet, open_checkpoints
from merge_rl.storage.checkpoints.merging import (
    MappedCheckpoints,
    keep_states,
    load_checkpoints,
    module_of,
)
from merge_rl.storage.checkpoints.model_file import (
    check_model_file,
    model_file_path,
    open_model_file,
    require_fit,
    require_network,
    save_checkpoint,
)
from merge_rl.storage.checkpoints.plan import base_index, finite_bytes, plan_merge
from merge_rl.storage.files import TensorInfo, save_tensors


class Net(nn.Module):
    """A parameter, one that holds a constant, a buffer that is stored and one that is not."""

    fixed_names = ("constant",)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.constant = nn.Parameter(torch.zeros(1))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


def states(folder: Path, **changes: torch.Tensor) -> CheckpointSet:
    """Three checkpoints of `Net`; the changes are the last one's."""
    for k in range(3):
        tensors = {
            "weight": torch.tensor([float(k), 1.0]),
            "constant": torch.tensor([4.0]),
            "count": torch.tensor([k]),
        }
        save_tensors(folder / f"s_{k}.safetensors", tensors | (changes if k == 2 else {}))
    return open_checkpoints(folder)


def test_a_network_says_what_is_carried(tmp_path: Path) -> None:
    plan = plan_merge(states(tmp_path), model=Net())
    assert (plan.merged, plan.carried, plan.base) == (("weight",), ("constant", "count"), 2)
    assert (plan.groups.names, plan.group_of) == (("all",), {"weight": 0})


def test_without_a_network_whole_numbers_are_carried(tmp_path: Path) -> None:
    checkpoints = states(tmp_path)
    plan = plan_merge(checkpoints, base="s_1", groups={"g": "weight", "c": "constant"})
    assert (set(plan.merged), plan.carried, plan.base) == ({"weight", "constant"}, ("count",), 1)
    assert {plan.groups.names[g] for g in plan.group_of.values()} == {"g", "c"}
    frozen = plan_merge(checkpoints, freeze=["^con"])
    assert (frozen.merged, frozen.carried, frozen.frozen) == (
        ("weight",),
        ("constant", "count"),
        ("^con",),
    )
    for freeze, told in (
        (["("], r"a regular expression to freeze, got '\('"),
        (["con", "x"], "expected 'x' to freeze at least one tensor, got none"),
        (["t"], "--freeze takes all 3 tensors; expected some to merge"),
    ):
        with pytest.raises(ConfigError, match=told):
            plan_merge(checkpoints, freeze=freeze)


def test_constants_are_the_same_in_all(tmp_path: Path) -> None:
    checkpoints = states(tmp_path, constant=torch.tensor([4.5]))
    with pytest.raises(
        IncompatibleCheckpointError, match="s_2.safetensors: the constant 'constant' di"
    ):
        plan_merge(checkpoints, model=Net())
    assert finite_bytes(checkpoints, 2, "constant") == torch.tensor([4.5]).numpy().tobytes()
    spoilt = states(tmp_path, weight=torch.tensor([float("nan"), 1.0]))
    with pytest.raises(
        NonFiniteWeightsError, match="s_2.safetensors: tensor 'weight' .* 1 of 2 values"
    ):
        finite_bytes(spoilt, 2, "weight")


def test_complex_tensors_are_carried_where_all_are_the_same(tmp_path: Path) -> None:
    class Turned(Net):
        """A network whose parameters are not all averaged: one is complex, one counts."""

        def __init__(self) -> None:
            super().__init__()
            self.turns = nn.Parameter(torch.ones(1) * 1j)
            self.places = nn.Parameter(torch.ones(1, dtype=torch.int64), requires_grad=False)

    for last in (1j, 2j):
        folder = tmp_path / str(last.imag)
        for k, turn in enumerate((1j, last)):
            weights = {**Turned().state_dict(), "weight": torch.ones(2) * k}
            save_tensors(folder / f"s_{k}.safetensors", weights | {"turns": torch.tensor([turn])})
    try:
        same, other = (open_checkpoints(tmp_path / name) for name in ("1.0", "2.0"))
    except CheckpointError as error:
        if "unknown variant `C64`" in str(error):
            pytest.skip("this safetensors knows no complex numbers")
        raise
    carried = ("constant", "count", "places", "turns")
    assert plan_merge(same, model=Turned()).carried == carried
    assert plan_merge(same).carried == carried[1:]
    assert plan_merge(other, freeze=["turns"]).carried == carried[1:]
    for model in (Turned(), None):
        with pytest.raises(IncompatibleCheckpointError, match="the complex 'turns' differs from"):
            plan_merge(other, model=model)


def test_what_coefficients_start_from(tmp_path: Path) -> None:
    checkpoints = states(tmp_path)
    starts = ("auto", "newest", "uniform", "s_0", "s_1")
    assert [base_index(checkpoints, start) for start in starts] == [2, 2, 2, 0, 1]
    with pytest.raises(UnknownNameError, match="unknown checkpoint 's_9'"):
        base_index(checkpoints, "s_9")


def test_mapped_sets_hold_what_loaded_ones_do(tmp_path: Path) -> None:
    checkpoints = states(tmp_path)
    plan = plan_merge(checkpoints, groups={"g": "weight", "c": "constant"}, base="s_1")
    mapped, loaded = (load_checkpoints(checkpoints, plan, where) for where in ("disk", "cpu"))
    assert (mapped.num_checkpoints, mapped.device) == (3, torch.device("cpu"))
    table = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.25, 0.25]], dtype=torch.float64)
    for checkpoint in (mapped, loaded):
        weights = checkpoint.weights(table)
        assert weights["weight"].tolist() == [0 + 2 + 6.0, 6.0]
        assert weights["constant"].tolist() == [4.0]
        assert weights["count"].tolist() == [1]


def test_pieces_are_of_the_groups_in_which_their_tensors_lie() -> None:
    # The last is empty, so that it begins where the last group ends.
    forms = {"a": (2,), "b": (1, 1), "c": (3,), "d": (0,)}
    rows = [{name: torch.full(shape, float(k)) for name, shape in forms.items()} for k in range(2)]
    layout = FlatLayout.of(forms, Groups(("x", "y"), (0, 1, 0, 1)))
    pieces = list(MappedCheckpoints(layout, rows, {}).pieces())
    assert [piece[:3] for piece in pieces] == [(0, 2, 0), (2, 5, 0), (5, 6, 1), (6, 6, 1)]
    assert [source.tolist() for source in pieces[1].sources] == [[0.0] * 3, [1.0] * 3]


def test_states_are_kept_by_name(tmp_path: Path) -> None:
    state = {"w": torch.arange(4.0).reshape(2, 2).T}
    keep_states(tmp_path / "a/b", {"s_1": state, "x.y=2": state})
    assert (
        open_checkpoints(tmp_path / "a/b", distinct=False).read(0)["w"].tolist()
        == state["w"].tolist()
    )
    wrong: dict[str, tuple[Any, str]] = {
        "a/b": (state, "got name 'a/b'"),
        "": (state, "got name ''"),
        "s": ({}, "checkpoint s: expected tensors by name, found nothing"),
        "t": (
            {"w": torch.ones(1), "x": 3},
            "checkpoint t: expected tensors by name, found int at 'x'$",
        ),
        "w": (
            {"model": {"w": torch.ones(1)}},
            "found dict at 'model'; hand over one of the state dicts in it, or its file$",
        ),
        "u": ({1: torch.ones(1)}, "found a tensor at 1$"),
        "v": ({"x": torch.ones(1).to_sparse()}, "found a sparse_coo tensor at 'x'$"),
    }
    for number, (name, (value, told)) in enumerate(wrong.items()):
        with pytest.raises(CheckpointError, match=told):
            keep_states(tmp_path / str(number), {name: value})
    with pytest.raises(FileExistsError):
        keep_states(tmp_path / "a/b", {})


def test_a_module_of_any_tensors() -> None:
    infos = {
        "a.b": TensorInfo((2,), "F16"),
        "a.n": TensorInfo((1,), "I64"),
        "c": TensorInfo((), "F32"),
    }
    module = module_of(infos)
    found = {
        name: TensorInfo.of(tuple(t.shape), t.dtype) for name, t in module.state_dict().items()
    }
    assert found == infos
    assert [name for name, _ in module.named_buffers()] == ["a.n"]
    assert not any(parameter.requires_grad for parameter in module.parameters())
    for name in ("a..b", "forward"):
        with pytest.raises(
            CheckpointError, match=f"the tensor name '{name}' is not one of a state di"
        ):
            module_of({name: TensorInfo((1,), "F32")})


# --------------------------------------------------------------------------------- one network


def test_what_does_not_fit_a_network_is_counted_and_the_first_described() -> None:
    fit = {"weight": TensorInfo((2,), "F16"), "constant": TensorInfo((1,), "F32"),
           "count": TensorInfo((1,), "I32")}  # fmt: skip
    require_fit(fit, Net(), "x")
    for changes, told in (
        (
            {"weight": TensorInfo((3,), "F32")},
            r"1 differ, first 'weight': found float32 \[3\], expected a ",
        ),
        ({"count": TensorInfo((1,), "F32")}, r"found float32 \[1\], expected whole numbers \[1\]$"),
        ({"constant": TensorInfo((1,), "I8"), "x": fit["count"]}, r"2 differ, first 'constant'"),
        ({"x": fit["count"]}, r"first 'x': found int32 \[1\], expected no such tensor$"),
    ):
        with pytest.raises(
            IncompatibleCheckpointError, match=f"x: not the tensors of the network: .*{told}"
        ):
            require_fit(fit | changes, Net(), "x")
    with pytest.raises(
        IncompatibleCheckpointError, match="first 'count': found missing, expected whole"
    ):
        require_fit({name: fit[name] for name in ("weight", "constant")}, Net(), "x")


def test_a_config_that_describes_far_more_is_not_built() -> None:
    tensors = {"w": TensorInfo((1,), "F32")}
    for config in (None, {}, {"a": 1}):  # of no network of ours
        require_network(tensors, config, "x")
    sit: dict[str, Any] = {"model": "sit", "depth": 2}
    with pytest.raises(
        IncompatibleCheckpointError, match="x: 1 tensors, but its config describes a netw"
    ):
        require_network(tensors, sit, "x")
    with pytest.raises(IncompatibleCheckpointError, match="x: "):
        require_network(tensors, {"model": "sit", "dept": 1}, "x")


def test_one_model_is_a_file_or_a_folder_of_one(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="expected the folder of one model, found no .safetensors fi"
    ):
        model_file_path(tmp_path)
    with pytest.raises(CheckpointError, match="b.safetensors: no such file or folder"):
        model_file_path(tmp_path / "b.safetensors")
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"w": torch.ones(1)}, {"text": "as it is", "config": {"b": 1, "a": 2}})
    assert model_file_path(tmp_path) == model_file_path(path) == path
    weights, config, metadata = open_model_file(tmp_path)
    assert (weights["w"].tolist(), config) == ([1.0], {"a": 2, "b": 1})
    assert metadata == {"text": "as it is", "config": '{"a": 2, "b": 1}'}
    assert check_model_file(path) == ({"w": TensorInfo((1,), "F32")}, {"a": 2, "b": 1})
    save_checkpoint(tmp_path / "b.safetensors", {"w": torch.ones(1)})
    assert open_model_file(tmp_path / "b.safetensors").metadata == {}
    with pytest.raises(
        CheckpointError, match="found 2 .safetensors files; name one of them, or merge"
    ):
        model_file_path(tmp_path)
    (tmp_path / "c.pkl").touch()
    with pytest.raises(
        CheckpointError,
        match="c.pkl: expected a .safetensors file, found a .pkl file; `mergerl",
    ):
        model_file_path(tmp_path / "c.pkl")
    save_tensors(path, {"w": torch.tensor([float("inf")])})
    with pytest.raises(
        NonFiniteWeightsError, match="a.safetensors: tensor 'w' holds NaN or infinity"
    ):
        check_model_file(path)
