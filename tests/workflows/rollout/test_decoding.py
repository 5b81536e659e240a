"""Compiled networks and decoders: one shape, plain where they cannot be, for which decoders."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from merge_rl.config.sampler import SamplerConfig
from merge_rl.errors import OutOfMemoryError
from merge_rl.models.autoencoder import LatentDecoder, PixelEncoder
from merge_rl.workflows.rollout.compiled import (
    Compiled,
    WholeChunks,
    prepare_decoder,
    prepare_network,
)

FAST = SamplerConfig(precision="bfloat16", compile=True)


def doubled(rows: Tensor) -> Tensor:
    return 2 * rows


class Compiler:
    """Stands for torch.compile: notes the shapes that compiled code sees; may fail, or err."""

    def __init__(self, error: Exception | None = None, off: float = 0.0) -> None:
        self.error, self.off, self.shapes = error, off, list[tuple[int, ...]]()

    def __call__(self, function: object, *, dynamic: bool | None) -> object:
        def run(rows: Tensor, *rest: object) -> Tensor:
            self.shapes.append(tuple(rows.shape))
            if self.error is not None:
                raise self.error
            assert callable(function)
            made: Tensor = function(rows, *rest)
            return made * (1 + self.off)

        return run


@pytest.mark.parametrize(("count", "calls"), [(8, 2), (9, 3), (4, 1), (5, 2), (3, 0), (0, 0)])
def test_compiled_decoders_see_one_shape(
    count: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, said = Compiler(), list[str]()
    monkeypatch.setattr(torch, "compile", compiler)
    rows = torch.arange(3.0 * count).view(count, 3)
    ways = WholeChunks(Compiled(doubled, "images", said.append), 4)
    assert torch.equal(ways(rows), 2 * rows)
    assert compiler.shapes == [(4, 3)] * calls
    assert not said


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, said = Compiler(RuntimeError("no C compiler\nis here")), list[str]()
    monkeypatch.setattr(torch, "compile", compiler)
    ways, rows = Compiled(doubled, "images", said.append), torch.ones(6, 1)
    for _ in range(3):
        assert torch.equal(ways(rows), 2 * rows)
    assert said == ["images are not compiled (RuntimeError: no C compiler is here)"]
    assert len(compiler.shapes) == 1


@pytest.mark.parametrize(
    ("digits", "off", "kept"),
    [(23, 2**-12, True), (23, 2**-11, False), (7, 2**-4, True), (7, 2**-3, False)],
)
def test_compiled_code_with_other_numbers_is_not_used(
    digits: int, off: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the digits must be right: 2^-11.5 of float32, 2^-3.5 of bfloat16."""
    compiler, said = Compiler(off=off), list[str]()
    monkeypatch.setattr(torch, "compile", compiler)
    ways, rows = Compiled(doubled, "images", said.append, digits=digits), torch.ones(6, 1)
    for _ in range(2):
        assert torch.equal(ways(rows), 2 * rows * (1 + off * kept))
    shown = {2**-11: "0.00049", 2**-3: "0.12"}.get(off)
    assert said == ([] if kept else [f"images are left as they are: compiled they are {shown} off"])


def test_a_network_that_cannot_be_compiled_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    monkeypatch.setattr(torch, "compile", Compiler(RuntimeError("no Triton")))
    network = Flow()
    fast = prepare_network(network, FAST, torch.device("cuda"), said.append)
    assert fast.prediction == "velocity"  # type: ignore[attr-defined]
    x = torch.ones(2, 3)
    for _ in range(2):
        assert torch.equal(fast(x, torch.tensor(0.5)), network(x, torch.tensor(0.5)))
    assert said == ["calls of the network are not compiled (RuntimeError: no Triton)"]


class Flow(torch.nn.Module):
    """v = -x t."""

    prediction = "velocity"

    def forward(self, x: Tensor, t: Tensor, _labels: Tensor | None = None, /) -> Tensor:
        return -x * t


def test_memory_that_runs_out_is_not_the_compilers_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    monkeypatch.setattr(torch, "compile", Compiler(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        Compiled(doubled, "images", said.append)(torch.ones(2, 1))
    assert not said
    assert not isinstance(torch.OutOfMemoryError("x"), OutOfMemoryError)  # halving looks at both


class Vae(torch.nn.Module):
    """Raw latents (B, 4, h, w) to images (B, 3, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 3, 3, padding=1)

    def decode(self, latents: Tensor, /) -> Tensor:
        made: Tensor = self.conv(latents)
        return made


def decoder(dtype: torch.dtype) -> LatentDecoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = Vae()
    return LatentDecoder(vae.requires_grad_(False), scale=(1.0,), dtype=dtype, chunk=2)


def test_which_decoders_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, gpu = Compiler(), torch.device("cuda")
    monkeypatch.setattr(torch, "compile", compiler)
    half, exact = decoder(torch.bfloat16), decoder(torch.float32)
    latents = torch.linspace(-1, 1, 3 * 4 * 9).view(3, 4, 3, 3)
    expected = half.decode(latents)
    slow = dataclasses.replace(FAST, compile=False)
    for settings, device in ((FAST, torch.device("cpu")), (slow, gpu)):
        assert torch.equal(prepare_decoder(half, settings, device)(latents), expected)
    assert torch.equal(prepare_decoder(exact, FAST, gpu)(latents), exact.decode(latents))
    pixels = latents[:, :1]
    plain = PixelEncoder()
    assert torch.equal(prepare_decoder(plain, FAST, gpu)(pixels), plain.decode(pixels))
    assert not compiler.shapes
    found = prepare_decoder(half, FAST, gpu)(latents)
    assert found.dtype == torch.uint8
    assert torch.equal(found, expected)
    assert compiler.shapes == [(2, 4, 3, 3)] * 2
