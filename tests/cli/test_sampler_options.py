"""The sampler's options on the command line: what they change, and what records them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from merge_rl.cli.options import build, layered
from merge_rl.cli.options.layers import fast
from merge_rl.config import SampleConfig, SamplerConfig, to_mapping

Mergerl = Callable[..., Any]
MODEL = "tiny/raw/tiny-0000400.safetensors"


def test_the_command_line_goes_on_top_of_what_is_near() -> None:
    near = SamplerConfig(solver="euler", num_steps=9, guide="g", rho=5.0, guidance_channels=2)
    # A command is told those of an option's settings that it has.
    offered = {
        key: value for key, value in fast(True, "cuda").items() if key != "autoencoder_dtype"
    }
    said = layered(
        {**offered, "sampler.solver": "sde-euler", "sampler.guidance": 1.5},
        overrides=["sampler.path=gvp", "sampler.guidance_channels=null", "sampler.rtol=1e-4"],
    )
    assert build(SampleConfig, said, near=to_mapping(near)).sampler == SamplerConfig(
        solver="sde-euler", num_steps=9, guide="g", rho=5.0, guidance=1.5, guidance_channels=None,
        path="gvp", rtol=1e-4, precision="bfloat16", compile=True,
    )  # fmt: skip
    assert build(SampleConfig, {}, near=to_mapping(near)).sampler is None


def test_sample_takes_every_kind_of_solver(mergerl: Mergerl, tiny: Path, tmp_path: Path) -> None:
    pictures = set()
    options: list[list[str]] = [
        ["--solver", name] for name in ("heun", "midpoint", "rk4", "dopri5", "sde-euler")
    ]
    options.append(["--solver", "sde-euler", "--set", "sampler.diffusion_norm=0.5"])
    options.append(["--guidance", "2", "--guide", str(tiny / "raw/tiny-0000100.safetensors")])
    for extra in options:
        ended = mergerl(
            "sample",
            MODEL,
            "--num-images",
            4,
            "--num-steps",
            4,
            "--out",
            "s.png",
            "--force",
            *extra,
        )
        assert ended.code == 0, ended.err
        pictures.add((tmp_path / "s.png").read_bytes())
    assert len(pictures) == len(options)


def test_guidance_holds_in_an_interval_that_scores_record(mergerl: Mergerl, tiny: Path) -> None:
    small = ["--num-images", 8, "--repeats", 2, "--json", "--num-steps", 3]
    guided = [*small, "--guidance", "2", "--guide", str(tiny / "raw/tiny-0000100.safetensors")]
    ended = mergerl("evaluate", MODEL, *guided, "--guidance-interval", "0.19,1.61")
    assert ended.code == 0, ended.err
    sampler = json.loads(ended.out)["sampler"]
    assert (sampler["guidance_interval"], sampler["guidance_ends"]) == ([0.19, 1.61], "sharp")
    # No level of three steps is in there: guidance changes nothing.
    alone = json.loads(mergerl("evaluate", MODEL, *small).out)
    assert json.loads(ended.out)["fid"] == alone["fid"]
    refused = mergerl("evaluate", MODEL, *guided, "--guidance-interval", "3,2")
    assert refused.code == 1
    assert "expected guidance_interval two numbers, 0 <= LOW < HIGH, got (3.0, 2.0)" in refused.err


def test_evaluate_records_the_sampler(mergerl: Mergerl, tiny: Path) -> None:
    small = ["--num-images", 8, "--repeats", 2, "--json"]
    ended = mergerl("evaluate", MODEL, *small, "--solver", "sde-heun", "--num-steps", 3)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["sampler"] == {
        "solver": "sde-heun", "num_steps": 3, "guidance": 1.0, "sigma_min": 0.002,
        "sigma_max": 80.0, "rho": 7.0, "diffusion": "sigma", "diffusion_norm": 1.0,
    }  # fmt: skip


def test_the_fast_way_is_left_off_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert fast(True, "cpu") == fast(True, "cpu:0") == {}
    assert capsys.readouterr().err.count("on the device cpu all runs in float32") == 2
    meant = {"sampler.precision": "bfloat16", "autoencoder_dtype": "bfloat16"}
    assert fast(True, "cuda:1") == meant | {"sampler.compile": True}
    assert fast(False, "cpu") == fast(False, "cuda") == {}
    assert not capsys.readouterr().err
