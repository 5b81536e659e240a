"""Averages over time, parts of a tensor, factors of an adapter: by hand, at their bounds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merge_rl.errors import CheckpointError, ConfigError, IncompatibleCheckpointError
from merge_rl.storage.convert.adapters import (
    adapter_config,
    as_factors,
    as_products,
    rank_of,
    require_one_kind,
)
from merge_rl.storage.convert.contents import Extracted, Hints
from merge_rl.storage.convert.distcp import PiecedRef, _require_cover, read_distcp
from merge_rl.storage.convert.trainers import is_lightning
from merge_rl.storage.convert.trajectories import (
    arranged,
    is_average,
    named_like,
    parse_widths,
    weights_of,
    with_profile,
)
from merge_rl.storage.pickles import ByteSource, Span, StorageRef, TensorRef, row_major
from tests.storage.convert.test_contents import ref

# ---------------------------------------------------------------------------- averages over time


def number(value: float, code: str = "F32") -> TensorRef:
    kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4"}
    if code == "BF16":
        data = np.array([value], "<f4").tobytes()[2:]
    else:
        data = np.array([value]).astype(kind.get(code, "<i2")).tobytes()
    return TensorRef(StorageRef(code, 1, Span(ByteSource(data), 0, len(data))), 0, (), ())


def average(name: str = "1.1000.pt") -> Extracted:
    return Extracted(path=Path(name), tensors={}, config={}, stem="x")


@pytest.mark.parametrize(
    ("text", "found"),
    [("0:0.05,1:0.28", {0: 0.05, 1: 0.28}), ("0.05 0.1", {0: 0.05, 1: 0.1}), ("3:0.1", {3: 0.1})],
)
def test_widths_by_index(text: str, found: dict[int, float]) -> None:
    assert parse_widths(text) == found


@pytest.mark.parametrize("text", ["", "x", "0.3", "0", "0.289", "a:0.1", "0:0.1,0:0.2", ":0.1"])
def test_no_widths(text: str) -> None:
    with pytest.raises(ConfigError, match='expected --ema-std as "0:0.05,1:0.28" or "0.05,0.28"'):
        parse_widths(text)


@pytest.mark.parametrize("code", ["F16", "BF16", "F32", "F64", "I64", "I32"])
def test_the_step_of_an_average_is_that_of_its_name(code: str) -> None:
    data = {"initted": number(1), "step": number(1000, code), "ema_model.w": ref(1)}
    assert is_average(data, Path("1.1000.pt"))
    assert not is_average(data, Path("1.pt"))
    assert not is_average({"step": number(1)}, Path("1.1000.pt"))
    assert weights_of(data, Path("a")) == {"ema_model.w": data["ema_model.w"]}
    found = with_profile(average(), data, Hints(images_per_step=8))
    assert (found.stem, found.track, found.nimg) == ("step-1000-ema-1", "ema-1", 8000)
    assert found.notes == (
        "average 1: no width said (--ema-std), so that no EMA can be rebuilt from it",
    )
    other = {**data, "step": number(1008 if code == "BF16" else 1002, code)}
    with pytest.raises(CheckpointError, match="its name says step 1000, the file itself step 100"):
        with_profile(average(), other, Hints())


def test_averages_that_begin_late_and_those_beyond_their_type() -> None:
    late = {"initted": number(1), "step": number(900), "w": ref(1)}
    assert weights_of(late, Path("a")) == {"ema_model": {"w": late["w"]}}
    found = with_profile(average(), late, Hints(images_per_step=2))
    assert found.nimg == 1800
    assert found.notes[0] == "averages that begin after 100 steps; nimg counts from there"
    unsaid = with_profile(average(), late, Hints())
    assert unsaid.nimg == 900 * 256
    assert unsaid.notes[1] == "no batch size said; nimg takes 256 images a step (--images-per-step)"
    for step in (0.0, 1100.0):
        with pytest.raises(CheckpointError, match="its name says step 1000, the file itself step"):
            with_profile(average(), {**late, "step": number(step)}, Hints())
    beyond = {**late, "step": number(math.inf, "F16")}
    assert with_profile(average("0.70000.pt"), beyond, Hints(images_per_step=1)).nimg == 70_000
    with pytest.raises(CheckpointError, match="counts of an average, and no weights"):
        weights_of({"initted": number(1), "step": number(1)}, Path("a"))
    for odd in (3, ref(2), number(1, "I16")):
        with pytest.raises(CheckpointError, match="expected one number as step or width, found"):
            with_profile(average(), {**late, "step": odd}, Hints())


def test_widths_of_averages_as_they_are_said_and_stored() -> None:
    data = {"step": number(1000), "ema_model.w": ref(1), "sigma_rel": 0.1}

    def width(**hints: Any) -> float | None:
        return with_profile(
            average(), data, Hints(update_every=1, images_per_step=1, **hints)
        ).ema_std

    assert width() == 0.1
    assert width(ema_std="0.2,0.1") == 0.1
    with pytest.raises(ConfigError, match="--ema-std says 0.2, the file itself 0.1"):
        width(ema_std="0.1,0.2")
    assert width(ema_std="0.2,0.10009") == 0.10009  # to a thousandth
    with pytest.raises(ConfigError, match="--ema-std says 0.10015, the file itself 0.1"):
        width(ema_std="0.2,0.10015")
    with pytest.raises(ConfigError, match="says no width of average 1, only of 0"):
        width(ema_std="0.1")
    with pytest.raises(ConfigError, match="expected --update-every"):
        with_profile(average(), data, Hints())
    for stored in (0.289, 0.0, -1.0):
        with pytest.raises(CheckpointError, match="expected a width of 1e-07 to 0.289, found"):
            with_profile(average(), {**data, "sigma_rel": stored}, Hints(update_every=1))
    infinite = with_profile(average(), {**data, "sigma_rel": number(math.inf)}, Hints())
    assert infinite.ema_std is None


def test_averages_by_the_names_of_the_weights() -> None:
    weights = {"a": ref(1), "b": ref(2), "count": 3}
    named = {"a": ref(1)}
    assert named_like(named, weights) is named
    assert named_like({"state_dict": named}, weights) is named
    values = [ref(1), ref(2)]
    assert named_like(values, weights) == {"a": values[0], "b": values[1]}
    for odd in (
        None,
        [],
        {},
        {"a": 1},
        values[::-1],
        values[:1],
        [*values, ref(1)],
        [values[0], 3],
    ):
        assert named_like(odd, weights) is None


def test_lightning_keeps_averages_in_several_places() -> None:
    state, raw = {"w": ref(1)}, {"w": ref(1)}
    assert is_lightning({"state_dict": state, "pytorch-lightning_version": "2"})
    assert is_lightning({"state_dict": state, "epoch": 1, "global_step": 2})
    for data in (
        {"state_dict": state},
        {"state_dict": state, "epoch": 1},
        {"epoch": 1, "global_step": 2},
    ):
        assert not is_lightning(data)
    swapped = arranged({"state_dict": state, "current_model_state": raw})
    assert (swapped["state_dict"], swapped["ema"]) == (raw, state)
    shadow = [ref(1)]
    kept = arranged({"state_dict": state, "callbacks": {"x": 3, "y": {"shadow_params": shadow}}})
    assert kept["ema"] == {"w": shadow[0]}
    others: list[Any] = [None, [], {"x": {"shadow_params": [ref(2)]}}]
    for callbacks in others:
        assert "ema" not in arranged({"state_dict": state, "callbacks": callbacks})


# ------------------------------------------------------------------------------ parts and factors


def part(*shape: int, code: str = "F32") -> TensorRef:
    return TensorRef(StorageRef(code, math.prod(shape)), 0, shape, tuple(row_major(shape)))


@pytest.mark.parametrize(
    ("shape", "parts", "fits"),
    [
        ((), [((), part())], True),
        ((2, 3), [((0, 0), part(2, 3))], True),
        ((2, 3), [((), part(2, 3))], True),
        ((2, 3), [((0, 0), part(1, 3)), ((1, 0), part(1, 3)), ((2, 0), part(0, 3))], True),
        ((2, 3), [((0, 0), part(2, 1)), ((0, 1), part(2, 2))], True),
        ((2, 3), [((0, 0), part(2, 2)), ((0, 1), part(2, 1))], False),
        ((2, 3), [((0, 0), part(1, 3)), ((0, 0), part(1, 3))], False),
        ((2, 3), [((1, 0), part(2, 3))], False),
        ((2, 3), [((0,), part(2, 3))], False),
        ((2, 3), [((0, 0), part(1, 3))], False),
        ((2, 3), [((0, 0), part(1, 3)), ((1, 0), part(1, 3, code="F16"))], False),
        ((2, 3), [], False),
    ],
)
def test_parts_cover_their_tensor_once(shape: Any, parts: Any, fits: bool, tmp_path: Path) -> None:
    if fits:
        _require_cover(tmp_path, "w", shape, parts)
        return
    with pytest.raises(
        CheckpointError, match=rf"the {len(parts)} parts of w do not cover a tensor"
    ):
        _require_cover(tmp_path, "w", shape, parts)


def test_parts_lie_row_by_row() -> None:
    rows = [np.arange(4, dtype="<f4"), np.arange(4, 6, dtype="<f4")]
    made: list[tuple[tuple[int, ...], TensorRef]] = []
    for begin, row in ((0, rows[0]), (2, rows[1])):
        data = row.tobytes()
        storage = StorageRef("F32", row.size, Span(ByteSource(data), 0, len(data)))
        made.append(((begin, 0), TensorRef(storage, 0, (row.size // 2, 2), (2, 1))))
    pieced = PiecedRef((3, 2), made[::-1])
    assert b"".join(pieced.pieces(6)) == np.arange(6, dtype="<f4").tobytes()
    assert pieced.load().tolist() == [[0, 1], [2, 3], [4, 5]]


def test_what_is_no_description_of_parts(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"}.")
    with pytest.raises(
        CheckpointError, match="not the description of a checkpoint by torch.distrib"
    ):
        read_distcp(tmp_path / ".metadata")


FACTORS = {
    "base_model.model.q.lora_A.weight": ref(2, 3),
    "base_model.model.q.lora_B.weight": ref(5, 2),
}


def test_adapters_say_their_kind_and_rank(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    for config, told in (
        ({"peft_type": "IA3"}, "of the type LORA, found 'IA3'"),
        ({"peft_type": "LORA"}, "expected its rank r, found None"),
        ({"peft_type": "LORA", "r": 0}, "expected its rank r, found 0"),
    ):
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=told):
            adapter_config(tmp_path)
    path.write_text('{"peft_type": "LORA", "r": 2}')
    assert adapter_config(tmp_path)["r"] == 2


def test_adapters_of_one_rank_and_scale() -> None:
    def adapter(**config: Any) -> Extracted:
        return Extracted(path=Path("a"), tensors={}, config={}, stem="a", facts={"adapter": config})

    require_one_kind([adapter(r=2, use_dora=False), adapter(r=2), adapter(r=2, alpha_pattern={})])
    assert rank_of(adapter(r="3")) == 3
    with pytest.raises(
        IncompatibleCheckpointError, match="a is an adapter of rank 2 and a one of rank 3"
    ):
        require_one_kind([adapter(r=2), adapter(r=3)])
    with pytest.raises(IncompatibleCheckpointError, match="with lora_alpha 8, expected 4 as in a"):
        require_one_kind([adapter(r=2, lora_alpha=4), adapter(r=2, lora_alpha=8)])


def test_factors_and_products_of_adapters(tmp_path: Path) -> None:
    assert as_factors(FACTORS, tmp_path) == FACTORS
    beside = {**FACTORS, "base_model.model.norm.weight": ref(3)}
    found = as_products(beside, {"lora_alpha": 4}, tmp_path)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        "norm.weight": (3,),
        "q.weight": (5, 3),
    }
    turned = as_products(FACTORS, {"fan_in_fan_out": True}, tmp_path)
    assert turned["q.weight"].shape == (3, 5)
    scales: list[tuple[dict[str, Any], float]] = [
        ({}, 4.0),
        ({"lora_alpha": 6}, 3.0),
        ({"use_rslora": True}, 8 / math.sqrt(2)),
        ({"lora_alpha": 6, "alpha_pattern": {"q": 1}}, 0.5),
    ]
    for config, scale in scales:
        product: Any = as_products(FACTORS, config, tmp_path)["q.weight"]
        assert product.scale == scale


@pytest.mark.parametrize(
    ("change", "config", "told"),
    [
        ({}, {"use_dora": True}, "a DoRA, whose change is no product"),
        ({}, {"lora_alpha": "x"}, "expected a number other than 0 as lora_alpha"),
        ({"base_model.model.q.lora_A.weight": None}, {}, "q has lora_B alone"),
        ({"q.lora_magnitude": ref(1)}, {}, "q.lora_magnitude is no factor of a layer"),
        ({"base_model.model.q.lora_A.weight": ref(3, 3)}, {}, "the factors of q have shapes"),
        ({"base_model.model.q.lora_A.weight": ref(2)}, {}, "the factors of q have shapes"),
        ({"base_model.model.q.lora_A.weight": ref(0, 3)}, {}, "the factors of q have shapes"),
    ],
)
def test_products_that_cannot_be_made(change: Any, config: Any, told: str, tmp_path: Path) -> None:
    tensors = {k: v for k, v in {**FACTORS, **change}.items() if v is not None}
    with pytest.raises(CheckpointError, match=told):
        as_products(tensors, config, tmp_path)
    with pytest.raises(CheckpointError, match="an adapter without lora_A and lora_B"):
        as_factors({"w": ref(1)}, tmp_path)
    with pytest.raises(CheckpointError, match="an adapter without lora_A, lora_B"):
        as_products({"w": ref(1)}, {}, tmp_path)
