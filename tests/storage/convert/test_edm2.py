"""EDM2's files by hand: modules as data, options and shapes, at what they may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merge_rl.errors import CheckpointError, IncompatibleCheckpointError
from merge_rl.storage.convert.contents import Extracted
from merge_rl.storage.convert.edm2 import (
    edm2_config_from_shapes,
    images_named,
    is_edm2,
    is_snapshot,
    is_training_state,
    read_snapshot,
    read_training_state,
    without_modules,
)
from merge_rl.storage.convert.plan import _network, _require_same_config
from merge_rl.storage.pickles import Record
from tests.storage.convert.test_contents import ref

PATH = Path("edm2-img64-s-0002097-0.050.pkl")


def module(kind: str = "x", **parts: Any) -> Record:
    """A module as data; its parameters, buffers and submodules."""
    state = {f"_{name}": parts.pop(name, {}) for name in ("parameters", "buffers", "modules")}
    return Record(kind, (), {**state, **parts})


def network(kind: str = "persistent:Precond", **parts: Any) -> Record:
    options = {"img_resolution": 8, "img_channels": 3, "label_dim": 0, **parts.pop("options", {})}
    return module(kind, **{"parameters": {"w": ref(1)}, "_init_kwargs": options, **parts})


def snapshot(value: object, **more: object) -> Any:
    return read_snapshot({"ema": value, **more}, PATH)


def test_a_snapshot_is_told_from_a_training_state() -> None:
    assert is_snapshot({"ema": network()})
    assert not is_snapshot({"ema": {}})
    assert not is_snapshot({"ema": network("persistent:EDMPrecond")})
    assert not is_snapshot([])
    averages: list[dict[str, Any]] = [{"stds": []}, {"emas": []}]
    for ema in averages:
        assert is_training_state({"net": {}, "ema": ema})
        assert not is_training_state({"ema": ema})
    others: list[Any] = [{"net": {}}, {"net": {}, "ema": {}}, {"net": {}, "ema": []}, []]
    for data in others:
        assert not is_training_state(data)


def test_names_come_from_walking_parameters_buffers_and_submodules() -> None:
    inner = module(
        parameters={"p": ref(1), "none": None},
        buffers={"b": ref(2), "hidden": ref(3)},
        _non_persistent_buffers_set={"hidden", "p"},
    )
    found = snapshot(network(modules={"m": inner, "absent": None}))
    assert list(found.tensors) == ["w", "m.p", "m.b"]
    assert (found.nimg, found.ema_std, found.track) == (2_097_152, 0.05, "ema-0.050")
    assert (found.stem, found.autoencoder) == (PATH.stem, None)
    long = network(parameters={"n" * 500: ref(1)})
    assert len(next(iter(snapshot(long).tensors))) == 500


def test_networks_of_other_classes_are_their_tensors() -> None:
    inner = module(parameters={"weight": ref(1)}, buffers={"filter": ref(2)})
    loss, pipe = Record("persistent:EDMLoss", (), {"P_mean": -1.2}), module(buffers={"Hz": ref(3)})
    ema = network("persistent:EDMPrecond", modules={"model": inner})
    data: dict[str, object] = {"ema": ema, "loss_fn": loss, "augment_pipe": pipe, "count": 3}
    found: Any = without_modules(data, PATH)
    assert list(found["ema"]) == ["w", "model.weight", "model.filter"]
    assert list(found["augment_pipe"]) == ["Hz"]
    assert (found["loss_fn"], found["count"]) == (loss, 3)
    assert without_modules({"loss_fn": loss, "count": 3}, PATH) is None


def test_names_count_thousands_of_images() -> None:
    names = ("network-snapshot-000200", "training-state-001000", "network-snapshot-0002097", "x")
    assert [images_named(name) for name in names] == [200_000, 1_000_000, None, None]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (3, "expected an EDM2 network, found a whole number"),
        (Record("persistent:Precond"), "the module ema has no content"),
        (network(modules={"m": Record("x", (), [])}), "the module m. has no content"),
        (network(modules={"m": ref(1)}), "submodule m is a tensor"),
        (network(buffers=[]), "a module whose _buffers are 'list'"),
        (network(buffers={3: ref(1)}), "a module whose _buffers are a mapping"),
        (network(parameters={"n" * 501: ref(1)}), "a tensor's name of over 500 characters"),
        (network(_init_kwargs=None), "the network does not say with which options"),
        (network(_init_args=(8,)), "the network does not say with which options"),
        (network(options={"size": 3}), "EDM2's network has no option size"),
        (network(options={3: 3}), "EDM2's network has no option a whole number"),
    ],
)
def test_what_is_no_network(value: object, told: str) -> None:
    with pytest.raises(CheckpointError, match=f"{PATH}: {told}"):
        snapshot(value)


@pytest.mark.parametrize(
    ("key", "fits", "odd"),
    [
        ("img_resolution", [0, 64, 2**20], [-1, 2**20 + 1, True, None, 1.5, "8"]),
        ("channel_mult_noise", [None, 3], [-1, 1.5, "a", False]),
        ("sigma_data", [0.5, 1], [float("nan"), float("inf"), "a", None, True]),
        ("use_fp16", [True, False], [1, None, "yes"]),
        ("channel_mult", [[1, 2], (1, 2.5), [], [1] * 64], [[1] * 65, ["a"], 3, [float("inf")]]),
    ],
)
def test_options_are_of_the_kind_of_their_defaults(
    key: str, fits: list[Any], odd: list[Any]
) -> None:
    for value in fits:
        config = snapshot(network(options={key: value})).config
        assert config[key] == (list(value) if isinstance(value, tuple) else value)
    for value in odd:
        with pytest.raises(CheckpointError, match=f"the network's option {key} is "):
            snapshot(network(options={key: value}))


def test_attributes_complete_the_options_that_were_passed() -> None:
    found = snapshot(network(sigma_data=0.25, use_fp16=False, img_resolution=99)).config
    assert found == {"model": "edm2", "img_resolution": 8, "img_channels": 3, "label_dim": 0,
                     "use_fp16": False, "sigma_data": 0.25}  # fmt: skip


def test_the_encoder_is_official_by_its_numbers() -> None:
    def made(**state: object) -> Any:
        encoder = Record("persistent:StabilityVAEEncoder", (), state)
        found = snapshot(network(), encoder=encoder, dataset_kwargs={"a": 1})
        assert found.facts["dataset"] == {"a": 1}
        return found

    # Of the latents' statistics: 0.5 over each deviation, and minus the mean times that.
    scale = 0.5 / np.array([4.17, 4.62, 3.71, 3.28])
    bias = -np.array([5.81, 3.25, 0.12, -2.15]) * scale
    rows = {"scale": scale.astype("f4"), "bias": bias.astype("f4")}
    assert made(vae_name="v", **rows).autoencoder == "sd-vae-edm2"
    others: list[dict[str, Any]] = [
        {}, {"scale": rows["scale"]}, {**rows, "bias": rows["bias"] * 1.001},
        {**rows, "scale": rows["scale"][:3]}, {**rows, "scale": rows["scale"] * np.nan},
        {**rows, "scale": np.arange(4)},
    ]  # fmt: skip
    assert [made(**other).autoencoder for other in others] == [None] * 6
    for encoder, facts in (
        (None, {"kind": "rgb"}),
        (Record("persistent:StandardRGBEncoder"), {"kind": "rgb"}),
        (Record("persistent:Mine"), {"kind": "other", "class_name": "Mine"}),
    ):
        assert snapshot(network(), encoder=encoder).facts["encoder"] == facts


def state(**changes: Any) -> Any:
    ema = {"stds": [0.05, 0.1], "emas": [{"w": ref(1)}, {"w": ref(1)}]}
    return {"net": {"w": ref(1)}, "ema": ema, "state": {"cur_nimg": 7}, **changes}


def test_a_training_state_has_a_raw_network_and_an_average_a_width() -> None:
    path = Path("training-state-0002097.pt")
    for weights, tracks in (("both", ["raw", "ema-0.050", "ema-0.100"]), ("model", ["raw"]),
                            ("ema", ["ema-0.050", "ema-0.100"])):  # fmt: skip
        assert [item.track for item in read_training_state(state(), path, weights)] == tracks
    raw, average, _ = read_training_state(state(), path, "both")
    assert (raw.stem, raw.folder, raw.nimg, raw.ema_std) == (path.stem, "raw", 7, None)
    assert (average.stem, average.folder, average.ema_std) == (
        f"{path.stem}-0.050",
        "ema-0.050",
        0.05,
    )
    for seen, nimg in (
        (0, 0),
        (-1, 2_097_152),
        (2**60, 2_097_152),
        (1.5, 2_097_152),
        (True, 2_097_152),
    ):
        (item,) = read_training_state(state(state={"cur_nimg": seen}), path, "model")
        assert item.nimg == nimg


@pytest.mark.parametrize(
    ("stds", "emas", "told"),
    [
        (None, [], "expected a list of EMA widths and one of weights"),
        ([], None, "expected a list of EMA widths and one of weights"),
        ([], [], "found 0 EMAs for 0 widths"),
        ([0.1], [{}, {}], "found 2 EMAs for 1 widths"),
        ([0.1, 0.1], [{}, {}], "found 2 EMAs for 2 widths"),
        ([0.0], [{}], "found 1 EMAs for 1 widths"),
        ([0.289], [{}], "found 1 EMAs for 1 widths"),
        (["a"], [{}], "found 1 EMAs for 1 widths"),
    ],
)
def test_widths_and_averages_belong_together(stds: Any, emas: Any, told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        read_training_state(state(ema={"stds": stds, "emas": emas}), PATH, "ema")


SHAPES: dict[str, tuple[int, ...]] = {
    "unet.enc.8x8_conv.weight": (64, 4, 3, 3),
    "unet.enc.8x8_block0.conv_res0.weight": (64, 64, 3, 3),
    "unet.enc.8x8_block1.conv_res0.weight": (64, 64, 3, 3),
    "unet.enc.4x4_block0.conv_res0.weight": (128, 64, 3, 3),
    "unet.enc.4x4_block0.attn_qkv.weight": (384, 128, 1, 1),
    "unet.out_conv.weight": (3, 64, 3, 3),
    "unet.emb_fourier.freqs": (64,),
    "unet.emb_noise.weight": (256, 64),
    "unet.emb_label.weight": (256, 10),
    "logvar_fourier.freqs": (16,),
    "logvar_linear.weight": (1, 16),
}


def test_options_follow_from_shapes() -> None:
    assert is_edm2(SHAPES)
    found = edm2_config_from_shapes(SHAPES)
    assert found == {
        "model": "edm2", "img_resolution": 8, "img_channels": 3, "label_dim": 10,
        "logvar_channels": 16, "model_channels": 64, "channel_mult": [1, 2],
        "channel_mult_emb": 4, "num_blocks": 2, "attn_resolutions": [4],
    }  # fmt: skip
    narrow = {
        name: shape for name, shape in SHAPES.items() if "attn" not in name and "label" not in name
    }
    found = edm2_config_from_shapes({**narrow, "unet.emb_fourier.freqs": (128,)})
    assert (found["label_dim"], found["channel_mult_noise"]) == (0, 2)
    assert (found["channels_per_head"], found["attn_resolutions"]) == (2 * 64 * 2, [])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"unet.enc.8x8_conv.weight": None}, "found 0 and 2 of them"),
        ({"unet.enc.2x2_conv.weight": (1,)}, "found 2 and 2 of them"),
        ({"unet.emb_fourier.freqs": (65,)}, "its widths have no common channel count"),
        ({"unet.emb_noise.weight": (65, 64)}, "its widths have no common channel count"),
        ({"unet.out_conv.weight": ()}, r"tensor unet.out_conv.weight is of shape \[\]"),
        ({"unet.emb_label.weight": (256,)}, r"unet.emb_label.weight is of shape \[256\]"),
        ({"unet.emb_label.weight": (256, 0)}, r"unet.emb_label.weight is of shape \[256, 0\]"),
        ({"logvar_fourier.freqs": None}, "tensor logvar_fourier.freqs is missing"),
        (
            {"unet.enc.4x4_block0.attn_qkv.weight": (96, 32)},
            "how many heads the attention over 32 c",
        ),
        (
            {"unet.enc.4x4_block0.attn_qkv.weight": (96, 96)},
            "how many heads the attention over 96 c",
        ),
    ],
)
def test_shapes_of_no_network(changes: dict[str, Any], told: str) -> None:
    shapes = {name: shape for name, shape in {**SHAPES, **changes}.items() if shape is not None}
    with pytest.raises(CheckpointError, match=told):
        edm2_config_from_shapes(shapes)


def found(path: str, **shapes: tuple[int, ...]) -> Extracted:
    tensors = {name: ref(*shape) for name, shape in shapes.items()}
    return Extracted(path=Path(path), tensors=tensors, config=None, stem=path)


def test_the_network_of_several_files_is_that_of_the_first(tmp_path: Path) -> None:
    config, told = _network([found("a", **SHAPES), found("b", w=(1,))], None, tmp_path)
    assert config == edm2_config_from_shapes(SHAPES)
    assert told[0].startswith("a does not say its network's options; taken: attention heads of 64")
    with pytest.raises(CheckpointError, match="^b: not an EDM2 network"):
        _network([found("b", w=(1,)), found("a", **SHAPES)], None, tmp_path)


def test_networks_of_other_options_are_other_networks() -> None:
    edm2 = {"model": "edm2", "img_resolution": 8}
    # What is left out is the default, and some options make no difference to the weights.
    _require_same_config("b", {**edm2, "sigma_data": 0.5, "dropout": 0.3}, "a", edm2)
    with pytest.raises(
        IncompatibleCheckpointError, match="^b: a network with sigma_data 0.25, expected 0"
    ):
        _require_same_config("b", {**edm2, "sigma_data": 0.25}, "a", edm2)
    with pytest.raises(
        IncompatibleCheckpointError, match="with model sit, expected edm2 as in a; conv"
    ):
        _require_same_config("b", {"model": "sit", "img_resolution": 8}, "a", edm2)
