"""Networks of diffusers: against the library's own, from its folders, and back into them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import merge_rl as mrl
from merge_rl.config.sampler import SamplerConfig
from merge_rl.core.sampling.steps import StepLevels, linear_betas
from merge_rl.errors import CheckpointError, ConfigError, IncompatibleCheckpointError
from merge_rl.models.diffusers_networks import betas_of
from tests.hub_server import HubServer
from tests.quick import Late

diffusers = Late("diffusers")
pytestmark = diffusers.needed()

OUTPUT, SAMPLES = 2e-5, 5e-5  # relative to the largest value
UNET: dict[str, Any] = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "layers_per_block": 1,
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "norm_num_groups": 4, "num_class_embeds": 11,
}  # fmt: skip
TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8,
    "num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10,
}  # fmt: skip
OPTIONS = {"UNet2DModel": UNET, "DiTTransformer2DModel": TRANSFORMER}


def theirs(name: str, seed: int = 1, **changes: Any) -> nn.Module:
    """The library's network, every weight random."""
    torch.manual_seed(seed)
    made: nn.Module = getattr(diffusers, name)(**{**OPTIONS[name], **changes})
    for weight in made.parameters():
        weight.data = 0.15 * torch.randn(weight.shape)
    return made.eval()


def ours(network: nn.Module, scheduler: dict[str, Any]) -> mrl.Network:
    """The same by its config."""
    name = type(network).__name__
    config = {"_class_name": name, **OPTIONS[name]}
    made = mrl.build_model({"model": "diffusers", "network": config, "scheduler": scheduler})
    made.load_state_dict(network.state_dict())
    return made


def write_run(folder: Path, *, averages: bool = False) -> Path:
    """Three checkpoints as the library's training programs leave them, and the scheduler."""
    for seed, step in enumerate((500, 1000, 10_000)):
        for part in ("unet", "unet_ema")[: 1 + averages]:
            network = theirs("UNet2DModel", seed + 10 * (part == "unet_ema"))
            network.save_pretrained(folder / f"checkpoint-{step}" / part)  # type: ignore[operator]
    schedule = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    schedule.save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("ddpm") / "run")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.numerics
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@torch.no_grad()
def test_outputs_are_the_librarys(name: str, prediction: str) -> None:
    network = theirs(name)
    model = ours(network, {"beta_schedule": "linear", "prediction_type": prediction})
    generator = torch.Generator().manual_seed(2)
    x, steps = torch.randn(3, *model.sample_shape, generator=generator), torch.tensor([3, 500, 999])
    labels = torch.tensor([1, 4, 10])
    kept = (1 - linear_betas()).cumprod(0)[steps].reshape(-1, 1, 1, 1)
    alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    out = network(x, steps, class_labels=labels, return_dict=False)[0][:, : x.shape[1]].double()
    denoised = {
        "epsilon": (x - sigma * out) / alpha,
        "v_prediction": alpha * x - sigma * out,
        "sample": out,
    }[prediction]
    level = (sigma / alpha).flatten().float()
    found = model((x / alpha).float(), level, labels)
    for mine, own, wide in zip(found, denoised, 1 / alpha, strict=True):
        # D is x - sigma e, of which x is far larger than the data at high levels.
        large = float(wide) if prediction == "epsilon" else 1.0
        bound = OUTPUT * max(float(own.abs().max()), large)
        assert float((mine - own).abs().max()) <= bound


@pytest.mark.numerics
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("schedule", "prediction", "spacing"),
    [
        ("linear", "epsilon", "leading"),
        ("scaled_linear", "v_prediction", "trailing"),
        ("squaredcos_cap_v2", "sample", "leading"),
        ("squaredcos_cap_v2", "epsilon", "trailing"),
    ],
)
@torch.no_grad()
def test_eulers_samples_are_those_of_the_librarys_ddim(
    name: str, schedule: str, prediction: str, spacing: str
) -> None:
    network = theirs(name)
    ddim = diffusers.DDIMScheduler(
        beta_schedule=schedule, prediction_type=prediction, timestep_spacing=spacing,
        clip_sample=False, steps_offset=int(spacing == "leading"),
    )  # fmt: skip
    model = ours(network, dict(ddim.config))
    labels = torch.tensor([1, 4, 7])
    noise = torch.randn(3, *model.sample_shape, generator=torch.Generator().manual_seed(2))
    ddim.set_timesteps(10)
    expected = noise
    for step in ddim.timesteps:
        out = network(expected, step.expand(3), class_labels=labels, return_dict=False)[0]
        expected = ddim.step(out[:, : noise.shape[1]], step, expected).prev_sample
    # The library starts at unit variance of signal and noise together.
    first = float(model.noise_levels(10)[0])  # type: ignore[operator]
    start = noise * (1 + first**-2) ** 0.5
    found = mrl.sample(model, start, labels, solver="euler", num_steps=10, dtype=torch.float64)
    assert relative(found, expected) < SAMPLES


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_betas_are_the_librarys_in_float64(schedule: str) -> None:
    theirs = diffusers.DDPMScheduler(
        num_train_timesteps=50, beta_start=0.001, beta_end=0.3, beta_schedule=schedule
    )
    found = torch.tensor(betas_of(dict(theirs.config)))
    torch.testing.assert_close(found, theirs.betas, rtol=1e-5, atol=1e-6)


def test_steps_by_hand() -> None:
    levels = StepLevels(linear_betas(10))

    def steps(count: int, **spaced: Any) -> list[float]:
        return levels.step_of(levels.ladder(count, **spaced)[:-1]).tolist()

    assert steps(4) == [9, 6, 3, 0]
    assert steps(4, spacing="leading") == [6, 4, 2, 0]  # strides of 10 // 4
    assert steps(4, spacing="leading", offset=1) == [7, 5, 3, 1]
    assert steps(4, spacing="trailing") == [
        9,
        7,
        4,
        1,
    ]  # 10, 7.5, 5 and 2.5 rounded to even, less 1
    assert steps(1, spacing="trailing") == [9]
    with pytest.raises(ConfigError, match=r"expected steps in 0\.\.9, got 5\.\.10"):
        levels.ladder(2, spacing="leading", offset=5)


def test_classes_are_those_of_the_label_table() -> None:
    found = [
        mrl.build_model(
            {
                "model": "diffusers", "scheduler": {"beta_schedule": "linear"},
                "network": {"_class_name": "UNet2DModel", **UNET, "num_class_embeds": rows},
                "num_classes": classes,
            }
        )
        for rows, classes in ((11, 10), (10, 10), (None, 0))
    ]  # fmt: skip
    known = [(getattr(m, "label_dim"), getattr(m, "null_label")) for m in found]  # noqa: B009
    assert known == [(10, 10), (10, None), (0, None)]
    with pytest.raises(ConfigError, match="no null class; expected labels, got none"):
        found[1](torch.zeros(2, 1, 8, 8), torch.tensor(1.0))
    with pytest.raises(ConfigError, match=r"expected labels in 0\.\.10, found 11"):
        found[0](torch.zeros(1, 1, 8, 8), torch.tensor(1.0), torch.tensor([11]))
    with torch.no_grad():
        found[0](torch.zeros(2, 1, 8, 8), torch.tensor(1.0))  # all of no class


@pytest.mark.parametrize(
    ("network", "scheduler", "said"),
    [
        ({"_class_name": "os.system"}, {}, "UNet2DModel or DiTTransformer2DModel, got 'os.system'"),
        ({"sample_size": None}, {}, "expected sample_size from 1 to 4096, got None"),
        ({"layers_per_block": 10**6}, {}, "expected layers_per_block from 0 to 200"),
        ({"time_embedding_type": "fourier"}, {}, "time_embedding_type positional, got 'fourier'"),
        ({"class_embed_type": "identity"}, {}, "got class_embed_type 'identity'"),
        ({"widths": 3}, {}, "there is no option 'widths'"),
        ({"out_channels": 3}, {}, "as many outputs as inputs, or twice"),
        ({"down_block_types": ["Nothing", "Nothing"]}, {}, "does not take this config"),
        ({}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "got FlowMatchEulerDiscrete"),
        ({}, {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid', expected linear"),
        ({}, {"beta_schedule": "linear", "prediction_type": "flow"}, "prediction_type is 'flow'"),
        ({}, {"beta_schedule": "linear", "timestep_spacing": "odd"}, "timestep_spacing is 'odd'"),
        ({}, {"beta_schedule": "linear", "num_train_timesteps": 1}, "num_train_timesteps from 2"),
        ({}, {"beta_schedule": "linear", "beta_end": 2}, "beta_start and beta_end between 0 and 1"),
        ({}, {"beta_schedule": "linear", "rescale_betas_zero_snr": True}, "ends in pure noise"),
        ({}, {"trained_betas": [0.1, "b"]}, "expected trained_betas as numbers"),
        ({}, {"beta_schedule": "linear", "steps_offset": -1}, "expected an offset within"),
    ],
)
def test_configs_that_no_network_has_are_refused(
    network: dict[str, Any], scheduler: dict[str, Any], said: str
) -> None:
    config = {"_class_name": "UNet2DModel", **UNET, **network}
    with pytest.raises(ConfigError, match=said):
        mrl.build_model({"model": "diffusers", "network": config, "scheduler": scheduler})


def test_a_run_of_folders_is_a_set(run: Path, tmp_path: Path) -> None:
    opened = mrl.open_checkpoints(run)
    assert opened.names == ("checkpoint-500", "checkpoint-1000", "checkpoint-10000")
    assert opened.config is not None
    assert opened.config["num_classes"] == 10  # 11 rows: the last is the null class
    by_file = mrl.load_model(run / "checkpoint-1000/unet")
    assert by_file.state_dict().keys() == theirs("UNet2DModel").state_dict().keys()
    pipeline = tmp_path / "pipeline"
    shutil.copytree(run / "checkpoint-1000/unet", pipeline / "unet")
    shutil.copytree(run / "scheduler", pipeline / "scheduler")
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    found = [
        mrl.sample(model, noise, labels, num_steps=3)
        for model in (by_file, mrl.load_model(pipeline))
    ]
    assert torch.equal(found[0], found[1])


def test_converted_they_are_the_same(run: Path, tmp_path: Path) -> None:
    mrl.convert(run, tmp_path / "set")
    opened, direct = mrl.open_checkpoints(tmp_path / "set"), mrl.open_checkpoints(run)
    assert opened.names == direct.names
    assert opened.config == direct.config
    assert all(torch.equal(opened.read(1)[k], t) for k, t in direct.read(1).items())


def test_averages_beside_are_a_track(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", averages=True)
    assert mrl.open_checkpoints(run).tracks == ["raw", "ema"]
    assert mrl.open_checkpoints(run, track="ema").names[0] == "checkpoint-500/unet_ema"
    mrl.convert(run, tmp_path / "set")  # "auto": the averages
    mrl.convert(run, tmp_path / "both", weights="both")
    assert mrl.open_checkpoints(tmp_path / "set").tracks == ["ema"]
    both = mrl.open_checkpoints(tmp_path / "both")
    assert sorted(both.tracks) == ["ema", "raw"]
    assert len(both) == 6
    with pytest.raises(CheckpointError, match="holds no 'ema' weights"):
        mrl.convert(run / "checkpoint-500/unet", tmp_path / "none", weights="ema")


@torch.no_grad()
def test_the_library_loads_what_is_exported(run: Path, tmp_path: Path) -> None:
    opened = mrl.open_checkpoints(run)
    weights = mrl.merge(opened, [0.5, -0.25, 0.75])
    saved = mrl.save_model(tmp_path / "out", weights, opened.config)
    theirs = diffusers.UNet2DModel.from_pretrained(saved)
    assert all(torch.equal(theirs.state_dict()[k], t) for k, t in weights.items())
    schedule = diffusers.DDPMScheduler.from_pretrained(saved, subfolder="scheduler")
    assert schedule.config.beta_schedule == "squaredcos_cap_v2"
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 10])
    again = mrl.load_model(saved)
    assert again.null_label == 10
    level = torch.tensor(1.0)
    step = StepLevels(torch.tensor(betas_of(dict(schedule.config)))).step_of(level)
    noise = theirs(x / 2**0.5, step.expand(2), class_labels=labels).sample
    torch.testing.assert_close(again(x, level, labels), x - noise)
    sharded = mrl.save_model(tmp_path / "cut", weights, opened.config, max_shard_bytes=50_000)
    in_parts = diffusers.UNet2DModel.from_pretrained(sharded)
    assert all(torch.equal(in_parts.state_dict()[k], t) for k, t in weights.items())
    assert torch.equal(mrl.load_model(sharded)(x, level, labels), again(x, level, labels))


def test_folders_that_lack_something_are_refused(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone/unet"
    shutil.copytree(run / "checkpoint-500/unet", alone)
    with pytest.raises(
        CheckpointError, match=r"betas and prediction are not known; expected a sch.*or --network"
    ):
        mrl.load_model(alone)
    opened = mrl.open_checkpoints(alone)  # its weights are known, as `convert` takes them
    assert opened.config is None
    assert opened.read(0).keys() == theirs("UNet2DModel").state_dict().keys()
    shutil.copytree(run / "scheduler", alone.parent / "scheduler")
    document = json.loads((alone / "config.json").read_text())
    (alone / "config.json").write_text(json.dumps({**document, "num_class_embeds": 12}))
    with pytest.raises(IncompatibleCheckpointError, match=r"class_embedding\.weight"):
        mrl.convert(alone, tmp_path / "set")
    (alone / "config.json").write_text(json.dumps({**document, "_class_name": "AutoencoderKL"}))
    with pytest.raises(CheckpointError, match="UNet2DModel or DiTTr.*found 'AutoencoderKL'"):
        mrl.convert(alone, tmp_path / "set")


def test_a_search_in_a_run_of_folders(
    run: Path, shared_tiny: Path, tiny_config: Callable[..., Any], mergerl: Callable[..., Any]
) -> None:
    files = shared_tiny / "evaluation"
    config = tiny_config(
        run, track=None, budget=140, extractor="digits", sampler=SamplerConfig(num_steps=2),
        extractor_weights=str(files / "extractor.safetensors"),
        reference=str(files / "reference.safetensors"),
    )  # fmt: skip
    mrl.optimize(run, out="search", config=config)
    merged = Path("search/merged")
    diffusers.UNet2DModel.from_pretrained(merged)
    for command in (
        ("inspect", run), ("inspect", merged), ("inspect", run / "checkpoint-500"),
        ("sample", merged, "--num-images", 2, "--num-steps", 2, "--out", "grid.png"),
        ("merge", run, "again", "--recipe", merged / "merge.yaml"),
        ("push", merged, "user/repo", "--dry-run"),
    ):  # fmt: skip
        ended = mergerl(*command)
        assert ended.code == 0, (command, ended.err)
    name = "diffusion_pytorch_model.safetensors"
    assert (Path("again") / name).read_bytes() == (merged / name).read_bytes()


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@torch.no_grad()
def test_pushed_it_loads_by_its_name(run: Path, tmp_path: Path, hub: HubServer) -> None:
    opened = mrl.open_checkpoints(run)
    weights = mrl.merge(opened, [0.5, 0.25, 0.25])
    saved = mrl.save_model(tmp_path / "out", weights, opened.config)
    mrl.push(saved, "user/unet")
    files = hub.repos["user/unet"].files.keys()
    assert {"config.json", "scheduler/scheduler_config.json"} <= files
    loaded = mrl.load_model("user/unet").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    # As the library's users publish: neither a card of ours nor a config within the weights.
    plain = hub.add_repo("user/plain", {})
    folder = run / "checkpoint-500/unet"
    named = {file.name: file.read_bytes() for file in folder.iterdir()}
    scheduler = (run / "scheduler/scheduler_config.json").read_bytes()
    plain.files |= {**named, "scheduler/scheduler_config.json": scheduler}
    plain.commit("a network")
    first = opened.read(0)
    again = mrl.load_model("user/plain").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
