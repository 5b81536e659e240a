"""Devices that are not there are told in one sentence, and so is a GPU that nobody asked for."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_rl.errors import ConfigError
from merge_rl.workflows.rollout.device import keep_freed_memory, require_device, unused_gpu


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")


def test_what_is_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require_device("cpu") == torch.device("cpu")
    with_gpus(monkeypatch, 2)
    for name in ("cuda", "cuda:0", "cuda:1"):
        assert require_device(name) == torch.device(name)


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(ConfigError, match="--device cuda: PyTorch .* is built without GPUs"):
        require_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigError, match="cuda:1: found no GPU, or no driver that PyTorch"):
        require_device("cuda:1")
    with_gpus(monkeypatch, 1)
    with pytest.raises(ConfigError, match="--device cuda:1: found cuda:0 here"):
        require_device("cuda:1")
    with_gpus(monkeypatch, 4)
    with pytest.raises(ConfigError, match="--device cuda:7: found cuda:0 to cuda:3 here"):
        require_device("cuda:7")


@pytest.mark.parametrize("name", ["gpu", "", "meta", "cpu:x", "xpu"])
def test_what_is_no_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="expected --device cpu.*, which this PyTorch finds"):
        require_device(name)
    with_gpus(monkeypatch, 1)
    with pytest.raises(ConfigError, match=f"expected --device cpu or cuda.*, got {name!r}"):
        require_device(name)


def test_an_unused_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    assert unused_gpu("cpu") is None
    with_gpus(monkeypatch, 1)
    assert unused_gpu("cpu") == "works on the CPU; --device cuda takes this machine's Some GPU"
    assert unused_gpu("cuda:0") is None
    assert unused_gpu("nonsense") is None  # which the command refuses


def test_commands_refuse_before_anything_is_written(
    mergerl: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    model, out = tiny / "raw/tiny-0000100.safetensors", tmp_path / "out"
    for command in (
        ("optimize", tiny, "--track", "raw", "--out", out),
        ("optimize", tiny, "--track", "raw", "--out", out, "--batch", "auto"),
        ("plan", tiny, "--track", "raw"),
        ("compare", tiny, "--track", "raw", "--out", out),
        ("finetune", model, "--out", out),
        ("evaluate", model),
        ("sample", model, "--out", out.with_suffix(".png")),
        ("reference", tiny, "--out", out, "--extractor", "digits", "--extractor-weights",
         tiny / "evaluation/extractor.safetensors"),
    ):  # fmt: skip
        ended = mergerl(*command, "--device", "gpu")
        assert ended.code == 1, command
        assert ended.err.startswith("error: expected --device cpu"), (command, ended.err)
        assert not out.exists(), command
        assert not out.with_suffix(".png").exists()


def test_the_note_is_said_once(
    mergerl: Callable[..., Any], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, 1)
    ended = mergerl("evaluate", tiny / "raw/tiny-0000100.safetensors", "--num-images", 20, "--json")
    assert ended.code == 0, ended.err
    assert ended.err.count("--device cuda takes this machine's Some GPU") == 1


def test_freed_memory_is_kept() -> None:
    """Tensors of 4 MiB, 1,024 pages each, are made of pages that are there already."""
    require_device("cpu")
    if not keep_freed_memory():
        pytest.skip("another allocator")

    def faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def some() -> int:
        before = faults()
        for _ in range(8):
            torch.ones(2**20)
        return faults() - before

    some()  # the heap grows
    assert some() < 1024


@pytest.mark.parametrize(
    ("name", "value"), [("LD_PRELOAD", "libjemalloc.so"), ("MALLOC_TRIM_THRESHOLD_", "131072")]
)
def test_an_allocator_of_the_users_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert keep_freed_memory.__wrapped__() is False
