"""Laws that hold whatever the values are, on values that hypothesis draws: always the same ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as some
from hypothesis.internal.conjecture import providers

import merge_rl as mrl
from merge_rl.config import OptimizeConfig
from merge_rl.core.distances.statistics import feature_stats, merge_stats, replace_rows
from merge_rl.core.merging import buffers as summing
from merge_rl.core.merging.buffers import weighted_sum
from merge_rl.errors import MergeRLError
from merge_rl.parallel.blocks import share_blocks, split_blocks
from merge_rl.storage.files import read_file, save_tensors, write_yaml
from merge_rl.storage.files.npz import read_array
from merge_rl.storage.pickles import read_data
from merge_rl.storage.runs import RunDir
from merge_rl.untrusted import parse_json, parse_yaml
from merge_rl.workflows.export.recipe import Recipe, merge_recipe

# What is drawn depends on the strategies alone, not on the numbers that all modules hold as well:
# hypothesis would look for those in every worker, for seconds.
vars(providers).update(is_local_module_file=lambda _path: False)

few = settings(derandomize=True, database=None, deadline=None, max_examples=30)
fewer = settings(few, max_examples=6)
SEEDS = some.integers(0, 2**32 - 1)


def whole_numbers(seed: int, most: int, *shape: int) -> torch.Tensor:
    """Whole numbers from -most to most, as float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).float()


# ------------------------------------------------------------------------------------- merging


@pytest.mark.numerics
@few
@given(
    seed=SEEDS, count=some.integers(1, 8), size=some.integers(0, 40),
    dtype=some.sampled_from([torch.float32, torch.float16, torch.float64]),
    factors=some.tuples(some.integers(-9, 9), some.integers(-9, 9)), chunk=some.integers(1, 50),
)  # fmt: skip
def test_a_merge_is_linear(
    seed: int, count: int, size: int, dtype: torch.dtype, factors: tuple[int, int], chunk: int
) -> None:
    # Weights to 2^10, coefficients to 2 * 9 * 100 < 2^11, eight terms: every sum is below 2^24, so
    # that float32 holds it exactly, and the law to the last bit, wherever it is computed.
    sources = list(whole_numbers(seed, 1000, count, size).to(dtype))
    first, second = whole_numbers(seed + 1, 100, 2, count)
    a, b = factors
    whole = summing.CHUNK
    try:
        summing.CHUNK = chunk
        merged = [weighted_sum(sources, c, torch.empty(size)) for c in (first, second)]
        both = weighted_sum(sources, a * first + b * second, torch.empty(size))
    finally:
        summing.CHUNK = whole
    assert torch.equal(both, a * merged[0] + b * merged[1])
    assert torch.equal(both, ((a * first + b * second) @ torch.stack(sources).float()))


@pytest.mark.numerics
@few
@given(some.data())
def test_one_checkpoint_alone_is_itself(data: some.DataObject) -> None:
    floats = some.floats(width=32, allow_nan=False, allow_infinity=False)
    rows = data.draw(some.lists(some.lists(floats, min_size=5, max_size=5), min_size=1, max_size=6))
    kept = data.draw(some.integers(0, len(rows) - 1))
    sources = list(torch.tensor(rows))
    merged = weighted_sum(sources, torch.eye(len(rows))[kept], torch.empty(5))
    assert torch.equal(merged, sources[kept])


@pytest.mark.numerics
@fewer
@given(
    rows=some.lists(
        some.lists(some.floats(-1e30, 1e30), min_size=4, max_size=4), min_size=2, max_size=2
    )
)
def test_a_recipe_gives_the_same_bytes(
    rows: list[list[float]], shared_tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, opened = (
        tmp_path_factory.mktemp("recipe"),
        mrl.open_checkpoints(shared_tiny, track="raw"),
    )
    groups, coefficients = {"encoder": r"\.enc\."}, np.array(rows)
    write_yaml(folder / "merge.yaml", merge_recipe(opened, coefficients, base=1, groups=groups))
    recipe = Recipe(folder / "merge.yaml")
    assert np.array_equal(recipe.coefficients(opened), coefficients)  # to the last bit
    files = [folder / "a.safetensors", folder / "b.safetensors"]
    told = []
    for file, values in zip(files, (coefficients, recipe.coefficients(opened)), strict=True):
        try:
            save_tensors(file, mrl.merge(opened, values, groups=recipe.groups))
        except MergeRLError as error:  # sums that float32 cannot hold: refused both times
            told.append(str(error))
    assert len(told) in (0, 2)
    assert told[:1] == told[1:]
    assert [file.exists() for file in files] == [not told] * 2
    assert told or files[0].read_bytes() == files[1].read_bytes()


# ------------------------------------------------------------------------------------- moments


@pytest.mark.numerics
@few
@given(seed=SEEDS, dim=some.integers(1, 5), replaced=some.integers(0, 16))
def test_moments_after_replacement_are_those_computed_anew(
    seed: int, dim: int, replaced: int
) -> None:
    count = 16  # of which sums, means, and rows about the mean are exact in float64
    rows, new = whole_numbers(seed, 64, count, dim), whole_numbers(seed + 1, 64, replaced, dim)
    before, after = feature_stats(rows), feature_stats(torch.cat([new, rows[replaced:]]))
    found = replace_rows(before, rows[:replaced], new)
    assert found.count == count
    assert torch.equal(found.mean, after.mean)
    # Rounded are the covariance before and after (one division each) and the update: a product of
    # m = 2n + 1 rows, off by at most (m + 2) u sum |a||b| however it is ordered and scaled (Higham,
    # 2002, section 3.1), and its sum with the former. Twice that, eps = 2 u, to first order.
    parts = torch.cat([new - before.mean, rows[:replaced] - before.mean])
    parts = torch.cat([parts, 4 * (after.mean - before.mean)[None]]).abs()
    products = parts.T @ parts / (count - 1)
    sizes = (2 * replaced + 3) * products + 2 * before.cov.abs() + 2 * after.cov.abs()
    assert bool(((found.cov - after.cov).abs() <= torch.finfo(torch.float64).eps * sizes).all())


@pytest.mark.numerics
@few
@given(seed=SEEDS, first=some.integers(2, 14), dim=some.integers(1, 4))
def test_moments_of_any_two_parts_are_those_of_the_whole(seed: int, first: int, dim: int) -> None:
    rows = whole_numbers(seed, 8, 16, dim)
    whole = feature_stats(rows)
    found = merge_stats(feature_stats(rows[:first]), feature_stats(rows[first:]))
    assert found.count == 16
    # About their own means no entry is above 16, nor a sum of 16 squares above 2^12; a dozen
    # roundings of numbers of that size at most, each of half of eps.
    eps = torch.finfo(torch.float64).eps
    assert float((found.mean - whole.mean).abs().max()) <= 12 * eps * 16
    assert float((found.cov - whole.cov).abs().max()) <= 12 * eps * 2**12


# -------------------------------------------------------------------------------------- blocks


@few
@given(
    counts=some.lists(some.integers(0, 300), max_size=12), limit=some.integers(1, 120),
    parts=some.integers(1, 9),
)  # fmt: skip
def test_every_image_is_made_once_whoever_makes_it(
    counts: list[int], limit: int, parts: int
) -> None:
    blocks = split_blocks(counts, limit)
    assert all(0 < block.size <= limit for block in blocks)
    made = [(b.item, i) for b in blocks for i in range(b.start, b.stop)]
    assert made == [(item, i) for item, count in enumerate(counts) for i in range(count)]
    shares = share_blocks(blocks, parts) if blocks else []
    assert [blocks[i] for share in shares for i in share] == blocks  # whole, and in order


# ------------------------------------------------------------------------------------- readers

# All that UTF-8 can encode, which hypothesis finds out letter by letter, in two seconds.
TEXT = some.text(some.characters(exclude_categories=["Cs"]), max_size=8)
PLAIN = some.recursive(
    some.none() | some.booleans() | some.integers(-(2**70), 2**70)
    | some.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def refused(read: Any, *arguments: Any, **options: Any) -> bool:
    try:
        read(*arguments, **options)
    except MergeRLError:
        return True
    return False


@few
@given(PLAIN)
def test_documents_are_read_as_they_were_written(value: Any) -> None:
    assert parse_json(json.dumps(value), "here") == value
    text = yaml.safe_dump(value, allow_unicode=True)
    assert "&id" in text or parse_yaml(text, "here") == value  # repeated lists would be aliases


@few
@given(
    seed=SEEDS, dtype=some.sampled_from(DTYPES),
    shape=some.lists(some.integers(0, 4), max_size=3), cut=some.floats(0, 1, exclude_max=True),
)  # fmt: skip
def test_arrays_are_read_whole_or_not_at_all(
    seed: int, dtype: str, shape: list[int], cut: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("arrays")
    array = np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)
    tensor = torch.from_numpy(array.copy())
    save_tensors(folder / "a.safetensors", {"a": tensor})
    np.savez_compressed(folder / "a.npz", a=array)
    torch.save({"a": tensor}, folder / "a.pt")
    readers: dict[str, Callable[[Path], Any]] = {
        "a.safetensors": lambda path: read_file(path, hashed=False)[1]["a"].numpy(),
        "a.npz": lambda path: read_array(path, "a", "biufc"),
    }
    for name, read in readers.items():
        path = folder / name
        found = read(path)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()
        data = path.read_bytes()
        path.write_bytes(data[: int(cut * len(data))])
        assert refused(read, path)
    data = (folder / "a.pt").read_bytes()
    assert not refused(read_data, folder / "a.pt")
    (folder / "a.pt").write_bytes(data[: int(cut * len(data))])
    assert refused(read_data, folder / "a.pt")


@few
@given(
    events=some.lists(some.dictionaries(some.sampled_from(["a", "b"]), PLAIN), max_size=4),
    cut=some.floats(0, 1),
)
def test_events_cut_short_are_the_first_ones(
    events: list[dict[str, Any]], cut: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("events") / "run"
    run = RunDir.create(folder, OptimizeConfig(checkpoints="x"), {"hashes": {}})
    for event in events:
        run.append_event(event)
    if events:
        data = run.events_path.read_bytes()
        run.events_path.write_bytes(data[: int(cut * len(data))])
    found = run.events()
    assert found == events[: len(found)]
    assert len(found) == len(events) or cut < 1
