"""Recipes: what makes a merge again, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import merge_rl as mrl
from merge_rl.errors import CheckpointError, ConfigError, HashMismatchError, MergeRLError
from merge_rl.storage.checkpoints.checkpoint_set import CheckpointSet
from merge_rl.storage.files.atomic import save_tensors, write_yaml
from merge_rl.workflows.export.recipe import Recipe, merge_recipe, recipe_metadata

ROWS = [[0.1, -1 / 3, 0.7, 1e-17], [0.25, 0.25, 0.25, 0.25]]
GROUPS = {"encoder": r"\.enc\."}


@pytest.fixture
def raw(shared_tiny: Path) -> CheckpointSet:
    return mrl.open_checkpoints(shared_tiny, track="raw")


@pytest.fixture
def document(raw: CheckpointSet) -> dict[str, Any]:
    rows = torch.tensor(ROWS, dtype=torch.float64)
    return merge_recipe(raw, rows, base=1, groups=GROUPS)


@pytest.fixture
def written(document: dict[str, Any], tmp_path: Path) -> Callable[[], Recipe]:
    def write() -> Recipe:
        write_yaml(tmp_path / "merge.yaml", document)
        return Recipe(tmp_path / "merge.yaml")

    return write


def test_what_is_written_is_read_to_the_last_bit(
    written: Callable[[], Recipe], raw: CheckpointSet
) -> None:
    recipe = written()
    assert recipe.groups == GROUPS
    assert recipe.base == "tiny-0000200"
    assert recipe.coefficients(raw).tolist() == ROWS


def test_a_recipe_says_where_its_sources_came_from(
    document: dict[str, Any], raw: CheckpointSet
) -> None:
    assert document["version"] == 1
    source = document["sources"][2]
    assert source == {
        "name": "tiny-0000300",
        "file": "raw/tiny-0000300.safetensors",
        "source": None,
        "nimg": 307200,
        "ema_std": None,
        "sha256": raw.sha256(2),
        "coefficients": [ROWS[0][2], 0.25],
    }


def test_the_order_of_the_set_decides(
    document: dict[str, Any], written: Callable[[], Recipe], raw: CheckpointSet
) -> None:
    document["sources"].reverse()
    assert written().coefficients(raw).tolist() == ROWS


def test_checkpoints_that_are_not_named_get_nothing(
    written: Callable[[], Recipe], shared_tiny: Path, raw: CheckpointSet
) -> None:
    whole = mrl.open_checkpoints(shared_tiny)
    recipe = written()
    found = recipe.coefficients(whole)
    assert found.shape == (2, 8)
    place = [whole.names.index(name) for name in raw.names]
    assert found[:, place].tolist() == ROWS
    assert float(abs(found).sum()) == pytest.approx(float(torch.tensor(ROWS).abs().sum()))


def test_another_checkpoint_under_the_name_is_refused(
    written: Callable[[], Recipe], tiny: Path
) -> None:
    recipe = written()
    path = tiny / "raw/tiny-0000300.safetensors"
    save_tensors(path, {k: v * 0 for k, v in mrl.open_checkpoints(tiny).read(0).items()})
    other = mrl.open_checkpoints(tiny, track="raw")
    recipe.coefficients(other)
    with pytest.raises(HashMismatchError, match=r"tiny-0000300: SHA-256 is .* was made with"):
        other.hashes.compare()


def test_a_missing_checkpoint_is_refused(written: Callable[[], Recipe], shared_tiny: Path) -> None:
    others = mrl.open_checkpoints(shared_tiny, select=["tiny-0000100", "tiny-0000400"])
    with pytest.raises(CheckpointError, match="needs checkpoint 'tiny-0000200', which is missing"):
        written().coefficients(others)


def test_a_recipe_without_hashes_is_taken(
    document: dict[str, Any], written: Callable[[], Recipe], raw: CheckpointSet
) -> None:
    for source in document["sources"]:
        del source["sha256"]
    assert written().coefficients(raw).tolist() == ROWS


def test_hashes_are_read_in_either_case(
    document: dict[str, Any], written: Callable[[], Recipe], raw: CheckpointSet
) -> None:
    for source in document["sources"]:
        source["sha256"] = source["sha256"].upper()
    assert written().coefficients(raw).tolist() == ROWS
    raw.hashes.compare()


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["sources"][1].pop(key)


def put(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["sources"][1].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("sources"), "expected a merge recipe with a list of sources"),
        (lambda d: d.update(sources={"a": 1}), "expected a merge recipe with a list of sources"),
        (lambda d: d.update(sources=[]), "no sources"),
        (lambda d: d.update(sources=[3]), "expected name and coefficients of each source, found 3"),
        (lambda d: d.update(version=2), "version: expected 1, found 2"),
        (put("coefficients", [None]), r"sources\[1\]: expected name and .*, found nothing$"),
        (put("coefficients", [float("inf")]), r"of each source, found inf$"),
        (without("name"), "expected name and coefficients of each source"),
        (without("coefficients"), "expected name and coefficients of each source"),
        (put("coefficients", "0.1"), "expected name and coefficients of each source"),
        (put("coefficients", 0.1), "expected name and coefficients of each source"),
        (put("coefficients", ["much"]), "expected name and coefficients of each source"),
        (put("coefficients", [True]), "expected name and coefficients of each source"),
        (put("coefficients", [float("nan")]), "expected name and coefficients of each source"),
        (put("coefficients", [10**400]), "expected name and coefficients of each source"),
        (put("name", 1), "expected name and coefficients of each source"),
        (put("coefficients", [0.1]), "sources have different numbers of coefficients"),
        (lambda d: d["sources"].append(copy.deepcopy(d["sources"][0])), "is listed twice"),
        (lambda d: d.update(groups=["encoder"]), "groups: expected a mapping"),
        (lambda d: d.update(groups={"encoder": 3}), "groups: expected a mapping"),
        (lambda d: d.update(frozen="encoder"), "frozen: expected a list of text"),
        (lambda d: d.update(frozen=[3]), "frozen: expected a list of text"),
        (lambda d: d.update(max_shard_bytes=0), "max_shard_bytes: expected a number of bytes"),
        (lambda d: d.update(max_shard_bytes=2.5), "max_shard_bytes: expected a number of bytes"),
        (lambda d: d.update(max_shard_bytes=True), "max_shard_bytes: expected a number of bytes"),
    ],
)
def test_malformed_recipes(
    change: Callable[[dict[str, Any]], object], message: str, document: dict[str, Any],
    written: Callable[[], Recipe], raw: CheckpointSet,
) -> None:  # fmt: skip
    change(document)
    with pytest.raises(ConfigError, match=rf"merge\.yaml.*{message}"):
        written().coefficients(raw)


def test_what_a_recipe_may_leave_out(
    document: dict[str, Any], written: Callable[[], Recipe], raw: CheckpointSet
) -> None:
    assert "frozen" not in document
    plain = written()
    assert (plain.licence, plain.frozen, plain.dtype) == (None, [], "float32")
    document |= {"licence": "mit", "frozen": ["enc"], "max_shard_bytes": 1}
    full = written()
    assert (full.licence, full.frozen, full.max_shard_bytes) == ("mit", ["enc"], 1)
    rows = torch.tensor(ROWS[:1], dtype=torch.float64)
    frozen = merge_recipe(raw, rows, base=0, groups={}, frozen=["enc"])
    assert frozen["frozen"] == ["enc"]
    how = json.loads(recipe_metadata({**frozen, "groups": {}, "found": "elsewhere"})["merge"])
    assert how.keys() == {"base", "groups", "frozen", "sources"}
    assert how["sources"][1].keys() == {"name", "sha256", "coefficients"}


@pytest.mark.parametrize(
    "text", ["- 1\n", "", "sources: [", "sources: !!python/object/apply:os.getcwd []\n"]
)
def test_documents_that_are_no_recipe(text: str, tmp_path: Path) -> None:
    (tmp_path / "merge.yaml").write_text(text)
    with pytest.raises(MergeRLError, match=r"merge\.yaml: "):
        Recipe(tmp_path / "merge.yaml")
    with pytest.raises(MergeRLError, match=r"nowhere\.yaml: no such file"):
        Recipe(tmp_path / "nowhere.yaml")


def test_coefficients_that_are_not_finite_make_no_merge(
    document: dict[str, Any], written: Callable[[], Recipe], raw: CheckpointSet
) -> None:
    recipe = written()
    rows = recipe.coefficients(raw)
    rows[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="expected finite coefficients"):
        mrl.merge(raw, rows, groups=recipe.groups)
