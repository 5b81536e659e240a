"""The gradient through a rollout: against central differences in float64, and what it refuses."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from merge_rl.config.sampler import FIXED_SOLVERS, SamplerConfig
from merge_rl.core.merging.buffers import FlatCheckpoints, FlatLayout
from merge_rl.core.merging.groups import assign_groups
from merge_rl.core.merging.live_model import LiveModel
from merge_rl.core.sampling.sampler import sample_with, signed_levels
from merge_rl.errors import ConfigError, OutOfMemoryError
from merge_rl.features.preparation import ImageFeatures, require_images
from merge_rl.interfaces import Denoiser
from merge_rl.models.autoencoder import PixelEncoder
from merge_rl.models.edm2 import EDM2
from merge_rl.models.sit import SiT
from merge_rl.workflows.rewards import CombinedExtractor
from merge_rl.workflows.rollout import DifferentiableRollout, MergedRollout, Rollout, Room, WorkItem

LABELS = torch.tensor([0, 2, 1, 1, 0])
SEEDS = [5, 0, 12, 7, 1]


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks, which work in float32, do so in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    usual = torch.get_default_dtype()
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setitem(sample_with.__kwdefaults__ or {}, "dtype", torch.float64)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(usual)


class ExactCheckpoints(FlatCheckpoints):
    """Sums in the dtype of the matrix, where the package rounds coefficients to float32."""

    def merge(self, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
        parts = [
            coefficients[piece.group].to(self.matrix) @ torch.stack(list(piece.sources))
            for piece in self.pieces()
        ]
        merged = torch.cat(parts)
        return merged if out is None else out.copy_(merged)


class Smooth:
    """Images that are the samples, not rounded: differences can be taken of them."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    levels = decode


class Waves:
    """Features sin(<w_d, image>), (B, 3)."""

    name, dim = "waves", 3

    def __call__(self, images: Tensor) -> Tensor:
        pixels = images.flatten(1).to(torch.get_default_dtype())
        rows = torch.arange(3.0)[:, None] + 1
        return (pixels @ (torch.arange(pixels.shape[1]) * rows).cos().T / 20).sin()


def network(family: str) -> nn.Module:
    with torch.random.fork_rng():  # networks draw what no checkpoint holds
        torch.manual_seed(0)
        return built(family)


def built(family: str) -> nn.Module:
    if family == "edm2":
        return EDM2(
            img_resolution=4, img_channels=1, label_dim=3, use_fp16=False, model_channels=8,
            channel_mult=[1], num_blocks=1, attn_resolutions=[4], channels_per_head=8,
            logvar_channels=4,
        )  # fmt: skip
    return SiT(input_size=4, in_channels=1, hidden_size=8, depth=2, num_heads=2, num_classes=3)


def merged(
    family: str, sampler: SamplerConfig, *, exact: bool = True, extractor: object = None,
    decoder: object = None, guided: bool = False, batch: int = 250, spoilt: bool = False,
) -> MergedRollout:  # fmt: skip
    """A rollout of three random checkpoints in two groups."""
    generator = torch.Generator().manual_seed(4)
    model = network(family).eval().requires_grad_(False)
    shapes = {n: p.shape for n, p in model.named_parameters() if n != "pos_embed"}
    groups = assign_groups(list(shapes), {"first": "emb|enc|blocks.0"})
    layout = FlatLayout.of(shapes, groups)
    dtype = torch.get_default_dtype()
    matrix = torch.randn(3, layout.size, generator=generator, dtype=torch.float64).to(dtype)
    matrix = matrix * (0.3 if family == "sit" else 1.0)
    fixed = {n: t.clone() for n, t in model.state_dict().items() if n not in layout.names}
    kind = ExactCheckpoints if exact else FlatCheckpoints
    live = LiveModel(model, kind(layout, matrix, fixed))
    guide: Denoiser | None = None
    if guided and family == "edm2":
        other = network(family).eval().requires_grad_(False)
        for parameter in other.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
        guide = other
    rollout = Rollout(
        Broken(model) if spoilt else model, (1, 4, 4), sampler=sampler,
        autoencoder=decoder or Smooth(),  # type: ignore[arg-type]
        extractor=extractor or Waves(),  # type: ignore[arg-type]
        batch=batch, guide=guide,
    )  # fmt: skip
    return MergedRollout(live, rollout)


class Broken(nn.Module):
    """A network with a derivative that is infinite for images of class 2, and finite values."""

    prediction = "denoised"
    label_dim = 3

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        out: Tensor = self.model(x, sigma, labels)
        assert labels is not None
        spoilt = out[labels == 2]
        kept = out.clone()
        kept[labels == 2] = spoilt + (spoilt - spoilt.detach()).abs().sqrt()
        return kept


COEFFICIENTS = torch.tensor([[0.5, 0.2, 0.3], [0.1, 1.2, -0.3]], dtype=torch.float64)


def weighing(features: Tensor) -> Tensor:
    """Cotangents that differ for every feature of every image."""
    return torch.arange(1.0, features.numel() + 1).cos().reshape(features.shape)


def directions(gradient: Tensor, count: int) -> Tensor:
    """Ways up a gradient, (count, *gradient.shape), of length 1.

    By each coordinate a way gains about as much as by any other, and nothing cancels: what is wrong
    with one of them shows along every way.
    """
    size = gradient.abs()
    drawn = torch.rand(count, *gradient.shape, generator=torch.Generator().manual_seed(6)) + 0.5
    ways = drawn * gradient.sign() / size.clamp(min=1e-4 * float(size.max()))
    lengths = ways.flatten(1).norm(dim=1)
    return torch.stack([way / length for way, length in zip(ways, lengths, strict=True)])


def numeric(rollout: MergedRollout, point: Tensor, ways: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of <features of SEEDS and LABELS, cotangents> along each way."""
    noise = rollout.rollout.noise(SEEDS).to(torch.get_default_dtype())
    weights = weighing(torch.empty(len(LABELS), 3))

    def value(moved: Tensor) -> Tensor:
        return (rollout.features(moved, noise, LABELS) * weights).sum()

    found = [(value(point + step * w) - value(point - step * w)) / (2 * step) for w in ways]
    return torch.stack(found)


def along(gradient: Tensor, ways: Tensor) -> Tensor:
    """What a gradient says of each way."""
    return (ways * gradient).flatten(1).sum(1)


def item() -> WorkItem:
    return WorkItem(COEFFICIENTS, SEEDS, LABELS)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("solver", "guidance"), [("heun", 1.0), *((solver, 1.7) for solver in FIXED_SOLVERS)]
)
@pytest.mark.parametrize("family", ["edm2", "sit"])
def test_central_differences(family: str, solver: str, guidance: float) -> None:
    sampler = SamplerConfig(
        solver=solver, num_steps=2, guidance=guidance, guidance_channels=None, sigma_min=0.1,
        sigma_max=3.0,
    )  # fmt: skip
    rollout = merged(family, sampler, guided=guidance != 1)
    rooms = (None, Room(images=2, kept=0))
    both = [DifferentiableRollout(rollout, room=room)(item(), weighing) for room in rooms]
    ways = directions(both[0].gradient, 1)
    expected = numeric(rollout, COEFFICIENTS, ways)
    for made in both:
        assert made.dropped == ()
        torch.testing.assert_close(along(made.gradient, ways), expected, rtol=1e-5, atol=1e-7)
        assert float(made.gradient.norm()) > 1e-3


HEUN = SamplerConfig(num_steps=2, sigma_min=0.1, sigma_max=3.0)


@pytest.mark.parametrize("family", ["edm2", "sit"])
def test_any_number_of_images_at_a_time(family: str) -> None:
    rollout = merged(family, HEUN, exact=False, decoder=PixelEncoder())
    whole = DifferentiableRollout(rollout)(item(), weighing)
    (features,) = rollout.features_of([item()])
    assert torch.equal(whole.features, features)
    for images in (1, 2, 5):
        part = DifferentiableRollout(rollout, room=Room(images, 0))(item(), weighing)
        torch.testing.assert_close(part.features, features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(part.gradient, whole.gradient, rtol=1e-3, atol=1e-5)


def test_nothing_is_left_behind() -> None:
    rollout = merged("edm2", HEUN, exact=False)
    assert rollout.live is not None
    DifferentiableRollout(rollout)(item(), weighing)
    assert all(p.grad is None and not p.requires_grad for p in rollout.live.model.parameters())


def most_alive(steps: int, room: Room) -> int:
    """The most activations of one block that are alive at a time."""
    rollout = merged("sit", SamplerConfig(solver="euler", num_steps=steps), exact=False)
    made, seen, most = DifferentiableRollout(rollout, room=room), list[Any](), 0

    def note(_module: nn.Module, _given: Any, out: Tensor) -> None:
        nonlocal most
        seen.append(weakref.ref(out))
        most = max(most, sum(ref() is not None for ref in seen))

    assert rollout.live is not None
    rollout.live.model.get_submodule("blocks.0").register_forward_hook(note)
    made(item(), weighing)
    assert len(seen) >= steps
    return most


def test_what_is_kept_does_not_grow_with_the_steps() -> None:
    again = Room(images=5, kept=0)
    assert most_alive(4, again) == most_alive(16, again) <= 2
    everything = Room(images=5, kept=10_000)
    assert (most_alive(4, everything), most_alive(16, everything)) == (4, 16)


def test_images_without_a_finite_gradient_are_named_and_left_out() -> None:
    rollout = merged("edm2", HEUN, exact=False, spoilt=True)
    made = DifferentiableRollout(rollout)(item(), weighing)
    assert len(made.dropped) == 1
    assert made.dropped[0].startswith("seed 0: gradient not finite after step ")
    assert made.features.isnan().all(1).tolist() == [False, True, False, False, False]
    others = [0, 2, 3, 4]
    rest = WorkItem(COEFFICIENTS, [SEEDS[i] for i in others], LABELS[others])
    alone = DifferentiableRollout(rollout)(rest, weighing)
    torch.testing.assert_close(made.gradient, alone.gradient)
    assert bool(made.gradient.isfinite().all())


def test_without_a_sound_image_there_is_no_gradient() -> None:
    rollout = merged("edm2", HEUN, exact=False, spoilt=True)
    spoilt = WorkItem(COEFFICIENTS, [3, 4], torch.tensor([2, 2]))
    made = DifferentiableRollout(rollout)(spoilt, weighing)
    assert len(made.dropped) == 2
    assert bool(made.gradient.isnan().all())


class Bytes(Waves):
    """Refuses all but bytes."""

    name = "bytes"

    def __call__(self, images: Tensor) -> Tensor:
        require_images(images.detach(), self.name)
        return super().__call__(images)


class Numpy(Waves):
    """Leaves torch on the way."""

    name = "numpy"

    def __call__(self, images: Tensor) -> Tensor:
        return torch.from_numpy(super().__call__(images.detach()).numpy())


class Scaled(Waves):
    """Takes floats to lie in [0, 1]."""

    name = "scaled"

    def __call__(self, images: Tensor) -> Tensor:
        given = images / 255 if images.dtype == torch.uint8 else images
        return given.flatten(1)[:, :3]


@pytest.mark.parametrize(
    ("extractor", "why"),
    [
        (Bytes(), "extractor 'bytes' has no derivative: it takes bytes alone"),
        (Numpy(), "extractor 'numpy' has no derivative: its features do not depend"),
        (Scaled(), "extractor 'scaled' has no derivative: it reads whole numbers unlike"),
        (CombinedExtractor([Waves(), Numpy()]), "extractor 'numpy' has no derivative"),
    ],
)
def test_an_extractor_without_a_derivative_is_named(extractor: object, why: str) -> None:
    rollout = merged("edm2", HEUN, exact=False, extractor=extractor, decoder=PixelEncoder())
    with pytest.raises(ConfigError, match=why):
        DifferentiableRollout(rollout)


def test_other_parts_without_a_derivative_are_named() -> None:
    class Plain:
        def decode(self, latents: Tensor) -> Tensor:
            return signed_levels(latents).to(torch.uint8)

    with pytest.raises(ConfigError, match="the decoder Plain has no derivative"):
        DifferentiableRollout(merged("edm2", HEUN, exact=False, decoder=Plain()))

    class Unrounded(Plain):
        def levels(self, latents: Tensor) -> Tensor:
            return 127.5 * latents.clip(-1, 1) + 128

    class Others(Plain):
        def levels(self, latents: Tensor) -> Tensor:
            return signed_levels(latents).flip(-1)

    class Detached(Plain):
        def levels(self, latents: Tensor) -> Tensor:
            return signed_levels(latents).detach()

    cases = (
        (Unrounded(), "are no whole numbers"),
        (Others(), "are not its images"),
        (Detached(), "do not depend on a gradient; the searcher auto does without"),
    )
    for decoder, why in cases:
        with pytest.raises(ConfigError, match=f"decoder {type(decoder).__name__} .*`levels` {why}"):
            DifferentiableRollout(merged("edm2", HEUN, exact=False, decoder=decoder))
    noisy = SamplerConfig(solver="sde-euler", num_steps=3)
    with pytest.raises(ConfigError, match=r"needs a solver with fixed steps \(.*\), got sde-euler"):
        DifferentiableRollout(merged("edm2", noisy, exact=False))


def test_out_of_memory_halves_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = merged("edm2", HEUN, exact=False)
    expected = DifferentiableRollout(rollout)(item(), weighing)
    told: list[str] = []
    made = DifferentiableRollout(rollout, announce=told.append)
    latents = made.latents

    def limited(noise: Tensor, *rest: object) -> Tensor:
        if len(noise) > 2:
            raise torch.OutOfMemoryError("no room")
        return latents(noise, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(made, "latents", limited)
    found = made(item(), weighing)
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-3, atol=1e-5)
    assert told == [
        "out of memory with the gradients of 5 images: 3 now",
        "out of memory with the gradients of 3 images: 2 now",
    ]
    monkeypatch.setattr(made, "latents", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(OutOfMemoryError, match="one image at a time"):
        made(item(), weighing)


def test_images_with_a_gradient_pass_the_check_of_bytes() -> None:
    sums = ImageFeatures(nn.Identity(), lambda x: x, name="i", dim=48, chunk=2)
    sums.network = nn.Sequential(nn.Flatten(), nn.Linear(48, 48))
    images = torch.randint(0, 256, (3, 1, 4, 4), generator=torch.Generator().manual_seed(1))
    expected = sums(images.to(torch.uint8))
    found = sums(images.float().requires_grad_(True))
    torch.testing.assert_close(found, expected)
