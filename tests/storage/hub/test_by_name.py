"""Names of the Hub wherever a set, a merge or files to convert are taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import merge_rl as mrl
from merge_rl.errors import CheckpointError, HubError
from merge_rl.storage.files.atomic import save_tensors
from merge_rl.storage.hub.cached import local_recipe, local_set
from merge_rl.workflows.export import Recipe
from tests.cli.test_given import Notes, said
from tests.fixtures import TinyConfig
from tests.hub_server import HubServer, Repo

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("no_network_here"),
]

Mergerl = Callable[..., Any]


def files_of(folder: Path) -> dict[str, bytes]:
    """What a repository would hold of a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def published(hub: HubServer, shared_tiny: Path) -> Repo:
    """The tiny set."""
    return hub.add_repo("user/set", files_of(shared_tiny))


def test_a_set_is_opened_and_merged_by_its_name(published: Repo, shared_tiny: Path) -> None:
    heard = Notes()
    opened = mrl.open_checkpoints("user/set", track="raw", tracker=heard)
    assert opened.folder == local_set("user/set")
    assert [text.partition(":")[0] for text in heard.texts] == ["user/set"]
    here = mrl.open_checkpoints(shared_tiny)
    found = mrl.merge("user/set", [0.125] * 8)
    torch.testing.assert_close(found, mrl.merge(here, [0.125] * 8), rtol=0, atol=0)
    with pytest.raises(HubError, match="user/none: no such file or folder, and not from the Hub"):
        mrl.open_checkpoints("user/none")


def test_a_recipe_comes_by_the_name_of_a_merge_without_its_weights(
    hub: HubServer, published: Repo, mergerl: Mergerl, shared_tiny: Path
) -> None:
    said(
        mergerl("merge", shared_tiny, "one", "--coefficients", "0.5,0.25,0.25,0", "--track", "raw")
    )
    hub.add_repo("user/merge", files_of(Path("one")))
    hub.requests.clear()
    err = said(mergerl("merge", "user/set", "two", "--recipe", "user/merge"))
    assert "user/set: took the set of the Hub" in err
    assert not hub.asked("GET", ".*user/merge.*model.safetensors")
    assert Path("two/model.safetensors").read_bytes() == Path("one/model.safetensors").read_bytes()
    hub.stop()
    assert Recipe("user/merge").names == [f"tiny-0000{n}00" for n in (1, 2, 3, 4)]


def test_what_has_no_recipe_is_refused_by_what_it_lacks(
    hub: HubServer, published: Repo, mergerl: Mergerl, shared_tiny: Path
) -> None:
    for name, sentence in (
        ("user/set", "user/set: expected a recipe (merge.yaml), found none"),
        ("user/none", "user/none: no such repository on the Hub, or private and not readable"),
    ):
        ended = mergerl("merge", shared_tiny, "out", "--recipe", name)
        told = f"error: {name}: no such file or folder, and not from the Hub: {sentence}\n"
        assert (ended.code, ended.err.endswith(told)) == (1, True)
        assert not Path("out").exists()
    assert local_recipe(Path("user/set")) == Path("user/set")  # a path is a path


def test_a_search_with_a_function_takes_names_of_sets_and_of_models(
    hub: HubServer, published: Repo, tmp_path: Path
) -> None:
    weights = {"w": torch.zeros(2)}
    for number in range(2):
        save_tensors(tmp_path / "model.safetensors", {"w": weights["w"] + number})
        hub.add_repo(
            f"user/m{number}", {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()}
        )

    def generate(state: Any, seeds: Sequence[int], labels: Any) -> Any:
        return state["w"] + mrl.seeded_noise(seeds, [2])

    def features(state: Any, seeds: Sequence[int], labels: Any) -> Any:
        return next(iter(state.values())).flatten()[:2] + mrl.seeded_noise(seeds, [2])

    settings: dict[str, Any] = {
        "budget": 60, "pool_size": 20, "subset_size": 5, "num_images": 10, "progress": False,
        "reference": torch.randn(40, 2, generator=torch.Generator().manual_seed(0)),
    }  # fmt: skip
    found = mrl.search(["user/m0", "user/m1"], generate=generate, out=tmp_path / "a", **settings)
    assert found.coefficients.shape[-1] == 2
    found = mrl.search("user/set", generate=features, out=tmp_path / "b", track="raw", **settings)
    assert found.coefficients.shape[-1] == 4


def test_a_run_goes_on_with_its_set_by_name(
    hub: HubServer, published: Repo, shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path,
    mergerl: Mergerl,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    config = tiny_config(Path("user/set"))
    mrl.optimize("user/set", out=run, config=config, progress=False)
    folder = local_set("user/set")
    folder.rename(tmp_path / "elsewhere")
    folder.with_name("set.json").unlink()
    err = said(mergerl("resume", run, "--checkpoints", "user/set"))
    assert "user/set: 11 files to download" in err
    assert local_set("user/set") == folder


def test_published_files_are_converted_by_name(
    hub: HubServer, mergerl: Mergerl, tmp_path: Path
) -> None:
    """Files by their names, folders by the steps that theirs say; the licence is the card's."""
    files = {"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"}
    for step in (100, 200):
        torch.save({"model": {"layer.weight": torch.full((2,), step / 1)}}, tmp_path / "file.pt")
        files[f"run-0000{step}.pt"] = (tmp_path / "file.pt").read_bytes()
    hub.add_repo("user/run", files)
    err = said(mergerl("convert", "user/run", "ckpts", "--images-per-step", 10))
    assert "user/run: 2 files to download from the Hub" in err
    opened = mrl.open_checkpoints("ckpts")
    assert (opened.nimg, opened.licence) == ([1000, 2000], "cc-by-nc-4.0")
    assert opened.read(1)["layer.weight"].tolist() == [200, 200]
    steps = {}
    for step in (1, 2):
        save_tensors(tmp_path / "file.safetensors", {"layer.weight": torch.full((2,), step / 1)})
        steps[f"checkpoint-{step}/model.safetensors"] = (tmp_path / "file.safetensors").read_bytes()
    hub.add_repo("user/steps", steps)
    mrl.convert("user/steps", "steps", images_per_step=10)
    opened = mrl.open_checkpoints("steps")
    assert (opened.names, opened.nimg) == (("checkpoint-1", "checkpoint-2"), [10, 20])


def test_a_set_of_the_hub_needs_no_conversion(published: Repo, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="user/set: a set of .safetensors already.*mergerl fetch"
    ):
        mrl.convert("user/set", tmp_path / "out")
    assert not (tmp_path / "out").exists()
