"""What a file says of itself and what is kept of it, at the bounds; families told by tensors."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_rl.errors import (
    CheckpointError,
    ConfigError,
    IncompatibleCheckpointError,
    UnknownNameError,
)
from merge_rl.storage.convert.contents import (
    NO_HINTS,
    Extracted,
    Hints,
    infos_of,
    plain,
    require_axes,
    require_same,
    require_size,
    state_dict,
)
from merge_rl.storage.convert.families import find_family, fitting, is_foreign, path_of
from merge_rl.storage.convert.metadata import Said, read_said
from merge_rl.storage.convert.sit import (
    describe_jit,
    describe_sit,
    sit_config_from_shapes,
    sit_shapes,
    sit_size_name,
)
from merge_rl.storage.files import TensorInfo
from merge_rl.storage.pickles import Record, StorageRef, TensorRef, read_data
from tests.storage.convert.test_sit_config import CUSTOM


def ref(*shape: int, code: str = "F32") -> TensorRef:
    return TensorRef(StorageRef(code, math.prod(shape)), 0, shape, (1,) * len(shape))


def extracted(**tensors: TensorRef) -> Extracted:
    return Extracted(path=Path("a.pt"), tensors=tensors, config=None, stem="a")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "expected tensors by name, found nothing"),
        ({}, "expected tensors by name, found a mapping"),
        ({3: ref(1)}, "expected names of tensors, found a whole number"),
        ({"a b": ref(1)}, "expected names of tensors, found a b"),
        ({"a" * 501: ref(1)}, "expected names of tensors, found aaa"),
        ({"a": 3}, "a is a whole number, expected a tensor"),
        (dict.fromkeys(map(str, range(20_001)), ref(1)), "20001 tensors, at most 20000"),
    ],
)
def test_what_is_no_state_dict(value: object, told: str) -> None:
    with pytest.raises(CheckpointError, match=f"x: {told}"):
        state_dict(value, "x")


def test_state_dicts_up_to_their_most() -> None:
    for value in ({"a" * 500: ref(1)}, dict.fromkeys(map(str, range(20_000)), ref(1))):
        assert state_dict(value, "x") is value
    require_size(extracted(a=ref(2, 3)), 24)
    with pytest.raises(CheckpointError, match="its tensors take 24 bytes, the whole file has 23"):
        require_size(extracted(a=ref(2, 3)), 23)
    assert require_axes({"w": (2, 3)}, "w", 2, "SiT") == (2, 3)
    for shapes, found in (({}, "missing"), ({"w": (2,)}, r"of shape \[2\]")):
        with pytest.raises(
            CheckpointError, match=f"not a SiT: tensor 'w' is {found}, expected 2 axes"
        ):
            require_axes(shapes, "w", 2, "SiT")


def test_the_first_tensor_that_differs_is_told() -> None:
    expected = {"a": TensorInfo((1,), "F32"), "b": TensorInfo((2,), "F16")}
    require_same(extracted(a=ref(1), b=ref(2, code="F16")), expected, "first.pt")
    for tensors, told in (
        ({"a": ref(1)}, r"tensor b is missing here and float16 \[2\] there \(1 of 1 tensors"),
        ({"a": ref(1), "b": ref(2)}, r"tensor b is float32 \[2\] here and float16 .*1 of 2"),
        ({"a": ref(2), "b": ref(2)}, r"tensor a is float32 \[2\] here and float32 \[1\].*2 of 2"),
    ):
        with pytest.raises(
            IncompatibleCheckpointError, match=f"not the same network as first.pt: {told}"
        ):
            require_same(extracted(**tensors), expected, "first.pt")
    assert infos_of({"a": ref(3)}) == {"a": TensorInfo((3,), "F32")}


def test_what_is_kept_is_plain_and_of_moderate_size() -> None:
    values: dict[str, Any] = {"a": 1, "b": True, "c": 1.5, "d": None, "e": [1, (2, "x")]}
    assert plain(values) == {**values, "e": [1, [2, "x"]]}
    assert plain({1: 2, "f": math.inf, "g": object(), "h": "\ud800"}) == {
        "f": None,
        "g": None,
        "h": "?",
    }
    assert plain("x" * 1001) == "x" * 1000
    assert plain("x" * 1000) == "x" * 1000
    # 2000 values in all, of which the list is one.
    assert plain([0] * 2000) == [0] * 1999 + [None]
    assert len(plain([0] * 3000)) == 2000
    named = plain({str(i): i for i in range(1500)})  # names count as well
    assert sum(value is not None for value in named.values()) == 999


def omega(content: object) -> Record:
    return Record("omegaconf.dictconfig.DictConfig", (), {"_content": content})


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, {}),
        ({"args": {"num_classes": 7}, "cfg": {"n_heads": 3}}, {"num_classes": 7, "num_heads": 3}),
        ({"args": Record("argparse.Namespace", (), {"cfg_prob": 0.2})}, {"class_dropout": 0.2}),
        ({"args": omega({"model": omega({"num_heads": omega(4)})})}, {"num_heads": 4}),
        ({"args": Record("x", (), None)}, {}),
        ({"steps": 10, "args": {"steps": 20}}, {"steps": 10}),  # counted beside the weights
        ({"step": 5.0, "train_steps": 6}, {"steps": 5}),
        ({"args": {"batch_size": 8, "global_batch_size": 64}}, {"batch": 64}),
        ({"args": {"batch_size": 8, "grad_accum_steps": 4}}, {"batch": 32}),
        ({"args": {"global_batch_size": 64, "grad_accum_steps": 4}}, {"batch": 64}),
        ({"args": {"grad_accum_steps": 4}}, {}),
        # The batch of one process, times how many there were.
        ({"args": {"batch_size": 8, "world_size": "4", "accum_iter": 2}}, {"batch": 64}),
        ({"args": {"batch_size": 8, "world_size": -1}}, {"batch": 8}),
        ({"args": {"per_device_train_batch_size": 8, "world_size": 4}}, {"batch": 32}),
        ({"args": {"per_device_train_batch_size": 8}}, {}),
        ({"args": {"global_batch_size": 8, "world_size": 4}}, {"batch": 8}),
        ({"datamodule_hyper_parameters": {"batch_size": 8}}, {"batch": 8}),
        ({"args": {"a": {"num_classes": 5}, "b": {"num_classes": 5}}}, {"num_classes": 5}),
        ({"args": {"a": {"num_classes": 5}, "b": {"num_classes": 6}}}, {}),  # several things
        ({"args": {"num_classes": 3, "a": {"num_classes": 6}}}, {"num_classes": 3}),
        *(({"args": {"num_classes": odd}}, {}) for odd in (True, "x", 0, -1, 1.5, 2**30)),
        ({"args": {"num_classes": "7"}}, {"num_classes": 7}),  # as some write it
        ({"args": {"num_classes": 2**30 - 1}}, {"num_classes": 2**30 - 1}),
        ({"args": {"cfg_prob": 0}}, {"class_dropout": 0.0}),
        ({"args": {"cfg_prob": 1}}, {"class_dropout": 1.0}),
        *(({"args": {"cfg_prob": odd}}, {}) for odd in (-0.1, 1.1, True)),
        (
            {"args": '{"num_classes": 7, "train": {"batch_size": 64}}'},
            {"num_classes": 7, "batch": 64},
        ),
        ({"config": "model:\n  num-heads: 3\n"}, {"num_heads": 3}),
        ({"args": "[1, {"}, {}),
        ({"model_args": {"num-classes": 7}, 1: {}}, {"num_classes": 7}),
        (
            {"num_classes": 7, "iteration": 5, "opt_args": {"num_heads": 2}},
            {"num_classes": 7, "steps": 5},
        ),
    ],
)
def test_what_a_file_says(data: Mapping[str, object], expected: dict[str, Any]) -> None:
    said = vars(read_said(data))
    named = {key: value for key, value in said.items() if key != "settings" and value is not None}
    assert named == expected


# ------------------------------------------------------------------------------------ families

SIT = sit_shapes(CUSTOM)
TWICE = sit_shapes({**CUSTOM, "learn_sigma": True})
REPA = {**SIT, "projectors.0.weight": (1,)}


def test_families_by_their_tensors() -> None:
    assert [fitting(shapes) for shapes in (SIT, TWICE, REPA, {"w": (1,)})] == [
        ("sit", "repa", "dit"), ("sit", "dit"), ("repa",), (),
    ]  # fmt: skip
    assert is_foreign({"layer.weight": (1,)})
    assert is_foreign({"weight": (1,)})
    assert not is_foreign({"w": (1,)})  # of no module
    assert not is_foreign({"pos_embed": (1,), "x_embedder.proj.weight": (1,)})  # damaged
    assert is_foreign({"pos_embed": (1,), "layer.weight": (1,)})
    # Descendants have more: a norm, rotations, statistics of latents.
    for name in ("blocks.0.attn.q_norm.weight", "feat_rope.freqs_cos", "bn.running_mean"):
        assert fitting({**SIT, name: (1,)}) == ()
        assert is_foreign({**SIT, name: (1,)})
    # Or tokens beside them, or no stored positions; a count and what lacks a tensor are no parts.
    width = SIT["pos_embed"][-1]
    assert is_foreign({**SIT, "register_tokens": (1, 4, width)})
    assert not any(is_foreign({**SIT, "extra": of}) for of in ((width,), (1, width + 1)))  # spoilt
    assert is_foreign({n: s for n, s in SIT.items() if n != "pos_embed"} | {"feat_rope.sin": (2,)})
    assert not is_foreign({**SIT, "n_averaged": ()})
    assert not is_foreign(SIT)


@pytest.mark.parametrize(
    ("shapes", "settings", "config", "stem", "family", "found"),
    [
        (SIT, {}, None, "a", "repa", "repa"),
        (SIT, {}, {"model": "repa"}, "sit", None, "repa"),
        (SIT, {"enc_type": "x"}, None, "sit", None, "repa"),
        (SIT, {"model": "SiT-XL/2"}, None, "repa", None, "sit"),
        (SIT, {"a": {"path_type": "x"}}, None, "repa", None, "sit"),
        (SIT, {"a": 1}, None, "repa", None, "repa"),
        (TWICE, {}, None, "my-DiT-7", None, "dit"),
        (TWICE, {"model": "DiT-B"}, None, "a", None, "dit"),
        (TWICE, {"model": "DiT-B", "path_type": "Linear"}, None, "dit", None, "sit"),
        (TWICE, {"model": "DiT-B", "prediction": "velocity"}, None, "dit", None, "sit"),
        (SIT, {"model": "DiT-B", "noise_schedule": "linear"}, None, "a", None, "dit"),
        (SIT, {}, {"model": "dit"}, "a", None, "dit"),
        (REPA, {}, None, "a", None, "repa"),
        (
            {"w": (1,), **dict.fromkeys(("pos_embed", "final_layer.linear.weight"), (1,))},
            {},
            None,
            "a",
            None,
            "sit",
        ),
        # Of the family that most tensors are of, which then names the one that is missing.
        (dict.fromkeys(("pos_embed", "x_embedder.proj.weight"), (1,)), {}, None, "a", "jit", "sit"),
        (
            dict.fromkeys(("pos_embed", "x_embedder.proj1.weight"), (1,)),
            {},
            None,
            "a",
            None,
            "jit",
        ),
        (
            dict.fromkeys(("unet.emb_noise.weight", "logvar_linear.weight"), (1,)),
            {},
            None,
            "a",
            "sit",
            "edm2",
        ),
    ],
)
def test_a_family_is_told_by_user_config_settings_or_name(
    shapes: Any, settings: Any, config: Any, stem: str, family: str | None, found: str
) -> None:
    said, hints = Said(settings=settings), Hints(family=family)
    assert find_family(shapes, said, config, stem, hints) == found


@pytest.mark.parametrize(
    ("shapes", "family", "told"),
    [
        (
            SIT,
            None,
            "sit, repa and dit have these tensors and differ in what they predict or which",
        ),
        (TWICE, None, "sit and dit have these tensors and differ in what they predict"),
        (SIT, "jit", "not the tensors of jit, but of sit or repa or dit"),
        # What none of the three can be is not asked for its family first.
        (
            {name: shape for name, shape in TWICE.items() if not name.startswith("y_embedder")},
            None,
            "'y_embedder.embedding_table.weight' is missing, .*; another network takes --network",
        ),
        ({**TWICE, "t_embedder.mlp.0.weight": (1, 128)}, None, "1 tensors do not fit .* --networ"),
        ({**SIT, "bn.mean": (1,)}, "sit", "of sit, but of none known: it has no 'bn.mean'"),
        ({"w": (1,)}, "dit", "not the tensors of dit, but of none known"),
    ],
)
def test_a_family_that_is_not_told_or_does_not_fit(
    shapes: Any, family: str | None, told: str
) -> None:
    with pytest.raises(CheckpointError, match=told):
        find_family(shapes, Said(settings={}), None, "audit-editor", Hints(family=family))
    with pytest.raises(UnknownNameError, match="family of networks"):
        find_family(shapes, Said(settings={}), None, "a", Hints(family="unet"))


def test_paths_and_predictions() -> None:
    assert path_of("dit", {"path_type": "x"}) is None
    assert path_of("sit", {}) is None
    assert path_of("sit", {"prediction": "Velocity", "path_type": "GVP"}) == "gvp"
    assert path_of("repa", {"prediction": "v", "path_type": "cosine"}) == "gvp"
    with pytest.raises(
        ConfigError, match="trained with prediction score; expected a network of veloc"
    ):
        path_of("sit", {"prediction": "score"})
    assert path_of("dit", {"noise_schedule": "linear", "predict_xstart": False}) is None
    for settings, expected in (
        ({"noise_schedule": "squaredcos_cap_v2"}, "linear betas"),
        ({"diffusion": {"predict_xstart": True}}, "one without"),
        ({"diffusion_steps": 4000}, "1000 steps"),
        ({"prediction": "v"}, "a network of noise"),
    ):
        with pytest.raises(ConfigError, match=rf"^trained with .*; expected {expected}$"):
            path_of("dit", settings)
    with pytest.raises(ConfigError, match="trained on the path 'x'; expected one of linear, gvp"):
        path_of("sit", {"path_type": "x"})


# ------------------------------------------------------------------------------ sizes of SiT, JiT


def test_what_was_assumed_of_a_sit_is_told() -> None:
    config, assumed = describe_sit(SIT, Said(settings={}), NO_HINTS)
    assert (config["num_classes"], config["num_heads"], set(assumed)) == (
        37,
        2,
        {"num_classes", "num_heads"},
    )
    assert assumed["num_classes"].startswith(
        "no number of classes said; taken: 37 and a null class for a label table of 38 rows"
    )
    without = sit_shapes({**CUSTOM, "num_classes": 40, "class_dropout_prob": 0.0})
    _, told = describe_sit(without, Said(settings={}), NO_HINTS)
    assert "taken: 40 and no null class for a label table of 40 rows" in told["num_classes"]
    said = Said(settings={}, num_classes=37, class_dropout=0.3, num_heads=4)
    config, assumed = describe_sit(SIT, said, NO_HINTS)
    assert (config["class_dropout_prob"], config["num_heads"], assumed) == (0.3, 4, {})


@pytest.mark.parametrize(
    ("said", "hints", "classes"),
    [
        ({}, {"num_classes": 37}, 37),
        ({}, {"num_classes": 37, "null_class": True}, 37),
        ({}, {"num_classes": 38, "null_class": False}, 38),
        ({}, {"null_class": True}, 37),
        ({}, {"null_class": False}, 38),
        ({"num_classes": 38}, {"null_class": True}, 37),
        ({"num_classes": 38, "class_dropout": 0.1}, {}, 38),
        ({"class_dropout": 0.1}, {}, 37),
        ({"class_dropout": 0.0}, {}, 38),
    ],
)
def test_classes_as_they_are_said(said: Any, hints: Any, classes: int) -> None:
    config, assumed = describe_sit(SIT, Said(settings={}, **said), Hints(**hints))
    assert config["num_classes"] == classes
    assert "num_classes" not in assumed


def test_classes_that_the_table_does_not_hold() -> None:
    for null, told in (
        (True, "38 classes and a null class .* of 39 rows, found 38"),
        (False, "37 classes without a null class .* of 37 rows, found 38"),
    ):
        with pytest.raises(ConfigError, match=told):
            describe_sit(SIT, Said(settings={}), Hints(num_classes=37 + null, null_class=null))
    for count in (0, 36, 39):
        with pytest.raises(
            ConfigError, match=f"num_classes 38 .* or 37 .* of 38 rows, got {count}"
        ):
            sit_config_from_shapes(SIT, num_classes=count)
    assert sit_config_from_shapes(SIT, num_heads=1)["num_heads"] == 1
    for heads in (0, -1, 3):
        with pytest.raises(ConfigError, match=f"to divide the hidden size 128, got {heads}"):
            sit_config_from_shapes(SIT, num_heads=heads)
    with pytest.raises(CheckpointError, match="hidden size 40 is none of the known sizes"):
        sit_config_from_shapes(sit_shapes({**CUSTOM, "hidden_size": 40}))


def test_names_of_sizes() -> None:
    known = {"depth": 24, "hidden_size": 1024, "num_heads": 16, "patch_size": 8}
    assert sit_size_name(known) == "SiT-L/8"
    for change in ({"patch_size": 3}, {"mlp_ratio": 3.0}, {"depth": 25}):
        assert sit_size_name({**known, **change}) == "custom"


def jit(depth: int = 2, side: int = 3, gated: int = 21, **more: Any) -> dict[str, Any]:
    """Shapes of a JiT of width 8 with heads of 4; 21 = int(int(8 * 4) * 2 / 3)."""
    blocks = {f"blocks.{i}.mlp.w12.weight": (2 * gated, 8) for i in range(depth)}
    return {
        "x_embedder.proj1.weight": (5, 3, 16, 16), "y_embedder.embedding_table.weight": (11, 8),
        "blocks.0.attn.q_norm.weight": (4,), "pos_embed": (1, side * side, 8), **blocks, **more,
    }  # fmt: skip


def test_options_of_a_jit_follow_from_its_shapes() -> None:
    config, assumed = describe_jit(jit(), Said(settings={}))
    assert config == {
        "model": "jit", "input_size": 48, "patch_size": 16, "in_channels": 3, "hidden_size": 8,
        "depth": 2, "num_heads": 2, "mlp_ratio": 4.0, "num_classes": 10, "bottleneck_dim": 5,
        "in_context_len": 0, "in_context_start": 0, "noise_scale": 1.0,
    }  # fmt: skip
    assert assumed == {"noise_scale": "no noise scale said; taken: 1"}
    token: dict[str, Any] = {"in_context_posemb": (1, 4, 8)}
    config, assumed = describe_jit(jit(depth=6, **token), Said(settings={"noise_scale": 2}))
    assert (config["in_context_len"], config["in_context_start"], config["noise_scale"]) == (
        4,
        2,
        2.0,
    )
    assert assumed == {
        "in_context_start": "no published depth; class tokens taken to join before block 2"
    }
    config, assumed = describe_jit(
        jit(depth=12, side=32, **token), Said(settings={"noise_scale": 0})
    )
    assert (config["input_size"], config["noise_scale"], config["in_context_start"]) == (
        512,
        2.0,
        4,
    )
    assert set(assumed) == {"noise_scale"}
    for gated in range(1, 40):  # of any width within
        ratio = describe_jit(jit(gated=gated), Said(settings={}))[0]["mlp_ratio"]
        assert int(int(8 * ratio) * 2 / 3) == gated


@pytest.mark.parametrize(
    "change",
    [
        {"pos_embed": (1, 8, 8)},
        {"pos_embed": (1, 0, 8)},
        {"y_embedder.embedding_table.weight": (1, 8)},
        {"blocks.0.attn.q_norm.weight": (0,)},
        {"blocks.0.mlp.w12.weight": (1, 8)},
        {"x_embedder.proj1.weight": (5, 3, 0, 0)},
    ],
)
def test_what_is_no_jit(change: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(
        CheckpointError, match="not a JiT: expected a square number of tokens and no e"
    ):
        describe_jit(jit() | change, Said(settings={}))
    two = {"y_embedder.embedding_table.weight": (2, 8)}
    assert describe_jit(jit() | two, Said(settings={}))[0]["num_classes"] == 1


def test_a_text_of_settings_is_read_whole_or_not_at_all() -> None:
    # Cut short, the last number would be another one.
    text = "a: " + "x" * 99_970 + "\nglobal_batch_size: 12"
    assert len(text) < 100_000
    assert read_said({"args": text}).settings["global_batch_size"] == 12
    assert read_said({"args": text + "8" * 50}).settings == {}


def test_settings_that_are_tensors_of_one_number_are_numbers() -> None:
    args: dict[str, Any] = {
        "global_batch_size": torch.tensor(64),
        "cfg": {"num_heads": torch.tensor([4])},
    }
    buffer = io.BytesIO()
    # More numbers are no setting; a step is counted beside state dicts.
    torch.save(
        {"args": args | {"num_classes": torch.tensor([7, 7])}, "step": torch.tensor(9)}, buffer
    )
    data: Any = read_data(buffer.getvalue())
    said = read_said(data)
    assert (said.batch, said.num_heads, said.num_classes, said.steps) == (64, 4, None, 9)
