"""Networks in training: gradients, EDM2's weight normalization, low-rank adapters."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from merge_rl.errors import ConfigError
from merge_rl.models.edm2 import EDM2
from merge_rl.models.edm2_layers import NormalizedWeight
from merge_rl.models.lora import add_adapters, plain_state_dict
from merge_rl.models.sit import SiT

X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 2, 1])
AT = torch.tensor(0.6)


def sit() -> SiT:
    built = SiT(
        input_size=8, patch_size=4, in_channels=1, hidden_size=8, depth=2, num_heads=2,
        num_classes=3, learn_sigma=False,
    )  # fmt: skip
    _draw(built)
    return built.eval()


def edm2() -> EDM2:
    built = EDM2(
        img_resolution=8, img_channels=1, label_dim=3, model_channels=8, channel_mult=[1, 2],
        num_blocks=1, attn_resolutions=[4], channels_per_head=8, logvar_channels=8,
    )  # fmt: skip
    _draw(built)
    return built.eval()


def _draw(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.4 * drawn if parameter.ndim else 0.7 + 0 * drawn)


@pytest.mark.parametrize("make", [sit, edm2])
def test_gradients_are_those_of_differences(make: Callable[[], nn.Module]) -> None:
    # EDM2 works in place in places; autograd must see through all of them.
    network = make().requires_grad_(True)
    weighing = torch.randn(X.shape, generator=torch.Generator().manual_seed(2))

    def value() -> Tensor:
        made: Tensor = network(X, AT, LABELS)
        return (made * weighing).double().sum()

    value().backward()  # type: ignore[no-untyped-call]
    moved = [(p, p.grad / p.grad.norm()) for p in network.parameters() if p.grad is not None]
    # Along a gradient of unit length the slope is its norm.
    slope = sum(float(p.grad.norm()) for p, _ in moved if p.grad is not None)
    step, ends = 2e-3, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in moved:
                p.add_(d, alpha=sign * step)
            ends.append(float(value()))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=0.02)


def test_normalized_weights_compute_the_same() -> None:
    network = edm2()
    layers = [m for m in network.modules() if isinstance(m, NormalizedWeight)]
    sizes = [m.weight.detach().flatten(1).square().mean(1).sqrt() for m in layers]
    with torch.no_grad():
        before = network(X, AT, LABELS)
        network.normalize_weights()
        after = network(X, AT, LABELS)
    assert (after - before).norm() / before.norm() < 2e-3  # the 1e-4 of every layer adds up
    for module, size in zip(layers, sizes, strict=True):
        rms = module.weight.detach().flatten(1).square().mean(1).sqrt()
        torch.testing.assert_close(rms, size / (size + 1e-4))


def test_gradients_lie_across_the_weights() -> None:
    # The size of a row does not count, so no gradient points along it, but for what the 1e-4 in
    # its norm leaves: that share of a part which is at most a few times what lies across there.
    network = edm2().requires_grad_(True)
    network.normalize_weights()
    network(X, AT, LABELS).square().sum().backward()
    for module in network.unet.modules():
        if isinstance(module, NormalizedWeight):
            weight, gradient = module.weight.detach().flatten(1), module.weight.grad
            assert gradient is not None
            flat = gradient.flatten(1)
            along = (weight * flat).sum(1) / weight.norm(dim=1)
            assert float(along.abs().max()) < 5e-4 * float(flat.norm())


def test_adapters_begin_with_the_network_and_join_it() -> None:
    network, plain = sit(), sit()
    original = {name: t.clone() for name, t in plain.state_dict().items()}
    generator = torch.Generator().manual_seed(4)
    add_adapters(network, rank=2, alpha=6.0, targets=("qkv", "fc2"), generator=generator)
    torch.testing.assert_close(network(X, AT, LABELS), plain(X, AT, LABELS))
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2  # A and B of two layers in two blocks
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    joined = plain_state_dict(network)
    assert list(joined) == list(original)
    changed = {name for name, tensor in joined.items() if not torch.equal(tensor, original[name])}
    assert changed == {f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("attn.qkv", "mlp.fc2")}
    b, a = (
        network.get_parameter(f"blocks.1.mlp.fc2.lora_{which}.default.weight") for which in "BA"
    )
    expected = original["blocks.1.mlp.fc2.weight"] + 3 * b @ a  # alpha / rank = 3
    torch.testing.assert_close(joined["blocks.1.mlp.fc2.weight"], expected)
    plain.load_state_dict(joined)
    torch.testing.assert_close(plain(X, AT, LABELS), network(X, AT, LABELS), rtol=1e-4, atol=1e-4)


def test_adapters_are_a_function_of_their_generator() -> None:
    drawn = []
    for _ in range(2):
        network = sit()
        torch.rand(3)  # whatever the global generator went through
        generator = torch.Generator().manual_seed(9)
        add_adapters(network, rank=1, alpha=1.0, targets=("proj",), generator=generator)
        drawn.append(network.get_parameter("blocks.0.attn.proj.lora_A.default.weight"))
    assert torch.equal(drawn[0], drawn[1])


def test_adapters_need_linear_layers() -> None:
    with pytest.raises(ConfigError, match=r"expected linear layers called qkv .* in EDM2"):
        add_adapters(edm2(), rank=1, alpha=1.0, targets=("qkv",), generator=torch.Generator())
    with pytest.raises(ConfigError, match=r"found \d+ linear layers, none of them called so"):
        add_adapters(sit(), rank=1, alpha=1.0, targets=("q",), generator=torch.Generator())


def test_adapters_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'merge_rl\[lora\]'"):
        add_adapters(sit(), rank=1, alpha=1.0, targets=("qkv",), generator=torch.Generator())
