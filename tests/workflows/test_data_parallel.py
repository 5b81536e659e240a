"""Gradients over two processes equal those of one, on the embedded network of the digits."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from merge_rl.config.finetune import PAPER_REWARD, FinetuneConfig, RolloutConfig, UpdateConfig
from merge_rl.demo.write import write_demo
from merge_rl.parallel import Group, joined
from merge_rl.workflows.data_parallel import (
    process_group,
    whole_gradients,
)
from merge_rl.workflows.finetune_crew import SharedParts
from merge_rl.workflows.finetune_job import build_finetune, resolve_finetune
from merge_rl.workflows.finetune_kept import Kept
from merge_rl.workflows.finetune_step import StepParts
from merge_rl.workflows.learner import Learner
from merge_rl.workflows.stop_signals import StopSignals
from tests.gradients import BATCH, furthest, gradients, launched


def update_of(
    model: Path, algorithm: str, kind: str, kept_rows: int, group: Group | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients of a fine-tuning step's update, and what it saw; alone, or one of a group."""
    update = UpdateConfig(micro_batch=2, noise_draws=2, max_grad_norm=1e9)
    config = FinetuneConfig(
        model=str(model), algorithm=algorithm, parallel=kind, update=update,
        rollout=RolloutConfig(subsets=2, train_steps=4),
        reward=replace(PAPER_REWARD, pool_size=20, subset_size=4),
    )  # fmt: skip
    job = build_finetune(resolve_finetune(config))
    parts = (
        StepParts(job, Learner(job.network, update))
        if group is None
        else SharedParts(job, group, StopSignals())
    )
    noise = job.rollout.noise(range(kept_rows))
    advantages = torch.linspace(0.5, 2, kept_rows, dtype=torch.float64)
    rows = torch.arange(kept_rows)
    found = StepParts.gradients(parts, Kept(noise, rows % 10, advantages, rows, 3), 0)
    return whole_gradients(parts.learner.policy), found


def in_a_process(folder: Path) -> None:
    """What each of two processes does; rank 0 prints how far its gradients are off."""
    torch.set_num_threads(1)
    models = {name: sorted((folder / name / "raw").iterdir())[-1] for name in ("edm2", "sit")}
    rank, model = int(os.environ["RANK"]), models["edm2"]
    expected = gradients(model, way="alone", rows=slice(0, BATCH))
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    lines = []
    with joined() as group, process_group("cpu", group):
        for way in ("replicated", "sharded"):
            off = furthest(gradients(model, way=way, rows=half), expected)
            lines.append(f"{way} {off:.3e} {len(expected)}")
        for name, algorithm, count in (("edm2", "pg", 5), ("edm2", "rs", 5), ("sit", "pg", 1)):
            whole, seen = update_of(models[name], algorithm, "ddp", count, None)
            for kind in ("ddp", "fsdp"):
                shared, both = update_of(models[name], algorithm, kind, count, group)
                off = furthest(shared, whole)
                for value in seen if rank == 0 else ():
                    off = max(off, abs(both[value] - seen[value]) / max(abs(seen[value]), 1e-3))
                lines.append(f"{name}-{algorithm}-{kind} {off:.3e} {len(whole)}")
    if rank == 0:
        sys.stdout.write("\n".join(lines) + "\n")


def test_gradients_equal_those_of_one_process(tmp_path: Path) -> None:
    write_demo(tmp_path)
    lines = launched("tests.workflows.test_data_parallel", tmp_path, tmp_path, 2)
    updates = [f"{k}-{way}" for k in ("edm2-pg", "edm2-rs", "sit-pg") for way in ("ddp", "fsdp")]
    assert [line[0] for line in lines] == ["replicated", "sharded", *updates]
    assert all(int(line[2]) > 20 for line in lines)
    # The norm of each tensor's difference, relative: the mean of two halves is that of the whole,
    # of 2 and 3 rollouts too, and of 1 rollout and none.
    assert all(float(line[1]) < 1e-6 for line in lines), lines
