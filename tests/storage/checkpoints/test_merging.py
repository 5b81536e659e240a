"""Merges in memory, mapped and streamed: the same bits, every file read once, faults named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from merge_rl.errors import CheckpointError, ConfigError, HashMismatchError, NonFiniteWeightsError
from merge_rl.storage.checkpoints import merging
from merge_rl.storage.checkpoints.checkpoint_set import open_checkpoints
from merge_rl.storage.checkpoints.merging import load_checkpoints, plan_merge, stream_merge
from merge_rl.storage.checkpoints.model_file import save_checkpoint
from merge_rl.storage.files.safetensors_file import TensorReader

pytestmark = pytest.mark.numerics

GROUPS = {"decoder": r"\.dec\.", "embedding": "emb_"}


def random_rows(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 18])
@pytest.mark.parametrize("threads", [1, 2])
def test_all_ways_give_the_same_bits(
    shared_tiny: Path, chunk: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_checkpoints(shared_tiny, track="raw")
    plan = plan_merge(opened, groups=GROUPS, base=opened.names[1])
    table = random_rows(2, 3, 4)
    monkeypatch.setattr(merging, "CHUNK", chunk)
    torch.set_num_threads(threads)
    try:
        streamed = dict(stream_merge(opened, plan, table))
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
    for name, outs in stream_merge(opened, plan, table):
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


def test_every_byte_of_a_tensor_is_read_once(
    shared_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_checkpoints(shared_tiny, track="raw")
    plan = plan_merge(opened)
    reads: list[tuple[str, int]] = []
    original = TensorReader.read_into

    def counting(self: TensorReader, name: str, start: int, values: Tensor) -> None:
        reads.extend((f"{self.path.name}/{name}", i) for i in range(start, start + len(values)))
        original(self, name, start, values)

    monkeypatch.setattr(TensorReader, "read_into", counting)
    monkeypatch.setattr(merging, "CHUNK", 50)
    # Five profiles at a time, and the third checkpoint has no part in any of them.
    table = random_rows(5, 1, 4)
    table[:, :, 2] = 0
    for _ in stream_merge(opened, plan, table):
        pass
    assert len(reads) == len(set(reads))
    sizes = sum(opened.tensors[name].nbytes // 2 for name in plan.merged)
    carried = sum(opened.tensors[name].nbytes // 2 for name in plan.carried)
    assert len(reads) == 3 * sizes + carried
    assert not any(name.startswith(opened.paths[2].name) for name, _ in reads)


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
        list(stream_merge(opened, plan, torch.tensor([[[3.0, 2.0]]])))
    folder = write_set(tmp_path / "bad", 1.0, 2.0)
    opened = open_checkpoints(folder)
    data = (folder / "run-1.safetensors").read_bytes()
    nan = torch.tensor([float("nan")]).numpy().tobytes()
    (folder / "run-1.safetensors").write_bytes(data[:-8] + nan + data[-4:])
    with pytest.raises(NonFiniteWeightsError, match=r"run-1.safetensors: tensor 'b' holds NaN"):
        list(stream_merge(opened, plan_merge(opened), torch.tensor([[[0.5, 0.5]]])))
    with pytest.raises(NonFiniteWeightsError, match=r"run-1.safetensors: tensor 'b' holds NaN"):
        load_checkpoints(opened, plan_merge(opened), "disk")
    # A file that has no part in the merge does no harm.
    list(stream_merge(opened, plan_merge(opened), torch.tensor([[[1.0, 0.0]]])))


def test_recorded_hashes_are_compared(tiny: Path) -> None:
    path = tiny / "raw" / "tiny-0000200.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    opened = open_checkpoints(tiny, track="raw")
    plan = plan_merge(opened)
    with pytest.raises(HashMismatchError, match="tiny-0000200"):
        list(stream_merge(opened, plan, random_rows(1, 1, 4)))
    with pytest.raises(HashMismatchError, match="tiny-0000200"):
        load_checkpoints(opened, plan, "disk")


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "cut", 1.0, 2.0)
    opened = open_checkpoints(folder)
    data = (folder / "run-1.safetensors").read_bytes()
    (folder / "run-1.safetensors").write_bytes(data[:-6])
    with pytest.raises(CheckpointError, match=r"run-1.safetensors: the file became shorter"):
        list(stream_merge(opened, plan_merge(opened), torch.tensor([[[0.5, 0.5]]])))


def test_coefficients_that_do_not_fit_are_refused(shared_tiny: Path) -> None:
    opened = open_checkpoints(shared_tiny, track="raw")
    plan = plan_merge(opened)
    for wrong in (random_rows(1, 4), random_rows(1, 2, 4), random_rows(1, 1, 3)):
        with pytest.raises(ConfigError, match=r"expected coefficients \(1, 4\), got"):
            list(stream_merge(opened, plan, wrong))
    bad = random_rows(1, 1, 4)
    bad[0, 0, 2] = float("inf")
    with pytest.raises(ConfigError, match="expected finite coefficients"):
        list(stream_merge(opened, plan, bad))
