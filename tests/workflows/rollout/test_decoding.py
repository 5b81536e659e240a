"""Compiled decoding: one shape, plain where it cannot be, for which decoders."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from merge_rl.config.sampler import SamplerConfig
from merge_rl.errors import OutOfMemoryError
from merge_rl.models.autoencoder import LatentDecoder, PixelEncoder
from merge_rl.workflows.rollout.decoding import Compiled, prepare_decoder

FAST = SamplerConfig(precision="bfloat16", compile=True)


def doubled(rows: Tensor) -> Tensor:
    return 2 * rows


class Compiler:
    """Stands for torch.compile: notes the shapes that compiled code sees; may fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.shapes = error, list[tuple[int, ...]]()

    def __call__(self, function: object, *, dynamic: bool) -> object:
        assert not dynamic

        def run(rows: Tensor) -> Tensor:
            self.shapes.append(tuple(rows.shape))
            if self.error is not None:
                raise self.error
            assert callable(function)
            made: Tensor = function(rows)
            return made

        return run


@pytest.mark.parametrize(("count", "calls"), [(8, 2), (9, 3), (4, 1), (5, 2), (3, 0), (0, 0)])
def test_compiled_code_sees_one_shape(
    count: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, said = Compiler(), list[str]()
    monkeypatch.setattr(torch, "compile", compiler)
    rows = torch.arange(3.0 * count).view(count, 3)
    assert torch.equal(Compiled(doubled, 4, said.append)(rows), 2 * rows)
    assert compiler.shapes == [(4, 3)] * calls
    assert not said


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, said = Compiler(RuntimeError("no C compiler\nis here")), list[str]()
    monkeypatch.setattr(torch, "compile", compiler)
    ways, rows = Compiled(doubled, 2, said.append), torch.ones(6, 1)
    for _ in range(3):
        assert torch.equal(ways(rows), 2 * rows)
    assert said == ["decoding is not compiled (RuntimeError: no C compiler is here)"]
    assert len(compiler.shapes) == 1


def test_memory_that_runs_out_is_not_the_compilers_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    monkeypatch.setattr(torch, "compile", Compiler(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        Compiled(doubled, 2, said.append)(torch.ones(2, 1))
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
