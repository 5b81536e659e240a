"""How processes share fine-tuning: which rollouts, what memory, whose folder, when to stop."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from merge_rl.config.finetune import UpdateConfig
from merge_rl.errors import ConfigError, ParallelError, RunError, UnknownNameError
from merge_rl.interfaces import NullTracker
from merge_rl.parallel.group import Group
from merge_rl.parallel.rendezvous import Place
from merge_rl.storage.runs.lifecycle import StopSignals, begin_finetune
from merge_rl.workflows.finetune import run as finetune
from merge_rl.workflows.finetune.job import training_bytes
from merge_rl.workflows.finetune.learner import Learner
from merge_rl.workflows.finetune.rollouts import KeptRollouts, ProcessShare, read_kept, write_kept
from merge_rl.workflows.finetune.updates import UpdateStats
from merge_rl.workflows.rollout.distributed import require_same_everywhere
from tests.finetuning import small_config
from tests.ranks import on_ranks


def kept_of(count: int) -> KeptRollouts:
    rows = torch.arange(count)
    noise = torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    return KeptRollouts(noise, rows % 3, rows.double() / 7, rows, 5)


@pytest.mark.parametrize(("size", "count"), [(1, 7), (2, 7), (3, 7), (4, 3), (5, 1)])
def test_shares_are_all_rollouts_once_in_equally_many_passes(size: int, count: int) -> None:
    kept, limit = kept_of(count), 2
    shares = [ProcessShare(rank, size).parts(kept, limit) for rank in range(size)]
    assert len({len(parts) for parts in shares}) == 1
    weighed = [(part, weight) for parts in shares for part, weight in parts if weight]
    assert torch.cat([part.rows for part, _ in weighed]).tolist() == list(range(count))
    assert all(weight == size * len(part) for part, weight in weighed)
    assert all(0 < len(part) <= limit for parts in shares for part, _ in parts)


def test_a_process_alone_has_the_micro_batches_of_all() -> None:
    kept = kept_of(5)
    found = [(part.rows.tolist(), weight) for part, weight in ProcessShare().parts(kept, 2)]
    assert found == [([0, 1], 2), ([2, 3], 2), ([4], 1)]


def test_kept_rollouts_survive_being_told() -> None:
    kept = kept_of(4)
    told = read_kept(write_kept(kept), kept.noise)
    for name in ("noise", "labels", "advantages", "rows"):
        found, expected = getattr(told, name), getattr(kept, name)
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype
    assert told.step == 5


def test_means_over_processes_weigh_by_images() -> None:
    # 3 images of loss 1 and one of loss 5: (3 + 5) / 4.
    one, other, none = UpdateStats(), UpdateStats(), UpdateStats()
    one.add(3, loss=1.0)
    other.add(1, loss=5.0)
    none.add(0, loss=9.0)
    told = [{"sums": part.sums, "count": part.count} for part in (one, other, none)]
    assert UpdateStats.together(told).means() == {"loss": 2.0}


def test_bytes_of_one_of_many_processes(tmp_path: Path) -> None:
    config, n = small_config(tmp_path), 1000
    # Network, gradients, two moments, average; and the buckets that gradients travel in.
    assert training_bytes(config, n) == 4 * 5 * n
    assert training_bytes(config, n, 4) == 4 * 6 * n
    # The network that samples; of weights, gradients, moments and average a quarter.
    sharded = small_config(tmp_path, parallel="fsdp")
    assert training_bytes(sharded, n, 4) == 4 * (n + 5 * n // 4)
    assert training_bytes(sharded, n) == 4 * 5 * n
    anchored = small_config(tmp_path, parallel="fsdp", update={"kl_weight": 0.1})
    assert training_bytes(anchored, n, 4) == 4 * (2 * n + 5 * n // 4)


def test_a_restarted_launch_goes_on_in_its_folder(tmp_path: Path) -> None:
    config, inputs = small_config(tmp_path / "model"), {"hashes": {"model": "a"}}
    out = tmp_path / "run"
    begun = begin_finetune(out, config, inputs, Place(job="j"))
    assert begin_finetune(out, config, inputs, Place(job="j")).path == begun.path
    assert begin_finetune(out, config, inputs, Place(restarts=1)).path == begun.path
    for place in (Place(), Place(job="other")):
        with pytest.raises(RunError, match="exists already"):
            begin_finetune(out, config, inputs, place)
    other = small_config(tmp_path / "model", seed=9)
    with pytest.raises(RunError, match="settings differ: seed"):
        begin_finetune(out, other, inputs, Place(job="j"))
    with pytest.raises(RunError, match="inputs have changed since it began: model"):
        begin_finetune(out, config, {"hashes": {"model": "b"}}, Place(job="j"))


def test_other_settings_on_some_rank_are_refused(tmp_path: Path) -> None:
    from merge_rl.config.mapping import to_mapping

    def agree(group: Group) -> None:
        changes = {"update": {"clip": 0.1 + group.rank}}
        config = small_config(tmp_path / str(group.rank), **changes)  # paths may differ
        require_same_everywhere(group, to_mapping(config), {}, "cpu")

    for found in on_ranks(2, agree):
        assert isinstance(found, ParallelError)
        assert "settings update clip: rank 0 has 0.1, rank 1 has 1.1" in str(found)


def test_a_rank_that_was_told_to_stop_tells_rank_0() -> None:
    def stop(group: Group) -> bool:
        before = group.asked_to_stop
        group.barrier("before")
        if not group.leads:
            group.ask_to_stop()
        group.barrier("after")
        return group.asked_to_stop and not before

    assert on_ranks(2, stop) == [True, True]


def test_signals_wait_for_the_outermost_block() -> None:
    signals, reached = StopSignals(), []

    def terminated() -> None:
        with signals.held():
            with signals.held():
                os.kill(os.getpid(), signal.SIGTERM)
            reached.append(signals.pending)

    with signals, pytest.raises(KeyboardInterrupt):
        terminated()
    assert reached == [True]
    with signals, signals.noted():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.pending


class Opaque(nn.Module):
    """A wrapper that does not say what its network predicts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *arguments: Tensor) -> Tensor:
        made: Tensor = self.network(*arguments)
        return made


def test_a_wrapper_that_hides_the_prediction_is_refused() -> None:
    network = nn.Linear(1, 1)
    network.prediction = "velocity"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="'velocity', got 'denoised'"):
        Learner(network, UpdateConfig(), Opaque)


def test_several_processes_wrap_by_themselves(tmp_path: Path) -> None:
    group = Group(Place(size=2))
    with pytest.raises(ConfigError, match="expected no wrap="):
        finetune._gather(group, small_config(tmp_path), Opaque, NullTracker())


def test_an_unknown_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown parallel 'fdsp'; did you mean 'fsdp'"):
        small_config(tmp_path, parallel="fdsp")
