"""Settings by their names from Python, results that say what they are, progress that is heard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import merge_rl as mrl
from merge_rl.config import said_by, with_settings
from merge_rl.errors import ConfigError, UnknownNameError
from merge_rl.storage.runs import RunDir

pytestmark = pytest.mark.usefixtures("no_network_here")

SMALL: dict[str, Any] = {
    "track": "raw", "budget": 90, "population": 4, "pool_size": 40, "subset_size": 10,
    "refresh_size": 10, "evaluation": {"num_images": 10, "repeats": 3, "selection_images": 10},
    "num_steps": 2, "reward": "fid-subset", "searcher": "policy-gradient",
}  # fmt: skip


@pytest.fixture(scope="module")
def found(shared_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> mrl.OptimizeResult:
    run = tmp_path_factory.mktemp("named") / "run"
    return mrl.optimize(shared_tiny, out=run, progress=False, **SMALL)


def test_settings_are_said_by_their_names(found: mrl.OptimizeResult, shared_tiny: Path) -> None:
    config = RunDir(found.run_dir).config()
    assert (config.track, config.budget, config.search.population) == ("raw", 90, 4)
    assert (config.reward.name, config.reward.pool_size) == ("fid-subset", 40)
    assert config.evaluation == mrl.EvaluationConfig(num_images=10, repeats=3, selection_images=10)
    # What the call says of the sampler lies over the set's own.
    own = mrl.open_checkpoints(shared_tiny).defaults.sampler
    expected = mrl.SamplerConfig(**{**own, "num_steps": 2})
    assert config.sampler == expected


def test_what_nobody_can_mean_is_refused(shared_tiny: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, **settings: Any) -> None:
        with pytest.raises(error, match=match):
            mrl.optimize(shared_tiny, out=tmp_path / "run", progress=False, **settings)
        assert not (tmp_path / "run").exists()

    refused(UnknownNameError, "unknown setting 'pool_sise'; did you mean 'pool_size'", pool_sise=3)
    refused(UnknownNameError, "unknown setting 'only'; did you mean 'select'", only=3)
    refused(ConfigError, "settings.evaluation.num_images: expected int", num_images="many")
    whole = mrl.OptimizeConfig(budget=500, reward=mrl.RewardConfig(pool_size=170))
    refused(ConfigError, "budget is 90 in the call and 500 in its config", config=whole, budget=90)
    refused(
        ConfigError, "reward.pool_size is 140 in the call and 170 in", config=whole, pool_size=140
    )
    other = mrl.OptimizeConfig(checkpoints=str(tmp_path))
    refused(ConfigError, "checkpoints is '.*' in the call and '.*' in its config", config=other)
    for wrong in ("digits", {"budget": 3}, mrl.FinetuneConfig()):
        refused(ConfigError, "expected a merge_rl.OptimizeConfig as config", config=wrong)
        with pytest.raises(ConfigError, match="expected a merge_rl.OptimizeConfig as config"):
            mrl.compare_searchers(wrong, out=tmp_path / "cmp")  # type: ignore[arg-type]


def test_names_that_end_several_keys_want_their_part() -> None:
    assert said_by(mrl.OptimizeConfig, decay=0.5) == {"search": {"decay": 0.5}}
    # Numbers of other libraries are numbers.
    for seven in (np.int64(7), np.array(7), torch.tensor(7)):
        assert with_settings(mrl.OptimizeConfig, None, budget=seven).budget == 7
    assert said_by(mrl.OptimizeConfig, search=mrl.SearchConfig(std=2.0))["search"]["std"] == 2.0
    with pytest.raises(ConfigError, match=r"'name' is one of .*; say .*reward=\{'name': \.\.\.\}"):
        said_by(mrl.OptimizeConfig, name="x")
    config = mrl.OptimizeConfig(seed=4)
    assert with_settings(mrl.OptimizeConfig, config, seed=4, batch=7) == mrl.OptimizeConfig(
        seed=4, batch=7
    )


def test_a_result_is_shown_as_its_verdict(found: mrl.OptimizeResult) -> None:
    text = repr(found)
    assert text == f"{found.run_dir}: {found.verdict}"
    gain = found.comparison.gain("start")
    word = "etter than" if gain.low > 0 else "orse than" if gain.high < 0 else "o clear difference"
    assert word in text
    assert f"{found.final['heldout']['mean']:.3f}" in text


@pytest.mark.usefixtures("network")
def test_a_result_draws_its_search_and_its_samples(
    found: mrl.OptimizeResult, figures: None, tmp_path: Path
) -> None:
    assert found.plot(tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    assert found.plot(tmp_path / "search.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ConfigError, match=r"search.xyz: expected the name of a plot, ending in"):
        found.plot(tmp_path / "search.xyz")
    assert not (tmp_path / "search.xyz").exists()
    with pytest.raises(ConfigError, match="expected at least 1 image, got 0"):
        found.samples(0)
    images = found.samples(6, seed=3)
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (6, 1, 8, 8))
    assert torch.equal(found.samples(2, seed=5)[:1] * 0, images[2:3] * 0)
    model = mrl.load_model(found.run_dir)
    config = RunDir(found.run_dir).config()
    assert config.sampler is not None
    noise = mrl.seeded_noise(range(3, 9), model.sample_shape)
    levels = mrl.sample(model, noise, torch.arange(6), num_steps=2, solver=config.sampler.solver)
    expected = (levels * 127.5 + 128).clamp(0, 255)
    assert float((images.float() - expected).abs().max()) <= 1.0


def test_progress_is_printed_unless_it_is_silenced(
    shared_tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mrl.optimize(shared_tiny, out=tmp_path / "a", **SMALL)
    heard = capsys.readouterr()
    assert heard.out == ""
    lines = heard.err.splitlines()
    assert "search (90 images)" in lines
    assert sum(line.startswith("  round 1  pool FID") for line in lines) == 1
    mrl.optimize(shared_tiny, out=tmp_path / "b", progress=False, **SMALL)
    assert capsys.readouterr().err == ""


def test_a_class_is_a_searcher(shared_tiny: Path, tmp_path: Path) -> None:
    class Still(mrl.Searcher):
        def ask(self) -> torch.Tensor:
            return self.mean[None].clone()

        def tell(self, thetas: torch.Tensor, rewards: torch.Tensor) -> None:
            self.rounds += 1

    settings = {**SMALL, "searcher": Still, "population": 1}
    result = mrl.optimize(shared_tiny, out=tmp_path / "run", progress=False, **settings)
    assert torch.equal(result.coefficients, result.found.start)
    assert "test_by_name:test_a_class_is_a_searcher" in (
        tmp_path / "run/config.yaml"
    ).read_text().replace("\n", "").replace(" ", "")
