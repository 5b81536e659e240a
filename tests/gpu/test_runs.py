"""Whole runs on a GPU: they repeat themselves, resume to the same end, and agree with the CPU."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import merge_rl as mrl
from merge_rl.config.optimize import OptimizeConfig
from merge_rl.config.sampler import SamplerConfig
from merge_rl.interfaces import NullTracker
from merge_rl.workflows.finetune.run import resume_finetune
from tests.finetuning import events_of, small_config, write_sit_set
from tests.gradients import launched

TinyConfig = Callable[..., OptimizeConfig]


class Interrupting(NullTracker):
    """Ctrl-C at the second event of a kind."""

    def __init__(self, kind: str) -> None:
        self.kind, self.seen = kind, 0

    def event(self, event: Mapping[str, Any]) -> None:
        self.seen += event["kind"] == self.kind
        if self.seen == 2:
            raise KeyboardInterrupt


def same(one: Path, other: Path) -> bool:
    left, right = load_file(one), load_file(other)
    return all(torch.equal(left[name], tensor) for name, tensor in right.items())


def test_a_search_resumes_to_the_same_end_and_agrees_with_the_cpu(
    tiny: Path, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = tiny_config(tiny, device="cuda")
    first = mrl.optimize(tiny, out=tmp_path / "a", config=config)
    tracker = Interrupting("round")
    with pytest.raises(KeyboardInterrupt):
        mrl.optimize(tiny, out=tmp_path / "b", config=config, tracker=tracker)
    assert tracker.seen == 2
    second = mrl.resume(tmp_path / "b")
    assert isinstance(second, mrl.OptimizeResult)
    assert torch.equal(first.coefficients, second.coefficients)
    exported = [tmp_path / run / "merged/model.safetensors" for run in ("a", "b")]
    assert same(*exported)
    # Another order of sums changes features a little, and advantages pass that on.
    here = dataclasses.replace(config, device="cpu")
    on_cpu = mrl.optimize(tiny, out=tmp_path / "c", config=here)
    torch.testing.assert_close(first.coefficients, on_cpu.coefficients, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("algorithm", ["pg", "rs"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_finetuning_resumes_to_the_same_end(
    tmp_path: Path, tiny: Path, algorithm: str, precision: str
) -> None:
    model = write_sit_set(tmp_path / "set", tiny)
    sampler = SamplerConfig(solver="midpoint", precision=precision)
    config = small_config(model, algorithm=algorithm, device="cuda", sampler=sampler)
    gc.collect()  # networks of earlier tests
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whole = mrl.finetune(str(model), out=tmp_path / "whole", config=config)
    peak = torch.cuda.max_memory_allocated()
    with pytest.raises(KeyboardInterrupt):
        mrl.finetune(str(model), out=tmp_path / "part", config=config, tracker=Interrupting("step"))
    again = resume_finetune(tmp_path / "part")
    assert same(*(run.model_path / "model.safetensors" for run in (whole, again)))
    steps = events_of(tmp_path / "whole", "step")
    assert len(steps) == 3
    # The most so far, of weights, activations and the libraries' work space.
    sizes = [step["memory_bytes"] for step in steps]
    assert before < sizes[0]
    assert [*sizes, peak] == sorted([*sizes, peak])
    if algorithm == "pg":
        # On policy: rollout and gradient pass see the same weights in batches of another size.
        tolerance = 1e-5 if precision == "float32" else 2e-2
        assert all(step["ratio_mean"] == pytest.approx(1, abs=tolerance) for step in steps)


def test_gradients_over_nccl_equal_those_of_a_process_alone(tmp_path: Path, demo: Path) -> None:
    lines = [line for line in launched("tests.gpu.gradients", demo, tmp_path, 1) if "off" in line]
    assert [line[1] for line in lines] == ["replicated", "sharded"]
    assert all(float(line[2]) < 1e-5 for line in lines), lines
