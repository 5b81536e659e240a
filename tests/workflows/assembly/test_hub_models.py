"""A run's model to the Hub and back: the same network, by the name of its repository."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import merge_rl as mrl
from merge_rl.config.optimize import EvaluationConfig, OptimizeConfig, RewardConfig, SearchConfig
from tests.hub_server import TOKEN, Cut, HubServer

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Path:
    """A finished run of a fraction of a second."""
    config = OptimizeConfig(
        checkpoints=str(tiny), track="raw", search=SearchConfig(population=4),
        reward=RewardConfig(pool_size=40, subset_size=10, refresh_size=10),
        evaluation=EvaluationConfig(num_images=10, repeats=3, selection_images=10),
    )  # fmt: skip
    return mrl.optimize(tiny, budget=90, seed=0, out=tmp_path / "run", config=config).run_dir


def test_a_pushed_run_loads_by_name(hub: HubServer, run: Path) -> None:
    hub.fail("PUT", "/upload/", Cut(1000))
    pushed = mrl.push(run, "user/repo")
    repo = hub.repos["user/repo"]
    names = {"README.md", "config.json", "merge.yaml", "model.safetensors"}
    assert set(repo.files) - {".gitattributes"} == names
    for name in names:
        assert repo.files[name] == (run / "merged" / name).read_bytes()
        assert TOKEN.encode() not in repo.files[name]
        # What lies beside the model says where it was made; what is pushed does not.
        assert str(run.parent).encode() not in repo.files[name]

    here, there = mrl.load_model(run / "merged"), mrl.load_model("user/repo")
    assert not there.training
    expected = here.state_dict()
    assert list(there.state_dict()) == list(expected)
    for name, tensor in there.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    again = mrl.load_model(f"user/repo@{pushed.commit}").state_dict()
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_a_model_in_shards_loads_by_name(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    opened = mrl.open_checkpoints(tiny, track="raw")
    weights = mrl.merge(opened, [0.25] * 4)
    mrl.save_model(tmp_path / "out", weights, opened.config, max_shard_bytes=4000)
    pushed = mrl.push(tmp_path / "out", "user/shards")
    assert len(pushed.files) > 5
    found = mrl.load_model("user/shards").state_dict()
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor.float(), rtol=0, atol=0)


def test_other_missing_paths_keep_their_error(hub: HubServer, tmp_path: Path) -> None:
    for path in (tmp_path / "none", str(tmp_path / "none"), "none", Path("user/repo"), "a/b/c"):
        with pytest.raises(mrl.MergeRLError, match="no such file or folder$"):
            mrl.load_model(path)
    assert hub.requests == []
