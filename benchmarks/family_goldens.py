"""Golden data of DiT, REPA and JiT, computed by the official code on tiny random weights.

    python -m benchmarks.family_goldens --dit CLONE --repa CLONE --jit CLONE --out tests/golden

CLONE is a checkout of facebookresearch/DiT, of sihyun-yu/REPA, of LTH14/JiT (needs einops). Each is
imported, given random weights and asked for outputs and samples; nothing of it is kept. The three
layers that DiT and REPA take from timm are written out below, so that timm, which needs
torchvision, need not be there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

BATCH = 3
TRANSFORMER = {
    "input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "depth": 2,
    "num_heads": 3, "mlp_ratio": 2.0,
}  # fmt: skip
JIT = {
    "input_size": 16, "patch_size": 4, "in_channels": 3, "hidden_size": 32, "depth": 3,
    "num_heads": 2, "num_classes": 5, "bottleneck_dim": 8, "in_context_len": 3,
    "in_context_start": 1,
}  # fmt: skip


class PatchEmbed(nn.Module):
    """The part of timm's patch embedding that the networks use."""

    def __init__(self, size: int, patch: int, channels: int, width: int, bias: bool = True) -> None:
        super().__init__()
        self.patch_size, self.num_patches = (patch, patch), (size // patch) ** 2
        self.proj = nn.Conv2d(channels, width, patch, stride=patch, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images to tokens."""
        out: Tensor = self.proj(x)
        return out.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """The part of timm's attention that the networks use."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, **_others: Any) -> None:
        super().__init__()
        self.heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        count, tokens, width = x.shape
        parts = self.qkv(x).view(count, tokens, 3, self.heads, width // self.heads)
        q, k, v = (parts[:, :, i].transpose(1, 2) for i in range(3))
        weights = (q @ k.transpose(2, 3) / (width // self.heads) ** 0.5).softmax(-1)
        out: Tensor = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """timm's two linear maps with an activation between."""

    def __init__(
        self, in_features: int, hidden_features: int, act_layer: Callable[[], nn.Module],
        **_others: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


@contextmanager
def imported(clone: Path, *names: str) -> Iterator[list[Any]]:
    """Modules of a clone, imported from there and forgotten afterwards."""
    stand_in = types.ModuleType("timm.models.vision_transformer")
    for layer in (PatchEmbed, Attention, Mlp):
        setattr(stand_in, layer.__name__, layer)
    before = set(sys.modules)
    sys.modules["timm.models.vision_transformer"] = stand_in
    sys.path.insert(0, str(clone))
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(clone))
        for name in set(sys.modules) - before:
            del sys.modules[name]


def randomise(model: nn.Module, seed: int) -> None:
    """Every weight random, so that each path matters; sizes that keep samples of order 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name != "pos_embed":
            weight.data = 0.15 * torch.randn(weight.shape, generator=generator)


def inputs(channels: int, size: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise and labels of a batch."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(BATCH, channels, size, size, generator=generator)
    return noise, torch.randint(classes, (BATCH,), generator=generator)


def write(file: Path, config: dict[str, Any], model: nn.Module, values: dict[str, Tensor]) -> None:
    """Weights as "weights.*", inputs and outputs under their names, the config as metadata."""
    weights = {f"weights.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors = {name: t.detach().clone().contiguous() for name, t in {**weights, **values}.items()}
    save_file(tensors, file, {"config": json.dumps(config)})
    print(f"{file}: {sum(t.numel() for t in tensors.values()):,} numbers")


@torch.no_grad()
def dit(clone: Path, out: Path) -> None:
    """Noise at three steps; DDIM without noise in 10 steps, with guidance 1.5 and without."""
    config = {**TRANSFORMER, "class_dropout_prob": 0.1, "num_classes": 5, "learn_sigma": True}
    with imported(clone, "models", "diffusion") as (models, diffusion):
        model = models.DiT(**config).eval()
        randomise(model, 1)
        noise, labels = inputs(4, 8, 5, 2)
        steps = torch.tensor([0, 500, 999])
        values = {"x": noise, "t": steps, "y": labels, "noise": model(noise, steps, labels)[:, :4]}
        process = diffusion.create_diffusion("10")
        values["ddim10"] = process.ddim_sample_loop(
            model, noise.shape, noise, clip_denoised=False, model_kwargs={"y": labels},
            device="cpu", eta=0.0,
        )  # fmt: skip
        both = torch.cat([labels, torch.full_like(labels, 5)])
        values["ddim10_cfg1p5"] = process.ddim_sample_loop(
            model.forward_with_cfg, (2 * BATCH, *noise.shape[1:]), torch.cat([noise, noise]),
            clip_denoised=False, model_kwargs={"y": both, "cfg_scale": 1.5}, device="cpu", eta=0.0,
        )[:BATCH]  # fmt: skip
        write(out / "dit.safetensors", {"model": "dit", **config}, model, values)


@torch.no_grad()
def repa(clone: Path, out: Path) -> None:
    """Velocity at three times; Euler's ODE in 6 steps, its SDE in 5, with guidance and without."""
    config = {**TRANSFORMER, "class_dropout_prob": 0.1, "num_classes": 1000}
    with imported(clone, "models.sit", "samplers") as (models, samplers):
        model = models.SiT(
            path_type="linear", decoder_hidden_size=24, encoder_depth=1, z_dims=[7],
            projector_dim=5, qk_norm=False, **config,
        ).eval()  # fmt: skip
        randomise(model, 3)
        noise, labels = inputs(4, 8, 1000, 4)
        times = torch.tensor([0.0, 0.4, 1.0])
        values = {"x": noise, "t": times, "y": labels, "v": model(noise, times, labels)[0]}
        for name, scale in (("", 1.0), ("_cfg1p5", 1.5)):
            ask = {"model": model, "latents": noise, "y": labels, "cfg_scale": scale}
            values[f"euler6{name}"] = samplers.euler_sampler(**ask, num_steps=6)
            torch.manual_seed(5)
            values[f"sde5{name}"] = samplers.euler_maruyama_sampler(**ask, num_steps=5)
        torch.manual_seed(5)  # what the SDE drew: one each for all steps but the last
        values["draws"] = torch.stack([torch.randn_like(noise.double()) for _ in range(4)])
        write(
            out / "repa.safetensors",
            {"model": "repa", **config, "learn_sigma": False},
            model,
            values,
        )


@torch.no_grad()
def jit(clone: Path, out: Path) -> None:
    """Data at three times; Heun's and Euler's samples in 4 steps, with guidance 2 and without."""
    torch.compile = lambda function: function  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self: self  # type: ignore[method-assign, assignment, misc]
    with imported(clone, "model_jit", "denoiser") as (models, denoisers):
        options = {name: value for name, value in JIT.items() if name != "num_classes"}
        del options["input_size"], options["in_channels"]
        models.JiT_models["tiny"] = partial(models.JiT, **options)
        args = types.SimpleNamespace(
            model="tiny", img_size=16, class_num=5, attn_dropout=0, proj_dropout=0,
            label_drop_prob=0.1, P_mean=0, P_std=1, t_eps=0.05, noise_scale=1.5, ema_decay1=0,
            ema_decay2=0, sampling_method="heun", num_sampling_steps=4, cfg=1.0, interval_min=0.0,
            interval_max=1.0,
        )  # fmt: skip
        made = denoisers.Denoiser(args).eval()
        randomise(made.net, 6)
        noise, labels = inputs(3, 16, 5, 7)
        times = torch.tensor([0.0, 0.4, 0.99])
        values = {"x": noise, "t": times, "y": labels, "data": made.net(noise, times, labels)}
        for method in ("heun", "euler"):
            for name, scale in (("", 1.0), ("_cfg2", 2.0)):
                made.method, made.cfg_scale = method, scale
                torch.manual_seed(8)
                values[f"{method}4{name}"] = made.generate(labels)
        torch.manual_seed(8)
        values["start"] = torch.randn(BATCH, 3, 16, 16)
        write(
            out / "jit.safetensors", {"model": "jit", **JIT, "noise_scale": 1.5}, made.net, values
        )


def main() -> None:
    """Write the files of every clone that is given."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    makers = {"dit": dit, "repa": repa, "jit": jit}
    for name in makers:
        parser.add_argument(f"--{name}", type=Path)
    given = parser.parse_args()
    for name, make in makers.items():
        if (clone := getattr(given, name)) is not None:
            (given.out / name).mkdir(parents=True, exist_ok=True)
            make(clone, given.out / name)


if __name__ == "__main__":
    main()
