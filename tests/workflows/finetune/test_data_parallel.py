"""Gradients over two processes equal those of one, on the embedded network of the digits."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from merge_rl.config.finetune import PAPER_REWARD, FinetuneConfig, RolloutConfig, UpdateConfig
from merge_rl.demo import write_demo
from merge_rl.errors import ConfigError
from merge_rl.parallel import joined
from merge_rl.parallel.group import Group
from merge_rl.storage.runs.lifecycle import StopSignals
from merge_rl.workflows.assembly.defaults import load_model
from merge_rl.workflows.assembly.resolve import resolve_finetune
from merge_rl.workflows.finetune.job import build_finetune
from merge_rl.workflows.finetune.learner import Learner, trainable
from merge_rl.workflows.finetune.rollouts import KeptRollouts
from merge_rl.workflows.finetune.step import StepParts
from tests.children import Child, launch_ranks
from tests.gradients import (
    BATCH,
    Terms,
    block_by_block,
    gradients,
    loss_of,
    sharding,
    whole_gradients,
)
from tests.quick import Late

pytestmark = pytest.mark.numerics

sharing = Late("merge_rl.workflows.finetune.distributed")
shards = Late("merge_rl.workflows.finetune.sharded")
EPS, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


class Found(NamedTuple):
    """Gradients of a fine-tuning step's update, what it saw, what it summed."""

    gradients: dict[str, Tensor]
    seen: dict[str, float]
    terms: Terms

    @property
    def norm(self) -> float:
        """Of all gradients, in float64."""
        squares = [grad.double().square().sum() for grad in self.gradients.values()]
        return float(torch.stack(squares).sum().sqrt())


def update_of(model: Path, algorithm: str, kind: str, kept_rows: int, group: Group | None) -> Found:
    """One update, alone or as one of a group; each rollout passes by itself, wherever it does."""
    update = UpdateConfig(micro_batch=1, noise_draws=2, max_grad_norm=1e9)
    config = FinetuneConfig(
        model=str(model), algorithm=algorithm, parallel=kind, update=update,
        rollout=RolloutConfig(subsets=2, train_steps=2),
        reward=replace(PAPER_REWARD, pool_size=20, subset_size=4),
    )  # fmt: skip
    job = build_finetune(resolve_finetune(config))
    terms = Terms(job.network)
    if group is None and kind == "fsdp":
        block_by_block(job.network)
    parts = (
        StepParts(job, Learner(job.network, update))
        if group is None
        else sharing.DistributedStep(job, group, StopSignals())
    )
    noise = job.rollout.noise(range(kept_rows))
    advantages = torch.linspace(0.5, 2, kept_rows, dtype=torch.float64)
    rows = torch.arange(kept_rows)
    seen = StepParts.gradients(parts, KeptRollouts(noise, rows % 10, advantages, rows, 3), 0)
    return Found(whole_gradients(parts.learner.policy), seen, terms)


def pulled_update(
    model: Path, algorithm: str, kind: str, rows: Sequence[int], group: Group | None
) -> Found:
    """One update that follows the reward's derivative by images, of these rows."""
    update = UpdateConfig(micro_batch=1, max_grad_norm=1e9)
    window = 1 if algorithm == "pg" else None
    config = FinetuneConfig(
        model=str(model), algorithm=algorithm, update=update, parallel=kind,
        rollout=RolloutConfig(subsets=2, train_steps=4, window_size=window),
        reward=replace(PAPER_REWARD, pool_size=20, subset_size=4),
    )  # fmt: skip
    job = build_finetune(resolve_finetune(config))
    job.rollout.window = (1, 2) if algorithm == "pg" else None
    terms = Terms(job.network)
    if group is None and kind == "fsdp":
        block_by_block(job.network)
    parts = (
        StepParts(job, Learner(job.network, update))
        if group is None
        else sharing.DistributedStep(job, group, StopSignals())
    )
    places = torch.tensor(rows)
    pull = torch.linspace(-1, 1, 64 * 8).reshape(8, 64)[places]
    kept = KeptRollouts(job.rollout.noise(rows), places % 10, places.double() - 1, places, 3, pull)
    seen = StepParts.gradients(parts, kept, 0)
    return Found(whole_gradients(parts.learner.policy), seen, terms)


def means_apart(found: dict[str, float], alone: Found) -> float:
    """The largest difference of what was seen, in units of its bound: at most 1.

    Means are float64 sums of terms of one sign, a product a pass, and a quotient. The norm is that
    of gradients that are apart as far as their bounds allow, and itself a float32 sum of as many
    squares as there are values, of which the root halves the relative error.
    """
    terms, bounds = alone.terms.passes, alone.terms.bounds().values()
    values = sum(bound.numel() for bound in bounds)
    moved = float(torch.stack([bound.double().square().sum() for bound in bounds]).sum().sqrt())
    allowed = {name: (terms + 2) * EPS64 * abs(value) for name, value in alone.seen.items()}
    allowed["grad_norm"] = moved + values * EPS / 2 * alone.norm
    return max(
        abs(found[name] - value) / (allowed[name] + EPS64 * EPS64)
        for name, value in {**alone.seen, "grad_norm": alone.norm}.items()
    )


def in_a_process(folder: Path) -> None:
    """What each of two processes does; rank 0 prints how far its gradients are off, in bounds."""
    torch.set_num_threads(1)
    models = {name: sorted((folder / name / "raw").iterdir())[-1] for name in ("edm2", "sit")}
    rank, model = int(os.environ["RANK"]), models["edm2"]
    halves = [slice(0, BATCH // 2), slice(BATCH // 2, BATCH)]
    lines = []
    with joined() as group, sharding.process_group("cpu", group):
        for way in ("replicated", "sharded"):
            halved = gradients(model, way=way, rows=halves[rank])
            if rank != 0:
                continue
            network = trainable(load_model(model))
            terms = Terms(network)
            if way == "sharded":
                block_by_block(network)
            for half in halves:
                (loss_of(network, half, "cpu") / 2).backward()  # type: ignore[no-untyped-call]
            expected = whole_gradients(network)
            lines.append(f"{way} {terms.apart(halved, expected):.3e} {len(expected)}")
        for name, algorithm, count in (("edm2", "pg", 3), ("edm2", "rs", 3), ("sit", "pg", 1)):
            for kind in ("ddp", "fsdp"):
                shared = update_of(models[name], algorithm, kind, count, group)
                if rank != 0:
                    continue
                alone = update_of(models[name], algorithm, kind, count, None)
                off = alone.terms.apart(shared.gradients, alone.gradients)
                off = max(off, means_apart(shared.seen, alone))
                lines.append(f"{name}-{algorithm}-{kind} {off:.3e} {len(alone.gradients)}")
        for algorithm, kind in (("pg", "ddp"), ("pg", "fsdp"), ("pathwise", "ddp")):
            pulled = pulled_update(models["sit"], algorithm, kind, range(3), group)
            if rank != 0:
                continue
            alone = pulled_update(models["sit"], algorithm, kind, range(3), None)
            off = alone.terms.apart(pulled.gradients, alone.gradients)
            lines.append(f"pulled-{algorithm}-{kind} {off:.3e} {len(alone.gradients)}")
    if rank == 0:
        sys.stdout.write("\n".join(lines) + "\n")


def test_shards_of_a_torch_that_cannot_make_them_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def of_torch_2_6(module: nn.Module, *, mesh: object = None) -> nn.Module:
        raise AssertionError(module, mesh)

    monkeypatch.setattr("merge_rl.workflows.finetune.sharded.fully_shard", of_torch_2_6)
    with pytest.raises(
        ConfigError, match="parallel fsdp needs a later PyTorch than .*parallel ddp"
    ):
        shards.sharded(nn.Linear(2, 2))


def test_gradients_equal_those_of_one_process(tmp_path: Path) -> None:
    if "ignored_params" not in inspect.signature(shards.fully_shard).parameters:
        pytest.skip("shards take a later PyTorch")
    write_demo(tmp_path)
    ranks = Child(
        launch_ranks, 2, 0, in_a_process, tmp_path, folder=tmp_path / "outputs",
        environment={**os.environ},
    )  # fmt: skip
    out, err = ranks.communicate(timeout=240)
    assert ranks.returncode == 0, err
    lines = [line.split() for line in out.splitlines()]
    updates = [f"{k}-{way}" for k in ("edm2-pg", "edm2-rs", "sit-pg") for way in ("ddp", "fsdp")]
    pulled = ["pulled-pg-ddp", "pulled-pg-fsdp", "pulled-pathwise-ddp"]
    assert [line[0] for line in lines] == ["replicated", "sharded", *updates, *pulled]
    assert all(int(line[2]) > 20 for line in lines)
    # The mean of two halves is that of the whole, of 2 and 1 rollouts too, and of 1 and none.
    assert all(float(line[1]) <= 1 for line in lines), [
        line for line in lines if float(line[1]) > 1
    ]
