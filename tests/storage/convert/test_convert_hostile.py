"""Files made to do harm: nothing in them runs, nothing half-written stays, and an end is near."""

from __future__ import annotations

import io
import pickle
import pickletools
import random
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_rl.errors import CheckpointError, MergeRLError, RunError
from merge_rl.storage.convert.edm2 import is_snapshot, read_snapshot
from merge_rl.storage.convert.run import convert
from merge_rl.storage.convert.sources import extract
from merge_rl.storage.pickles.reading import read_data
from tests.children import largest_file

SNAPSHOTS = ["tiny_snapshot", "tiny_snapshot_legacy_names", "tiny_snapshot_rgb_uncond"]


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def stack_global(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that exists if a payload ran."""
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists(), "the payload was executed"


def old_style(module: str, name: str, *args: bytes) -> bytes:
    """A call by GLOBAL and REDUCE."""
    return f"c{module}\n{name}\n(".encode() + b"".join(args) + b"tR."


# Every way in which a pickle can reach a callable, with the name that it asks for.
Payload = Callable[[str], bytes]
PAYLOADS: dict[str, tuple[str, Payload]] = {
    "GLOBAL REDUCE": ("os.system", lambda c: old_style("os", "system", text(c))),
    "STACK_GLOBAL REDUCE": (
        "os.system",
        lambda c: b"\x80\x04" + stack_global("os", "system") + text(c) + b"\x85R.",
    ),
    "INST": ("os.system", lambda c: b"(" + text(c) + b"ios\nsystem\n."),
    "OBJ": ("os.system", lambda c: b"(cos\nsystem\n" + text(c) + b"o."),
    "NEWOBJ": ("subprocess.Popen", lambda c: b"csubprocess\nPopen\n(" + text(c) + b"t\x81."),
    "NEWOBJ_EX": (
        "subprocess.Popen",
        lambda c: b"csubprocess\nPopen\n()}" + text("args") + text(c) + b"s\x92.",
    ),
    "BUILD": (
        "shelve.Shelf",
        lambda c: b"cshelve\nShelf\n)\x81}" + text("dict") + text(c) + b"sb.",
    ),
    "eval": ("builtins.eval", lambda c: old_style("builtins", "eval", text(f"os.system({c!r})"))),
    "getattr": (
        "builtins.getattr",
        lambda c: old_style("builtins", "getattr", b"cos\npath\n", text("os")),
    ),
    "dotted": (
        "torch.storage._load_from_bytes.__globals__",
        lambda c: stack_global("torch.storage", "_load_from_bytes.__globals__") + b".",
    ),
    "submodule": (
        "torch._utils.os.system",
        lambda c: stack_global("torch._utils", "os.system") + b".",
    ),
    "torch.load": ("torch.load", lambda c: old_style("torch", "load", text(c))),
    "numpy.load": ("numpy.load", lambda c: old_style("numpy", "load", text(c))),
    "import": (
        "evil_module_of_a_test.attribute",
        lambda c: b"cevil_module_of_a_test\nattribute\n.",
    ),
    "lookalike": ("ｏs.system", lambda c: stack_global("ｏs", "system") + b"."),
    "with a null": ("os?.system", lambda c: stack_global("os\0", "system") + b"."),
    "terminal codes": ("?[31mos.system", lambda c: stack_global("\x1b[31mos", "system") + b"."),
}
UNNAMED: dict[str, bytes] = {
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "name from data": b"(NNt\x93.",
    "call of text": text("os.system") + b")R.",
    "call of a number": b"K\x01)R.",
    "a name called that may only be mentioned": b"ctorch\nHalfStorage\n)R.",
    "a record called": b"cargparse\nNamespace\n)\x81)R.",
}


def wrapped(payload: bytes) -> dict[str, bytes]:
    """The payload as a file, in a block of a tensor, and as the pickle of an archive."""
    block = b"\x80\x04ctorch.storage\n_load_from_bytes\n(B" + len(payload).to_bytes(4, "little")
    whole = io.BytesIO()
    torch.save([1], whole, _use_new_zipfile_serialization=False)
    prologue = whole.getvalue()[: whole.getvalue().index(b"]q\x00K\x01a.") - 2]
    inner = prologue + payload
    block_after = block[:-4] + len(inner).to_bytes(4, "little")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a/data.pkl", payload)
        file.writestr("a/version", b"3\n")
    return {
        "file": payload,
        "first of a block": block + payload + b"tR.",
        "object of a block": block_after + inner + b"tR.",
        "older file": inner,
        "archive": archive.getvalue(),
        "in a snapshot": b"}(" + text("encoder") + payload[:-1] + text("ema") + b"Nu.",
    }


@pytest.mark.parametrize("place", wrapped(b"N."))
@pytest.mark.parametrize("way", PAYLOADS)
def test_nothing_is_executed_and_the_name_is_told(
    way: str, place: str, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_module_of_a_test.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    name, payload = PAYLOADS[way]
    source = tmp_path / "a.pkl"
    source.write_bytes(wrapped(payload(f"touch {marker}"))[place])
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out")
    message = str(caught.value)
    assert f"refers to '{name}', which is not among the names" in message
    assert message.isprintable()
    assert not (tmp_path / "out").exists()
    assert "evil_module_of_a_test" not in sys.modules


@pytest.mark.parametrize("place", wrapped(b"N."))
@pytest.mark.parametrize("way", UNNAMED)
def test_other_ways_to_a_callable_are_refused(way: str, place: str, tmp_path: Path) -> None:
    source = tmp_path / "a.pkl"
    source.write_bytes(wrapped(UNNAMED[way])[place])
    with pytest.raises(CheckpointError, match="not readable as data|refers to|not a block"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_records_have_no_methods_of_their_class(marker: Path) -> None:
    # A permitted class whose __setstate__ or __reduce__ would matter to the standard reader.
    state = b"}" + text("__setstate__") + text(f"touch {marker}") + b"s"
    found: Any = read_data(b"cargparse\nNamespace\n)\x81" + state + b"b.")
    assert found.state == {"__setstate__": f"touch {marker}"}
    assert "__setstate__" not in vars(found)
    with pytest.raises(CheckpointError, match="is given twice"):
        read_data(b"cargparse\nNamespace\n)\x81" + state + b"b" + state + b"b.")


AUDIT = """
import sys
from pathlib import Path
from merge_rl.errors import CheckpointError
from merge_rl.storage.convert.sources import extract
golden, hostile = map(Path, sys.argv[1:])
extract(golden)  # whatever is imported on first use is by now
seen = []
watch = ("import", "exec", "compile", "pickle.", "os.system", "subprocess", "marshal", "code.")
sys.addaudithook(lambda what, args: seen.append((what, args)) if what.startswith(watch) else None)
found = extract(golden)[0]
assert len(found.tensors) > 50
try:
    extract(hostile)
except CheckpointError as error:
    print(error)
print(seen)
"""


def test_no_import_no_code_and_no_unpickler_is_used(golden: Path, tmp_path: Path) -> None:
    # Python itself reports whatever imports, compiles or runs code, or resolves a pickled name.
    (tmp_path / "a.pkl").write_bytes(PAYLOADS["GLOBAL REDUCE"][1]("true"))
    arguments = [golden / "edm2/snapshot/tiny_snapshot.pkl", tmp_path / "a.pkl"]
    ended = subprocess.run(
        [sys.executable, "-c", AUDIT, *map(str, arguments)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "'os.system'" in ended.stdout.splitlines()[0]
    assert ended.stdout.splitlines()[1] == "[]"


# ------------------------------------------------------------------------------ a disk runs full


@pytest.mark.parametrize("size", [0, 1000, 20_000, 370_000])
def test_a_full_disk_leaves_nothing_under_a_final_name(
    size: int, golden: Path, tmp_path: Path
) -> None:
    out, source = tmp_path / "out", golden / "edm2/snapshot/tiny_snapshot.pkl"
    with largest_file(size), pytest.raises(CheckpointError) as caught:
        convert(source, out)
    assert (
        str(caught.value)
        == f"{out / 'tiny_snapshot.safetensors'}: cannot be written: File too large"
    )
    assert not out.exists()
    assert len(convert(source, out).written) == 1


def test_a_full_disk_keeps_what_was_finished(golden: Path, tmp_path: Path) -> None:
    folder, out = golden / "edm2/snapshot", tmp_path / "out"
    convert(folder / "tiny_snapshot.pkl", out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with largest_file(100_000), pytest.raises(CheckpointError, match="File too large"):
        convert([folder / "tiny_snapshot.pkl", folder / "tiny_snapshot_legacy_names.pkl"], out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_folder_that_cannot_be_made(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written: Not a directory"):
        convert(golden / "edm2/snapshot/tiny_snapshot.pkl", tmp_path / "file/out")


# ------------------------------------------------------------------------------------- fuzzing


class Mutator:
    """Damages a file at random, mostly where its instructions are."""

    def __init__(self, data: bytes, seed: int) -> None:
        self.data, self.random = data, random.Random(seed)
        self.places = [place for *_, place in pickletools.genops(data) if place is not None]

    def place(self) -> int:
        if self.random.random() < 0.1:
            return self.random.randrange(len(self.data))
        # All kinds of instructions occur early; what comes later repeats them.
        return self.random.choice(self.places[: self.random.choice([200, 1000, len(self.places)])])

    def noise(self, *sizes: int) -> bytes:
        return self.random.randbytes(self.random.choice(sizes))

    def mutate(self) -> bytes:
        data, at, pick = bytearray(self.data), self.place(), self.random.choice
        kind = pick(["bit", "byte", "delete", "insert", "cut", "swap", "length", "copy", "move"])
        if kind == "bit":
            data[at] ^= 1 << self.random.randrange(8)
        elif kind == "byte":
            data[at] = self.random.randrange(256)
        elif kind == "delete":
            del data[at : at + pick([1, 2, 9, 500])]
        elif kind == "insert":
            data[at:at] = self.noise(1, 2, 9)
        elif kind == "cut":
            del data[at:]
        elif kind == "swap":  # one instruction for another
            data[at] = self.data[pick(self.places)]
        elif kind == "length":  # the size that follows an instruction
            data[at + 1 : at + 5] = pick([b"\xff" * 4, b"\xff\xff\xff\x7f", bytes(4), b"\0\0\1\0"])
        elif kind == "copy":
            begin = self.place()
            data[at:at] = self.data[begin : begin + pick([1, 10, 300])]
        else:
            begin = self.place()
            data[at : at + 8] = self.data[begin : begin + 8]
        return bytes(data)


def refusal(data: bytes) -> str | None:
    """Read a mutated file with all its tensors; why it was refused, None if it was not."""
    path = Path("mutated.pkl")
    try:
        value = read_data(data, path.name)
        if isinstance(value, dict) and is_snapshot(value):
            found = read_snapshot(value, path)
            for tensor in found.tensors.values():
                assert sum(map(len, tensor.pieces(2**20))) == tensor.nbytes
    except MergeRLError as error:
        return str(error)
    return None


@pytest.mark.parametrize("seed", range(6))
def test_mutated_snapshots_are_refused_or_read(seed: int, golden: Path) -> None:
    mutator = Mutator((golden / f"edm2/snapshot/{SNAPSHOTS[seed % 3]}.pkl").read_bytes(), seed)
    outcomes: list[str | None] = []
    slowest = 0.0
    for _ in range(90):
        began = time.process_time()
        outcomes.append(refusal(mutator.mutate()))
        slowest = max(slowest, time.process_time() - began)
    # Most damage is noticed; a changed weight or name may not be.
    refusals = [why for why in outcomes if why is not None]
    assert len(outcomes) / 2 < len(refusals) < len(outcomes)
    assert all(10 < len(why) < 1000 for why in refusals)
    assert slowest < 10


def small_archive() -> bytes:
    buffer = io.BytesIO()
    layer = torch.nn.Linear(3, 2)
    torch.save(
        {"model": layer.state_dict(), "opt": {"state": {0: {"step": torch.ones(1)}}}}, buffer
    )
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["archive", "pickle"])
def test_small_mutated_files_are_refused_or_read(form: str) -> None:
    # Every place of a small file, so that no instruction of it is missed.
    value = {"a": torch.ones(3), "b": [1, 2.5, "text", b"bytes", {3}, (None, True)]}
    data = small_archive() if form == "archive" else pickle.dumps(value, 4)
    rng, refusals = random.Random(0), []
    places = sorted(rng.sample(range(len(data)), min(len(data), 900)))
    for at in places:
        for change in (bytes([rng.randrange(256)]), b"", rng.randbytes(3)):
            mutated = data[:at] + change + data[at + 1 :]
            try:
                read_data(mutated, "small.pt")
            except MergeRLError as error:
                refusals.append(str(error))
    assert 0 < len(refusals) < 3 * len(places)
    assert all(len(why) < 1000 for why in refusals)


def test_fuzzing_stays_within_little_memory(golden: Path) -> None:
    data = (golden / "edm2/snapshot/tiny_snapshot.pkl").read_bytes()
    mutator = Mutator(data, 99)
    tracemalloc.start()
    try:
        for _ in range(60):
            refusal(mutator.mutate())
        # The copy that is mutated, its bytes, and what is made of them.
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20 + 10 * len(data)
    finally:
        tracemalloc.stop()


def test_mutated_files_leave_whole_outputs_or_none(golden: Path, tmp_path: Path) -> None:
    mutator = Mutator((golden / "edm2/snapshot/tiny_snapshot.pkl").read_bytes(), 7)
    written = 0
    for i in range(60):
        source, out = tmp_path / f"{i}.pkl", tmp_path / f"out{i}"
        source.write_bytes(mutator.mutate())
        try:
            result = convert(source, out, workers=1)
        except MergeRLError:
            # A tensor that is found to hold NaN leaves the empty folder it was to go into.
            assert not out.exists() or list(out.iterdir()) == []
        else:
            written += len(result.written)
            assert sorted(file.suffix for file in out.iterdir()) == [".safetensors", ".yaml"]
            assert extract(result.written[0])[0].nbytes > 0
    assert written > 0
    assert not list(tmp_path.rglob(".tmp*"))
