"""Reduced precision and compilation: what runs, what changes, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from merge_rl.config.sampler import SamplerConfig
from merge_rl.errors import ConfigError
from merge_rl.models.edm2 import EDM2
from merge_rl.models.sit import SiT
from merge_rl.workflows.rollout.compiled import Autocast, Compiled, prepare_network
from merge_rl.workflows.rollout.execution import exact_products, fast_hint, matmul_precision

CPU = torch.device("cpu")


def sit() -> SiT:
    net = SiT(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return net.eval().requires_grad_(False)


def edm2() -> EDM2:
    with torch.random.fork_rng():  # the network draws its weights from the global generator
        torch.manual_seed(0)
        net = EDM2(
            img_resolution=4, img_channels=4, label_dim=3, model_channels=16, channel_mult=[1],
            num_blocks=1, attn_resolutions=[4], channels_per_head=8,
        )  # fmt: skip
    nn.init.constant_(net.unet.out_gain, 1.0)
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("make", [sit, edm2])
def test_bfloat16_is_close_and_keeps_what_samplers_ask_for(
    make: Callable[[], nn.Module], generator: torch.Generator
) -> None:
    model = make()
    fast = prepare_network(model, SamplerConfig(precision="bfloat16"), CPU)
    for name in ("prediction", "label_dim", "null_label"):
        assert getattr(fast, name, None) == getattr(model, name, None)
    x = torch.randn(2, 4, 4, 4, generator=generator)
    labels, t = torch.tensor([2, 0]), torch.tensor(0.3)
    found, exact = fast(x, t, labels), model(x, t, labels)
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    assert float((found - exact).norm() / exact.norm()) < 0.02  # 8 bits of mantissa
    # The same module underneath: weights that are merged into it count.
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(-1.5)
    assert float((fast(x, t, labels) - found).norm() / exact.norm()) > 0.1


def test_nothing_asked_nothing_changed() -> None:
    model = sit()
    assert prepare_network(model, SamplerConfig(), CPU) is model
    assert prepare_network(model, SamplerConfig(precision="tf32"), CPU) is model


def test_compilation_is_for_accelerators() -> None:
    settings = SamplerConfig(compile=True, precision="bfloat16")
    with pytest.raises(
        ConfigError, match="sampler.compile is for accelerators, got the device cpu"
    ):
        prepare_network(sit(), settings, CPU)
    model, half = sit(), edm2()
    fast = prepare_network(model, settings, torch.device("cuda"))
    assert isinstance(fast, Autocast)
    assert isinstance(fast.forward, Compiled)
    assert fast.forward.function is model
    # A network with a half precision of its own keeps it.
    kept = prepare_network(half, settings, torch.device("cuda"))
    assert isinstance(kept, Compiled)
    assert kept.function is half


@pytest.mark.parametrize("make", [sit, edm2])
def test_a_compiled_network_is_one_graph(
    make: Callable[[], nn.Module], generator: torch.Generator
) -> None:
    """Traced only: what a compiler makes of the graph is not looked at here."""
    model = make()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    labels, t = torch.tensor([2, 0, 1]), torch.tensor(0.3)
    x = torch.randn(3, 4, 4, 4, generator=generator)
    with torch.no_grad():
        for count in (3, 2):  # traced once, for any number of rows
            rows, classes = x[:count], labels[:count]
            for varied in (rows, classes):
                torch._dynamo.mark_dynamic(varied, 0)
            torch.testing.assert_close(compiled(rows, t, classes), model(rows, t, classes))
        for weight in model.parameters():
            weight.mul_(-1.5)
        torch.testing.assert_close(compiled(rows, t, classes), model(rows, t, classes))
    torch._dynamo.reset()


def test_the_faster_way_is_told_where_there_is_one() -> None:
    assert "--fast" in fast_hint(SamplerConfig(), "cuda:1")[0]
    assert fast_hint(SamplerConfig(), "cpu") == []
    for settings in (SamplerConfig(precision="tf32"), SamplerConfig(compile=True)):
        assert fast_hint(settings, "cuda") == []


def precision_now() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def test_tf32_is_on_for_the_rollout_alone() -> None:
    before = precision_now()
    assert before[1]  # torch's own choice for convolutions on a GPU; no other test left it changed
    with matmul_precision(SamplerConfig(precision="tf32")):
        assert precision_now() == ("high", True)
        with exact_products():
            assert precision_now() == ("highest", False)
        assert precision_now() == ("high", True)
    assert precision_now() == before
    with matmul_precision(SamplerConfig()):
        assert precision_now() == ("highest", False)
    assert precision_now() == before
    with pytest.raises(KeyError), matmul_precision(SamplerConfig(precision="tf32")):
        raise KeyError
    assert precision_now() == before


def test_those_who_sample_side_by_side_leave_no_precision_behind() -> None:
    before = precision_now()
    tf32, exact = matmul_precision(SamplerConfig(precision="tf32")), exact_products()
    tf32.__enter__()
    exact.__enter__()
    tf32.__exit__(None, None, None)  # the first to come leaves first
    assert precision_now() == ("highest", False)  # the other is not finished
    exact.__exit__(None, None, None)
    assert precision_now() == before
    tf32, exact = matmul_precision(SamplerConfig(precision="tf32")), exact_products()
    tf32.__enter__()
    exact.__enter__()
    exact.__exit__(None, None, None)
    assert precision_now() == ("high", True)
    tf32.__exit__(None, None, None)
    assert precision_now() == before


def test_inputs_are_left_alone(generator: torch.Generator) -> None:
    x = torch.randn(1, 4, 4, 4, generator=generator)
    kept: Tensor = x.clone()
    prepare_network(sit(), SamplerConfig(precision="bfloat16"), CPU)(x, torch.tensor(0.5))
    assert torch.equal(x, kept)
