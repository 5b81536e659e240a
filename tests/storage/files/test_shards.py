"""Weights in one file or in shards: equal content, official index, nothing half-written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from merge_rl.errors import CheckpointError, ConfigError, NonFiniteWeightsError
from merge_rl.storage.checkpoints.model_file import model_sha256, open_model_file
from merge_rl.storage.files.documents import sha256_file
from merge_rl.storage.files.safetensors_header import TensorInfo, read_header
from merge_rl.storage.files.shards import (
    DIFFUSERS_STEM,
    WeightStream,
    plan_shards,
    read_index,
    stem_in,
    tensor_file,
    write_weights,
)
from tests.children import largest_file

INDEX = "model.safetensors.index.json"


def weights() -> dict[str, Tensor]:
    # 24, 8, 16, 4 bytes; an integer tensor between floating ones.
    return {
        "a": torch.arange(6.0).reshape(2, 3),
        "steps": torch.tensor([2**40]),
        "b": torch.tensor([[1.5, -2.0], [0.25, 3.0]]),
        "gain": torch.tensor(0.5),
    }


def infos(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return dict(WeightStream.of(tensors).infos)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (52, [["a", "steps", "b", "gain"]]),
        (51, [["a", "steps", "b"], ["gain"]]),
        (32, [["a", "steps"], ["b", "gain"]]),
        (31, [["a"], ["steps", "b", "gain"]]),
        (1, [["a"], ["steps"], ["b"], ["gain"]]),
    ],
)
def test_shards_by_hand(limit: int, expected: list[list[str]]) -> None:
    assert plan_shards(infos(weights()), limit) == expected


def test_one_file_below_the_limit(tmp_path: Path) -> None:
    paths = write_weights(tmp_path, WeightStream.of(weights()), {"format": "pt"})
    assert paths == [tmp_path / "model.safetensors"]
    # The reference library of the format reads the same.
    found = load_file(paths[0])
    assert {k: v.tolist() for k, v in found.items()} == {
        k: v.tolist() for k, v in weights().items()
    }
    assert read_index(tmp_path) is None
    assert model_sha256(tmp_path) == sha256_file(paths[0])


def test_shards_and_their_index(tmp_path: Path) -> None:
    paths = write_weights(tmp_path, WeightStream.of(weights()), {"k": "v"}, max_shard_bytes=32)
    assert [path.name for path in paths] == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX,
    ]  # fmt: skip
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 52},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "steps": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
            "gain": "model-00002-of-00002.safetensors",
        },
    }
    assert set(load_file(paths[0])) == {"a", "steps"}
    file = open_model_file(tmp_path)
    assert list(file.weights) == list(weights())
    assert all(torch.equal(file.weights[name], tensor) for name, tensor in weights().items())
    assert file.metadata == {"k": "v"}
    # The hash of a sharded model sees every shard.
    before = model_sha256(tmp_path)
    write_weights(
        tmp_path, WeightStream.of({**weights(), "gain": torch.tensor(0.25)}), {"k": "v"},
        max_shard_bytes=32,
    )  # fmt: skip
    assert model_sha256(tmp_path) != before


def test_casting_keeps_whole_numbers(tmp_path: Path) -> None:
    write_weights(tmp_path, WeightStream.of(weights()).cast("F16"), {})
    found = load_file(tmp_path / "model.safetensors")
    assert found["b"].dtype == torch.float16
    assert found["steps"].dtype == torch.int64


def test_only_one_tensor_is_asked_for_at_a_time(tmp_path: Path) -> None:
    written: list[int] = []

    def come() -> object:
        for name, tensor in weights().items():
            written.append(sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()))
            yield name, tensor

    write_weights(tmp_path, WeightStream(infos(weights()), come()), {}, max_shard_bytes=1)  # type: ignore[arg-type]
    # What came before is on its way to disk when the next one is asked for.
    assert written == sorted(written)
    assert written[0] == 0 or written[0] < written[-1]


def test_what_does_not_fit_the_announcement_is_refused(tmp_path: Path) -> None:
    given = weights()
    for tensors, message in (
        ({**given, "b": given["b"].half()}, "for tensor 'b'"),
        ({**given, "b": given["b"].T[:1]}, "for tensor 'b'"),
        ({"steps": given["steps"], "a": given["a"]}, "expected tensor 'a', got 'steps'"),
    ):
        stream = WeightStream(infos(given), tensors.items())
        with pytest.raises(CheckpointError, match=message):
            write_weights(tmp_path, stream, {})
    bad = {**given, "gain": torch.tensor(float("nan"))}
    with pytest.raises(NonFiniteWeightsError, match="'gain' holds NaN"):
        write_weights(tmp_path, WeightStream.of(bad), {})
    with (
        pytest.raises(CheckpointError, match="'steps' did not come"),
        tensor_file(tmp_path / "x.safetensors", infos(given), {}) as file,
    ):
        file.put("a", given["a"])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="at least 1 byte, got 0"):
        plan_shards(infos(given), 0)


def test_tensors_come_in_parts_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, real = weights(), os.pwrite

    def few(descriptor: int, data: memoryview, offset: int) -> int:
        return real(descriptor, data[:3], offset)

    monkeypatch.setattr(os, "pwrite", few)  # as a system may
    path = tmp_path / "x.safetensors"
    with tensor_file(path, infos(given), {"hash": "0" * 8}) as file:
        for name, tensor in given.items():
            data = memoryview(tensor.numpy().tobytes())
            file.write(name, len(data) // 4, data[len(data) // 4 :])
            file.write(name, 0, data[: len(data) // 4])
        file.describe({"hash": "12345678"})
    found = load_file(path)
    assert all(torch.equal(found[name], given[name]) for name in given)
    assert read_header(path).metadata == {"hash": "12345678"}


def test_weights_are_called_as_their_library_calls_them(tmp_path: Path) -> None:
    assert stem_in(tmp_path) == "model"
    for name in (f"{DIFFUSERS_STEM}.safetensors", f"{DIFFUSERS_STEM}.safetensors.index.json"):
        (tmp_path / name).touch()
        assert stem_in(tmp_path) == DIFFUSERS_STEM
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    "home", ["../model.safetensors", "/etc/model.safetensors", "x\\y.safetensors", "a.pkl", 3, ""]
)
def test_an_index_names_files_beside_it_only(home: object, tmp_path: Path) -> None:
    write_weights(tmp_path, WeightStream.of(weights()), {}, max_shard_bytes=32)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["gain"] = home
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names of .safetensors beside it"):
        open_model_file(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected a weight_map"),
        ('{"weight_map": {}}', "expected a weight_map"),
        ('{"weight_map": [1]}', "expected a weight_map"),
        ("[", "not readable JSON"),
    ],
)
def test_a_damaged_index_is_refused(text: str, message: str, tmp_path: Path) -> None:
    write_weights(tmp_path, WeightStream.of(weights()), {}, max_shard_bytes=32)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_model_file(tmp_path)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    write_weights(tmp_path, WeightStream.of(weights()), {}, max_shard_bytes=32)
    index = json.loads((tmp_path / INDEX).read_text())
    homes = index["weight_map"]
    for change, message in (
        (
            {k: v for k, v in homes.items() if k != "b"},
            "holds tensor 'b', which the index does not",
        ),
        ({**homes, "more": homes["a"]}, "expected tensor 'more', as the index says"),
        ({**homes, "a": homes["gain"]}, "holds tensor 'a', which the index does not"),
    ):
        (tmp_path / INDEX).write_text(json.dumps({**index, "weight_map": change}))
        with pytest.raises(CheckpointError, match=message):
            open_model_file(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors: no such file"):
        open_model_file(tmp_path)


@pytest.mark.parametrize("limit", [100, 3000])
def test_a_full_disk_leaves_nothing(limit: int, tmp_path: Path) -> None:
    made = WeightStream.of({str(i): torch.ones(256) for i in range(4)})
    with largest_file(limit):
        if limit == 3000:  # enough for either shard and the index
            write_weights(tmp_path, made, {}, max_shard_bytes=2048)
        else:
            with pytest.raises(OSError, match="cannot be written: File too large") as caught:
                write_weights(tmp_path, made, {}, max_shard_bytes=2048)
            assert "model-00001-of-00002.safetensors" in str(caught.value)
    assert len(list(tmp_path.iterdir())) == (3 if limit == 3000 else 0)
