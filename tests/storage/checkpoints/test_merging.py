"""Merges in memory, mapped and streamed: the same bits, every file read once, faults named."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_rl.errors import CheckpointError, ConfigError, HashMismatchError, NonFiniteWeightsError
from merge_rl.storage.checkpoints import (
    load_checkpoints,
    merge_into_memory,
    one_pass,
    open_checkpoints,
    plan_merge,
    save_checkpoint,
)
from merge_rl.storage.files.safetensors_file import TensorReader

pytestmark = pytest.mark.numerics

GROUPS = {"decoder": r"\.dec\.", "embedding": "emb_"}


def random_rows(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture(params=["with torch", "without"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves as they are where torch is loaded, and by their bits, as where it is not."""
    if request.param == "without":
        monkeypatch.setattr(one_pass, "as_numbers", lambda raw, _code: raw)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("chunk", [1, 100, 1 << 18])
@pytest.mark.parametrize("threads", [1, 2])
def test_all_ways_give_the_same_bits(
    shared_tiny: Path, chunk: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_checkpoints(shared_tiny, track="raw")
    plan = plan_merge(opened, groups=GROUPS, base=opened.names[1])
    table = random_rows(2, 3, 4)
    monkeypatch.setattr(one_pass, "PART", chunk)
    torch.set_num_threads(threads)
    try:
        streamed = merge_into_memory(opened, plan, table)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    assert list(streamed) == list(opened.tensors)
    for device in ("cpu", "disk"):
        loaded = load_checkpoints(opened, plan, device)
        for p in range(2):
            weights = loaded.weights(table[p])
            for name, outs in streamed.items():
                assert outs[p].dtype == torch.float32
                assert torch.equal(outs[p], weights[name]), (device, name)
    assert plan.carried
    base = opened.read(1)
    for name in plan.carried:
        assert torch.equal(streamed[name][0], base[name].float())


def test_what_is_frozen_stays_as_in_the_base(shared_tiny: Path) -> None:
    opened = open_checkpoints(shared_tiny, track="raw")
    plan = plan_merge(opened, base=opened.names[1], freeze=[r"\.enc\.", r"emb_noise"])
    frozen = [n for n in opened.tensors if ".enc." in n or "emb_noise" in n]
    assert frozen
    assert set(frozen) <= set(plan.carried)
    assert not set(frozen) & set(plan.merged)
    base, table = opened.read(1), random_rows(1, 1, 4)
    for name, outs in merge_into_memory(opened, plan, table).items():
        assert torch.equal(outs[0], base[name].float()) == (name in plan.carried)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nothing", "expected 'nothing' to freeze at least one tensor, got none"),
        ("(", r"expected a regular expression to freeze, got '\('"),
        (".", "takes all .* tensors; expected some to merge"),
    ],
)
def test_what_cannot_be_frozen(pattern: str, message: str, shared_tiny: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_merge(open_checkpoints(shared_tiny, track="raw"), freeze=[pattern])


@pytest.mark.parametrize("block", [1, 300, 1 << 22])
def test_every_byte_of_a_file_is_read_once(
    shared_tiny: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_checkpoints(shared_tiny, track="raw")
    plan = plan_merge(opened)
    reads: dict[Path, list[tuple[int, int]]] = {}
    original = TensorReader.fill

    def counting(self: TensorReader, target: memoryview, begin: int) -> None:
        reads.setdefault(self.path, []).append((begin, begin + len(target)))
        original(self, target, begin)

    monkeypatch.setattr(TensorReader, "fill", counting)
    monkeypatch.setattr(one_pass, "PART", 50)
    monkeypatch.setattr(one_pass, "BLOCK_BYTES", block)
    # Five profiles at a time, and the third checkpoint has no part in any of them.
    table = random_rows(5, 1, 4)
    table[:, :, 2] = 0
    names: list[tuple[int, str, int]] = []
    one_pass.merge_pass(
        opened, plan, table, lambda p, name, start, _: names.append((p, name, start)), hashed=True
    )
    assert len(names) == len(set(names))
    assert set(reads) == {opened.paths[k] for k in (0, 1, 3)}
    for path, parts in reads.items():
        # One after the other, from the first byte to the last: what was summed was hashed.
        assert [begin for begin, _ in parts] == [0, *(end for _, end in parts[:-1])]
        assert parts[-1][1] == path.stat().st_size
    for k, path in enumerate(opened.paths):
        assert opened.hashes.known(k) == hashlib.sha256(path.read_bytes()).hexdigest()
    reads.clear()
    merge_into_memory(opened, plan, table)
    # Hashes are known by now: only what is merged is read, and the carried ones of the base.
    merged = sum(opened.tensors[name].nbytes for name in plan.merged)
    carried = sum(opened.tensors[name].nbytes for name in plan.carried)
    assert sum(end - begin for parts in reads.values() for begin, end in parts) == (
        3 * merged + carried
    )


def test_files_in_other_orders_make_the_same_merge(tmp_path: Path) -> None:
    # Of one type, so that the bytes lie in the order of the names.
    generator = torch.Generator().manual_seed(0)
    for index in range(3):
        weights = {name: torch.randn(7, 3, generator=generator).half() for name in "abc"}
        weights = dict(reversed(weights.items())) if index == 1 else weights
        save_checkpoint(tmp_path / f"run-{index}.safetensors", weights)
    opened = open_checkpoints(tmp_path)
    assert opened.in_order(0) != opened.in_order(1)
    plan, row = plan_merge(opened), torch.tensor([[[0.3, -1.7, 0.9]]])
    found: dict[str, Any] = {}
    one_pass.merge_pass(
        opened, plan, row, lambda _, name, _start, values: found.update({name: values.copy()}),
        hashed=True,
    )  # fmt: skip
    expected = load_checkpoints(opened, plan).weights(row[0])
    assert all(found[name].tolist() == expected[name].flatten().tolist() for name in "abc")
    for k, path in enumerate(opened.paths):
        assert opened.hashes.known(k) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("spoilt", ["sources", "both"])
def test_halves_that_are_not_finite_are_named(tmp_path: Path, spoilt: str) -> None:
    # Integer operations take the infinity of a half for 65536: it is looked for by its bits.
    for index, value in enumerate((1.0, float("-inf"))):
        weights = {name: torch.full((3,), index + 1.0).half() for name in "ab"}
        save_checkpoint(tmp_path / f"run-{index}.safetensors", weights)
        data = (tmp_path / f"run-{index}.safetensors").read_bytes()
        bits = torch.tensor([value if spoilt == "sources" else float("nan")]).half()
        (tmp_path / f"run-{index}.safetensors").write_bytes(data[:-2] + bits.numpy().tobytes())
    opened = open_checkpoints(tmp_path)
    bad = "run-1" if spoilt == "sources" else "run-0"
    with pytest.raises(NonFiniteWeightsError, match=f"{bad}.* tensor 'b' holds NaN or infinity"):
        merge_into_memory(opened, plan_merge(opened), [[[0.5, 0.5]]])


def write_set(folder: Path, *values: float) -> Path:
    for index, value in enumerate(values):
        tensors = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[value], [3.0]])}
        torch_save = {name: tensor.float() for name, tensor in tensors.items()}
        save_checkpoint(folder / f"run-{index}.safetensors", torch_save)
    return folder


def test_overflow_and_bad_files_are_named(tmp_path: Path) -> None:
    opened = open_checkpoints(write_set(tmp_path / "big", 1e38, 2e38))
    plan = plan_merge(opened)
    with pytest.raises(NonFiniteWeightsError, match="'b' of the merge overflows float32"):
        merge_into_memory(opened, plan, torch.tensor([[[3.0, 2.0]]]))
    folder = write_set(tmp_path / "bad", 1.0, 2.0)
    opened = open_checkpoints(folder)
    data = (folder / "run-1.safetensors").read_bytes()
    nan = torch.tensor([float("nan")]).numpy().tobytes()
    (folder / "run-1.safetensors").write_bytes(data[:-8] + nan + data[-4:])
    with pytest.raises(NonFiniteWeightsError, match=r"run-1.safetensors: tensor 'b' holds NaN"):
        merge_into_memory(opened, plan_merge(opened), torch.tensor([[[0.5, 0.5]]]))
    with pytest.raises(NonFiniteWeightsError, match=r"run-1.safetensors: tensor 'b' holds NaN"):
        load_checkpoints(opened, plan_merge(opened), "disk")
    # A file that has no part in the merge does no harm.
    merge_into_memory(opened, plan_merge(opened), torch.tensor([[[1.0, 0.0]]]))


def test_recorded_hashes_are_compared(tiny: Path) -> None:
    path = tiny / "raw" / "tiny-0000200.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    opened = open_checkpoints(tiny, track="raw")
    plan = plan_merge(opened)
    with pytest.raises(HashMismatchError, match="tiny-0000200"):
        merge_into_memory(opened, plan, random_rows(1, 1, 4))
    with pytest.raises(HashMismatchError, match="tiny-0000200"):
        load_checkpoints(opened, plan, "disk")


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "cut", 1.0, 2.0)
    opened = open_checkpoints(folder)
    data = (folder / "run-1.safetensors").read_bytes()
    (folder / "run-1.safetensors").write_bytes(data[:-6])
    with pytest.raises(CheckpointError, match=r"run-1.safetensors: the file became shorter"):
        merge_into_memory(opened, plan_merge(opened), torch.tensor([[[0.5, 0.5]]]))


def test_coefficients_that_do_not_fit_are_refused(shared_tiny: Path) -> None:
    opened = open_checkpoints(shared_tiny, track="raw")
    plan = plan_merge(opened)
    for wrong in (random_rows(1, 4), random_rows(1, 2, 4), random_rows(1, 1, 3)):
        with pytest.raises(ConfigError, match=r"expected coefficients \(1, 4\), got"):
            merge_into_memory(opened, plan, wrong)
    bad = random_rows(1, 1, 4)
    bad[0, 0, 2] = float("inf")
    with pytest.raises(ConfigError, match="expected finite coefficients"):
        merge_into_memory(opened, plan, bad)
