"""Fine-tuning runs on small networks: what they write, and that every setting does its work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import merge_rl as mrl
from merge_rl.config.finetune import CURVES
from merge_rl.config.optimize import RewardConfig
from merge_rl.config.sampler import SamplerConfig
from merge_rl.errors import (
    ConfigError,
    NonFiniteWeightsError,
    OutOfMemoryError,
    RunError,
    StatisticsError,
    UnknownNameError,
)
from merge_rl.storage.checkpoints.manifest import read_manifest
from merge_rl.storage.checkpoints.model_file import save_checkpoint
from merge_rl.storage.runs.run_dir import FinetuneRun
from merge_rl.workflows.assembly.resolve import resolve_finetune
from merge_rl.workflows.finetune import job as finetune_job
from merge_rl.workflows.finetune.job import training_bytes
from merge_rl.workflows.finetune.page import draw_curves
from merge_rl.workflows.finetune.step import memory_advice
from merge_rl.workflows.finetune.updates import PolicyGradient
from merge_rl.workflows.reference.file import load_reference, save_reference
from tests.finetuning import (
    events_of,
    outcome_of,
    sit_weights,
    small_config,
    write_sit_set,
)

WATCHED = {
    "reward_mean", "reward_std", "kept_fraction", "pool_fid", "pool_gap", "loss", "grad_norm",
    "images_per_second", "memory_bytes", "seconds",
}  # fmt: skip
RATIOS = {"ratio_mean", "clip_fraction", "approx_kl"}


@pytest.fixture
def small(tmp_path: Path, shared_tiny: Path) -> Path:
    return write_sit_set(tmp_path / "sit", shared_tiny)


def run_of(model: Path, out: Path, **changes: Any) -> mrl.FinetuneResult:
    return mrl.finetune(model, out=out, config=small_config(model, **changes))


@pytest.fixture(scope="module")
def shared_small(tmp_path_factory: pytest.TempPathFactory, shared_tiny: Path) -> Path:
    """The same set for all tests: to read only."""
    return write_sit_set(tmp_path_factory.mktemp("set") / "sit", shared_tiny)


@pytest.fixture(scope="module")
def finished(shared_small: Path, tmp_path_factory: pytest.TempPathFactory) -> mrl.FinetuneResult:
    """A run with the small settings: to look at."""
    return run_of(shared_small, tmp_path_factory.mktemp("finished") / "run")


def weights_of(path: Path) -> dict[str, Tensor]:
    return mrl.load_model(path).state_dict()


def test_a_run_leaves_everything(finished: mrl.FinetuneResult) -> None:
    result, run = finished, finished.run_dir
    steps, scores = events_of(run, "step"), events_of(run, "score")
    assert [event["step"] for event in steps] == [1, 2, 3]
    assert all(event.keys() >= WATCHED | RATIOS for event in steps)
    assert [event["step"] for event in scores] == [0, 2, 3] == list(result.curves)
    assert set(scores[0]["scores"]) == set(CURVES)
    # Three steps of 16 rollouts, and the pool of 20 twice.
    assert result.images == 3 * 16 + 2 * 20 == steps[-1]["images"]
    assert [event["kept_fraction"] for event in steps] == [0.25] * 3
    assert [event["ratio_mean"] for event in steps] == pytest.approx([1] * 3, abs=1e-5)
    assert {f.name for f in (run / "samples").iterdir()} == {
        f"step-000000{i}.png" for i in (0, 2, 3)
    }
    assert len(list((run / "state").iterdir())) == 2  # keep_last
    assert json.loads((run / "result.json").read_text())["comparison"] == result.comparison
    page = (run / "report.md").read_text()
    assert all(f"{kind}, {n} steps" in page for kind in ("ODE", "SDE") for n in (3, 4))


def test_the_model_is_the_average_of_the_last_step(
    finished: mrl.FinetuneResult, shared_small: Path
) -> None:
    found = weights_of(finished.model_path)
    snapshot = weights_of(finished.run_dir / "snapshots/ema-0000003.safetensors")
    assert all(torch.equal(found[name], snapshot[name]) for name in snapshot)
    start = weights_of(shared_small / "raw/sit-2.safetensors")  # the newest of the set
    changed = {name for name in start if not torch.equal(found[name], start[name])}
    assert changed == set(start) - {"pos_embed"}
    assert "license: mit" in (finished.model_path / "README.md").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "rs", "rollout": {"under": "sde", "window_size": 1}},
        {"algorithm": "rs", "credit": "per-image", "update": {"epochs": 2}},
        {"algorithm": "pathwise"},
        {
            "rollout": {"window_size": 1, "window_start": 1},
            "sampler": SamplerConfig(num_steps=2, precision="bfloat16"),
        },
        {"update": {"kl_weight": 0.5, "epochs": 2, "per_dimension": True, "clip": 1e-4}},
        {
            "credit": "per-image",
            "update": {
                "ema_decay": 0.0,
                "top_fraction": 1.0,
                "weight_decay": 0.1,
                "warmup_steps": 5,
            },
        },
        {"lora": "rank 2"},
        {"reward": {"refresh": "rolling", "refresh_size": 5, "name": "fid-influence"}},
    ],
    ids=str,
)
def test_every_way_moves_the_weights(changes: dict[str, Any], small: Path, tmp_path: Path) -> None:
    from merge_rl.config.finetune import LoraConfig

    if "lora" in changes:
        changes = {"lora": LoraConfig(rank=2)}
    result = run_of(small, tmp_path / "run", **{"steps": 1, **changes})
    found, start = weights_of(result.model_path), weights_of(small / "raw/sit-2.safetensors")
    assert any(not torch.equal(found[name], start[name]) for name in start)
    assert result.skipped == 0
    if changes.get("update", {}).get("kl_weight"):
        assert events_of(result.run_dir, "step")[0]["reference_kl"] > 0


def test_an_edm2_keeps_its_weights_normalized(tiny: Path, tmp_path: Path) -> None:
    model = tiny / "raw/tiny-0000400.safetensors"
    result = run_of(model, tmp_path / "run", update={"learning_rate": 1e-2}, steps=2)
    weights = weights_of(result.run_dir / "snapshots/raw-0000002.safetensors")
    rms = weights["unet.enc.8x8_block0.conv_res0.weight"].flatten(1).square().mean(1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=0)
    start = weights_of(model)
    assert not torch.equal(weights["unet.out_gain"], start["unet.out_gain"])


def test_curves_are_drawn_from_two_points_on(
    finished: mrl.FinetuneResult, figures: None, tmp_path: Path
) -> None:
    config, path = FinetuneRun.open(finished.run_dir).config(), tmp_path / "curves.png"
    assert not draw_curves(path, config, {0: finished.curves[0]}, "heldout")
    assert not path.exists()
    assert draw_curves(path, config, finished.curves, "heldout")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.numerics
def test_equal_settings_give_equal_bits(
    finished: mrl.FinetuneResult, shared_small: Path, tmp_path: Path
) -> None:
    again = run_of(shared_small, tmp_path / "again")
    assert outcome_of(again.run_dir) == outcome_of(finished.run_dir)


@pytest.mark.numerics
def test_micro_batches_change_rounding_alone(small: Path, tmp_path: Path) -> None:
    first, second = (
        run_of(small, tmp_path / f"m{size}", update={"micro_batch": size}, steps=1)
        for size in (1, 64)
    )
    a, b = (events_of(result.run_dir, "step")[0] for result in (first, second))
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


def test_memory_of_a_step_does_not_grow_with_its_solver_steps(small: Path, tmp_path: Path) -> None:
    # Bytes that autograd holds for backward passes, at most: activations of one step.
    found = {}
    for count in (4, 12):
        held, most = 0, 0

        def pack(tensor: Tensor) -> tuple[Tensor, int]:
            nonlocal held, most
            held += tensor.nbytes
            most = max(most, held)
            return tensor, tensor.nbytes

        def unpack(packed: tuple[Tensor, int]) -> Tensor:
            nonlocal held
            held -= packed[1]
            return packed[0]

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            run_of(small, tmp_path / f"run{count}", rollout={"train_steps": count}, steps=1)
        found[count] = most
    assert found[4] > 0
    assert found[12] <= 1.1 * found[4]


# ---------------------------------------------------------------------------- the set of snapshots


def test_snapshots_are_a_checkpoint_set(finished: mrl.FinetuneResult) -> None:
    opened = mrl.open_checkpoints(finished.run_dir)
    assert opened.tracks == ["start", "raw", "ema"]
    assert opened.names[opened.newest] == "ema-0000003"
    assert opened.nimg == [2000, 2032, 2032, 2048, 2048]  # from 2000, 16 images a step
    assert all(check.ok for check in opened.verify())
    assert opened.defaults.extractor == "digits"
    merged = mrl.merge(opened, [0.2] * 5)
    assert set(merged) == set(sit_weights())


def test_the_trajectory_can_be_searched(
    finished: mrl.FinetuneResult, tmp_path: Path, tiny_config: Any
) -> None:
    run = finished.run_dir
    config = tiny_config(run, track="ema", budget=90, search={"population": 2})
    found = mrl.optimize(run, out=tmp_path / "merge", config=config)
    assert found.coefficients.shape == (1, 2)


def test_the_run_scores_its_own_model(finished: mrl.FinetuneResult, tmp_path: Path) -> None:
    from merge_rl.workflows.assembly.defaults import find_defaults

    near = find_defaults(finished.model_path)
    assert (near.extractor, near.sampler and near.sampler.sde_num_steps) == ("digits", 4)
    assert near.heldout == str(finished.run_dir.resolve() / "evaluation/heldout.safetensors")
    # Fine-tuning goes on from a fine-tuned model.
    again = run_of(finished.model_path, tmp_path / "again", steps=1)
    assert read_manifest(again.run_dir).licence == "MIT"


# ---------------------------------------------------------------------------- stopping, wrapping


def test_a_named_curve_ends_the_run(small: Path, tmp_path: Path) -> None:
    curves = {"every": 1, "stop_on": "ode-eval", "patience": 2}
    result = run_of(small, tmp_path / "run", curves=curves, steps=50, update={"learning_rate": 0.1})
    values = {step: point["ode-eval"]["heldout"] for step, point in result.curves.items()}
    assert max(values) < 50
    assert result.step == min(values, key=lambda step: (values[step], step))
    assert max(values) == result.step + 2
    found = weights_of(result.model_path)
    track = "ema" if result.step else "start"
    kept = weights_of(result.run_dir / f"snapshots/{track}-{result.step:07d}.safetensors")
    assert all(torch.equal(found[name], kept[name]) for name in kept)


class Halved(nn.Module):
    """Stands for what trains a network in many processes: it sees every loss's network call."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, 0
        self.prediction = network.prediction

    def forward(self, *arguments: Tensor) -> Tensor:
        self.calls += 1
        made: Tensor = self.network(*arguments)
        return made


def test_losses_go_through_the_wrapped_network(small: Path, tmp_path: Path) -> None:
    wrapped: list[Halved] = []

    def wrap(network: nn.Module) -> nn.Module:
        wrapped.append(Halved(network))
        return wrapped[-1]

    config = small_config(small, steps=2)
    plain = mrl.finetune(small, out=tmp_path / "plain", config=config)
    result = mrl.finetune(small, out=tmp_path / "run", config=config, wrap=wrap)
    # Two steps, 4 kept images in micro-batches of 3: two noisy steps of the SDE, and the last one
    # without gradients and with them.
    assert wrapped[0].calls == 2 * 2 * (2 + 2)
    found, expected = weights_of(result.model_path), weights_of(plain.model_path)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"algorithm": "ppo"}, UnknownNameError, "unknown algorithm 'ppo'"),
        ({"credit": "image"}, UnknownNameError, "did you mean 'per-image'"),
        ({"track": ("wandbb",)}, UnknownNameError, "did you mean 'wandb'"),
        ({"curves": {"stop_on": "sde"}}, UnknownNameError, "unknown curve 'sde'"),
        ({"rollout": {"train_steps": 1}}, ConfigError, "expected train_steps >= 2"),
        ({"rollout": {"window_size": 3}}, ConfigError, "within the noisy steps 0..1, got '3 steps"),
        ({"rollout": {"window_start": 1}}, ConfigError, "window_start needs window_size"),
        ({"update": {"clip": 0.0}}, ConfigError, "expected clip finite and > 0, got 0.0"),
        ({"update": {"ema_decay": 1.0}}, ConfigError, "expected ema_decay in"),
        ({"rollout": {"under": "ode"}}, ConfigError, "the steps of an ODE draw nothing"),
        (
            {"algorithm": "pathwise", "rollout": {"under": "sde", "window_size": 1}},
            ConfigError,
            "follows every step of a rollout; expected no window_size, got 1",
        ),
        (
            {"algorithm": "pathwise", "curves": {"ode_solver": "dopri5"}},
            ConfigError,
            "a solver with fixed steps .* got curves.ode_solver dopri5",
        ),
        (
            {"algorithm": "pathwise", "parallel": "fsdp"},
            ConfigError,
            "all weights in every process; expected parallel ddp, got fsdp",
        ),
        ({"rollout": {"under": "pde"}}, UnknownNameError, "unknown kind of rollouts 'pde'"),
        (
            {"algorithm": "rs", "rollout": {"window_size": 1}},
            ConfigError,
            "a window of noisy steps needs rollouts under sde, got ode",
        ),
        ({"steps": 0}, ConfigError, "expected steps >= 1, got 0"),
        ({"reward": {"num_subsets": 2}}, ConfigError, "num_replacements to be 1"),
    ],
)
def test_settings_that_cannot_work(
    changes: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message.replace("..", r"\.\.")):
        small_config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"credit": "per-image", "reward": {"name": "kid-subset"}}, "none for single images"),
        ({"curves": {"ode_solver": "dopri5"}}, "dopri5 chooses its steps by the whole batch"),
        ({"reward": {"name": "fid-sub"}}, "unknown reward 'fid-sub'"),
        (
            {"algorithm": "pathwise", "reward": {"name": "fid-full"}},
            "the algorithm pathwise needs rewards with a derivative, got 'fid-full'",
        ),
    ],
)
def test_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, small: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(small, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_reference_of_another_extractor(small: Path, tmp_path: Path) -> None:
    known = load_reference(small / "evaluation/reference.safetensors", extractor="digits")
    path = tmp_path / "other.safetensors"
    save_reference(path, known.stats, extractor="inception")
    with pytest.raises(StatisticsError, match="inception"):
        run_of(small, tmp_path / "run", reference=str(path))
    assert not (tmp_path / "run").exists()


def test_nothing_near_names_a_reference(tmp_path: Path) -> None:
    model = mrl.save_model(tmp_path / "alone", sit_weights(), {"model": "sit"})
    with pytest.raises(ConfigError, match=r"names an extractor; pass --extractor"):
        run_of(model, tmp_path / "run")


def test_a_model_that_makes_no_images(small: Path, tmp_path: Path) -> None:
    weights = sit_weights()
    weights["final_layer.linear.weight"] *= 1e38
    save_checkpoint(small / "raw/sit-2.safetensors", weights)
    with pytest.raises(
        NonFiniteWeightsError, match="samples that are not finite with 3 steps of the sde"
    ):
        run_of(small, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_written_into(small: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(RunError, match="exists already"):
        run_of(small, tmp_path / "run")


def test_too_little_memory_is_told_before(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(small)
    # Weights, gradients, two moments and the average.
    assert training_bytes(config, 1000) == 5 * 4 * 1000
    monkeypatch.setattr(finetune_job, "free_on", lambda _device: 10_000)
    with pytest.raises(OutOfMemoryError, match=r"--lora-rank 8 .* or --ema 0"):
        finetune_job.build_finetune(resolve_finetune(
            small_config(small / "raw/sit-2.safetensors")
        ))  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't"),
    ],
)
def test_memory_that_runs_out_says_what_to_lower(error: Exception, small: Path) -> None:
    message = r"lower --micro-batch \(3 images.*--batch \(250"
    with pytest.raises(OutOfMemoryError, match=message), memory_advice(small_config(small)):
        raise error


def test_other_errors_stay_as_they_are(small: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_advice(small_config(small)):
        raise RuntimeError("shapes do not match")


def test_a_run_that_runs_out_of_memory_can_go_on(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = PolicyGradient.gradients, list[int]()

    def scarce(self: PolicyGradient, *arguments: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return real(self, *arguments)

    monkeypatch.setattr(PolicyGradient, "gradients", scarce)
    with pytest.raises(OutOfMemoryError):
        run_of(small, tmp_path / "run")
    from merge_rl.workflows.finetune.run import resume_finetune

    assert resume_finetune(tmp_path / "run").step == 3


def test_reward_settings_of_the_paper_are_the_default() -> None:
    from merge_rl.config.finetune import PAPER_REWARD

    assert RewardConfig(pool_size=5000, subset_size=50, refresh="10") == PAPER_REWARD
