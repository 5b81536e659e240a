"""Networks as graphs: when one is recorded, what it sees, and what its gradients are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from merge_rl.config.sampler import SamplerConfig
from merge_rl.core.network import Network
from merge_rl.models.edm2 import EDM2
from merge_rl.models.sit import SiT
from merge_rl.workflows.rollout import graphs
from merge_rl.workflows.rollout.graphs import CapturedNetwork, Recorder, as_graphs
from tests.workflows.rollout.test_fast import edm2, sit


class Replayed:
    """What a recording does: the function again, into the tensors that it made at first."""

    def __init__(self, function: Callable[..., Tensor], given: Sequence[Tensor | None]):
        self.function = function
        self.given = [None if x is None else x.clone() for x in given]
        self.made = function(*self.given)

    def __call__(self, *given: Tensor | None) -> Tensor:
        for held, value in zip(self.given, given, strict=True):
            if held is not None and value is not None:
                held.copy_(value)
        return self.made.copy_(self.function(*self.given)).clone()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Replayed]:
    """Every recording that was made; a call is recorded at the third time."""
    made: list[Replayed] = []

    def record(function: Callable[..., Tensor], given: Sequence[Tensor | None]) -> Replayed:
        made.append(Replayed(function, given))
        return made[-1]

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "CALLS_BEFORE", 2)
    return made


def silent(_text: str) -> None:
    raise AssertionError("nothing is announced")


def inputs(count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 3
    return torch.randn(count, 4, 4, 4, generator=generator), torch.tensor(0.3), labels


def test_shapes_are_recorded_when_they_come_again(recorded: list[Replayed]) -> None:
    recorder = Recorder(lambda x, _y: x + 1, silent)
    for _ in range(2):
        recorder(torch.zeros(2), None)
    recorder(torch.zeros(3), None)
    assert recorded == []
    recorder(torch.zeros(2), None)
    assert len(recorded) == 1
    found = recorder(torch.full((2,), 4.0), None)
    assert found.tolist() == [5, 5]
    assert recorder(torch.zeros(2), None).tolist() == [1, 1]
    assert found.tolist() == [5, 5]  # not overwritten by the next run
    assert len(recorded) == 1
    recorder.forget()
    recorder(torch.zeros(2), None)
    assert len(recorded) == 2


def test_no_more_graphs_than_a_few(recorded: list[Replayed]) -> None:
    recorder = Recorder(lambda x: x, silent)
    for size in range(graphs.MOST + 3):
        for _ in range(4):
            recorder(torch.zeros(size))
    assert len(recorded) == graphs.MOST


def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_given: object) -> None:
        raise RuntimeError("operation not permitted\n when stream is capturing")

    monkeypatch.setattr(graphs, "record", refuse)
    monkeypatch.setattr(graphs, "CALLS_BEFORE", 0)
    told: list[str] = []
    recorder = Recorder(lambda x: 2 * x, told.append)
    for size in (2, 2, 3):
        found = recorder(torch.ones(size))
        assert found.tolist() == [2] * size
    assert told == [
        "no CUDA graph of this network (operation not permitted when stream is capturing): "
        "it runs call by call"
    ]


def test_graphs_without_room_give_theirs_back(
    recorded: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs, "CALLS_BEFORE", 0)
    told: list[str] = []
    recorder = Recorder(lambda x: x, told.append)
    recorder(torch.ones(3))
    assert len(recorded) == 1
    monkeypatch.setattr(graphs, "record", refuse)
    assert recorder(torch.ones(2)).tolist() == [1, 1]
    assert recorder(torch.ones(3)).tolist() == [1, 1, 1]
    assert recorder._recordings == {}
    assert told == [
        "no CUDA graph of this network (CUDA out of memory): it runs call by call",
    ]


@pytest.mark.parametrize("make", [sit, edm2])
def test_graphs_see_the_weights_of_the_moment(
    make: Callable[[], Network], recorded: list[Replayed]
) -> None:
    model = make()
    network = CapturedNetwork(model, model, silent)
    assert network.prediction == model.prediction
    x, t, labels = inputs()
    for factor in (1.0, -1.5, 0.5):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(factor)
        network.renew()
        with torch.no_grad():
            for _ in range(3):
                found = network(x, t, labels)
            assert torch.equal(found, model(x, t, labels))
    assert len(recorded) == 1
    # Weights elsewhere: what was recorded reads the old ones.
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(weight * 2, requires_grad=False))
    network.renew()
    with torch.no_grad():
        assert torch.equal(network(x, t, labels), model(x, t, labels))
    assert len(recorded) == 2


def test_kept_weights_stay_where_they_are() -> None:
    model = edm2()
    assert model.kept() == []
    x, t, labels = inputs()
    with torch.no_grad():
        model(x, t, labels)
        before = [(weight.data_ptr(), weight.clone()) for weight in model.kept()]
        for weight in model.parameters():
            weight.add_(torch.ones_like(weight).cumsum(0) if weight.ndim else 1)
        after = model.kept()
    assert [address for address, _ in before] == [weight.data_ptr() for weight in after]
    changed = [not torch.equal(old, new) for (_, old), new in zip(before, after, strict=True)]
    assert any(changed)
    fresh = edm2()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x, t, labels), fresh(x, t, labels))


def test_gradients_go_through_the_network_itself(recorded: list[Replayed]) -> None:
    model = sit()
    network = CapturedNetwork(model, model, silent)
    x, t, labels = inputs()
    with torch.enable_grad():
        for _ in range(4):
            start = x.clone().requires_grad_(True)
            network(start, t, labels).sum().backward()  # type: ignore[no-untyped-call]
    assert start.grad is not None
    assert recorded == []


def test_where_graphs_are_made() -> None:
    model, rest = sit(), (SamplerConfig(), torch.device("cuda"), silent)
    assert as_graphs(model, SamplerConfig(), torch.device("cpu"), silent) is model
    assert isinstance(as_graphs(model, *rest), CapturedNetwork)
    weights = sum(weight.numel() for weight in model.parameters())
    assert isinstance(as_graphs(model, *rest, below=weights + 1), CapturedNetwork)
    assert as_graphs(model, *rest, below=weights) is model
    own = nn.Linear(2, 2)
    assert as_graphs(own, *rest) is own
    assert SiT.capturable
    assert EDM2.capturable
