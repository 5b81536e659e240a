"""Damaged and hostile files for every reader: each case in a child that is watched and bounded.

A case is a function of seed, reader and number. Its child counts as failed if something of the
file runs (an audit hook, and payloads that would leave a mark), if it hangs, dies, takes more
memory than it may, leaves a half-written file, or raises an error that is not the project's own.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import merge_rl as mrl
from merge_rl.config import FinetuneConfig, OptimizeConfig, dump_config, load_config
from merge_rl.errors import MergeRLError
from merge_rl.storage.checkpoints import has_manifest, open_checkpoints, read_manifest
from merge_rl.storage.convert import convert
from merge_rl.storage.files import (
    ImageStream,
    open_images,
    read_file,
    read_index,
    read_state,
    save_tensors,
    write_png,
    write_state,
)
from merge_rl.storage.runs import RunDir, fitting, folder_kind
from merge_rl.workflows.export import Recipe
from merge_rl.workflows.reference import load_features, load_reference
from merge_rl.workflows.report import run_page

SECONDS: Final = 10  # of processor time, for one case
MEMORY: Final = 2**30  # beyond what the child begins with
MARK: Final = "EXECUTED"
HEADS: Final = 4  # of the SiT in the package
SOUND: Final = ("read", "refused", "equal", "too late", "named", "nothing lost")
_RUNS: Final = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen",
    "socket.connect", "socket.getaddrinfo", "pickle.find_class", "ctypes.dlopen", "pty.spawn",
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A kind of file: where sound ones come from, how a damaged one is read."""

    names: tuple[str, ...]  # of the corpus, see `make_corpus`; the first gives the ending
    read: Callable[[Path], object]


# ------------------------------------------------------------------------------------- corpus


def make_corpus(folder: Path) -> None:
    """A sound file of every kind, small."""
    golden = Path(__file__).parents[1] / "tests/golden"
    for name in ("tiny_snapshot", "tiny_snapshot_rgb_uncond"):
        shutil.copy(golden / f"edm2/snapshot/{name}.pkl", folder / f"{name}.pkl")
    generator = torch.Generator().manual_seed(0)
    tensors = {"a.weight": torch.randn(3, 4, generator=generator), "b": torch.ones(2)}
    data = Path(mrl.__file__).parent / "data/digits"
    for name, data_of in (("sit", _sit(data)), ("features", {"features": torch.ones(5, 3)})):
        torch.save(data_of, folder / f"{name}.pt")
        torch.save(data_of, folder / f"{name}-old.pt", _use_new_zipfile_serialization=False)
    shutil.copytree(data / "edm2", folder / "edm2")
    first = sorted((folder / "edm2/raw").iterdir())[0]
    shutil.copy(first, folder / "weights.safetensors")
    config = read_manifest(folder / "edm2").model
    (folder / "config.json").write_text(json.dumps(dict(config)))
    shutil.copy(folder / "edm2/checkpoints_manifest.yaml", folder / "manifest.yaml")
    shutil.copy(data / "evaluation/reference.safetensors", folder / "reference.safetensors")
    moments = read_file(folder / "reference.safetensors", hashed=False)[1]
    np.savez(folder / "moments.npz", mu=moments["mu"].numpy(), sigma=moments["sigma"].numpy())
    np.savez_compressed(folder / "features.npz", features=np.ones((5, 3), np.float32))
    pixels = torch.randint(0, 256, (4, 1, 8, 8), generator=generator).to(torch.uint8)
    np.savez_compressed(folder / "images.npz", images=pixels.permute(0, 2, 3, 1).numpy())
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for index, image in enumerate(pixels):
            write_png(folder / "one.png", image)
            archive.write(folder / "one.png", f"class/{index}.png")
    (folder / "settings.yaml").write_text(dump_config(OptimizeConfig(checkpoints="x")))
    (folder / "finetune.yaml").write_text(dump_config(FinetuneConfig(model="x")))
    write_state(folder / "state.safetensors", tensors, {"round": 3, "images": 40})
    event = {
        "kind": "round", "round": 0, "images": 40, "seconds": 1.0, "rewards": [1.0, None],
        "coefficients": [[0.5, 0.5]], "pool_before": 3.0, "pool_after": 2.5, "gap": 0.1,
        "rollout_seconds": 0.5, "failed": 1,
    }  # fmt: skip
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for _ in range(3)))
    weight_map = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "index.json").write_text(json.dumps(weight_map))
    opened = open_checkpoints(folder / "edm2", track="raw")
    save_tensors(folder / "bare.safetensors", opened.read(0))
    recipe = {"base": "newest", "groups": {"all": ".*"}, "dtype": "float32", "sources": [
        {"name": name, "sha256": "0" * 64, "coefficients": [0.5]} for name in opened.names
    ]}  # fmt: skip
    (folder / "merge.yaml").write_text(json.dumps(recipe))


def _sit(data: Path) -> dict[str, Any]:
    state = dict(open_checkpoints(data / "sit", track="raw").read(0))
    return {"model": state, "ema": state, "args": Namespace(num_classes=10), "train_steps": 3}


# ------------------------------------------------------------------------------------ reading


def _converted(path: Path, **options: Any) -> None:
    out = path.parent / "out"
    try:
        convert(path, out, **options)
    finally:
        _require_whole(out)


def _require_whole(out: Path) -> None:
    """No file of a refused conversion stays, no half of one under a final name."""
    if not out.exists():
        return
    for file in out.rglob("*"):
        if file.name.startswith(".") or (file.suffix == ".safetensors" and not _is_whole(file)):
            raise AssertionError(f"left behind: {file.name}")
    if has_manifest(out) and not all(check.ok for check in open_checkpoints(out).verify()):
        raise AssertionError("left behind: a manifest of damaged files")


def _is_whole(file: Path) -> bool:
    try:
        read_file(file, hashed=False)
    except MergeRLError:
        return False
    return True


def _model(path: Path) -> None:
    folder = path.parent
    name = "config.json" if path.suffix == ".json" else "model.safetensors"
    shutil.copyfile(CORPUS[0] / "config.json", folder / "config.json")
    shutil.copyfile(CORPUS[0] / "bare.safetensors", folder / "model.safetensors")
    path.replace(folder / name)
    folder_kind(folder)
    mrl.load_model(folder)


def _set(path: Path) -> None:
    folder = path.parent / "set"
    shutil.copytree(CORPUS[0] / "edm2", folder, copy_function=os.link)
    (folder / "checkpoints_manifest.yaml").unlink()
    path.replace(folder / "checkpoints_manifest.yaml")
    opened = open_checkpoints(folder)
    opened.read(0)


def _index(path: Path) -> None:
    path.replace(path.parent / "model.safetensors.index.json")
    read_index(path.parent)


def _images(path: Path) -> None:
    with ImageStream(open_images(path)) as stream:
        for _ in stream.batches(range(min(len(stream.source), 4)), 2):
            pass


def _run(path: Path) -> None:
    """Events, or a resume point, in the place they have in a run."""
    config = OptimizeConfig(checkpoints="x")
    run = RunDir.create(path.parent / "run", config, {"hashes": {}})
    target = run.events_path if path.suffix == ".jsonl" else run.state_path
    path.replace(target)
    run.events()
    run.load_state()
    with fitting(run.path, "events"):  # as the page is made; drawing it takes half a second
        run_page.run_markdown(config, run.events(), None, None)


READERS: Final[Mapping[str, Reader]] = {
    "pickle": Reader(("tiny_snapshot.pkl", "tiny_snapshot_rgb_uncond.pkl"), _converted),
    "torch zip": Reader(("sit.pt",), partial(_converted, num_heads=HEADS)),
    "torch legacy": Reader(("sit-old.pt",), partial(_converted, num_heads=HEADS)),
    "safetensors": Reader(("weights.safetensors", "reference.safetensors"), _model),
    "config": Reader(("config.json",), _model),
    "manifest": Reader(("manifest.yaml",), _set),
    "index": Reader(("index.json", "config.json"), _index),
    "reference": Reader(("reference.safetensors", "weights.safetensors"), load_reference),
    "moments": Reader(("moments.npz", "features.npz"), load_reference),
    "features": Reader(("features.npz", "moments.npz"), load_features),
    "torch features": Reader(("features.pt", "features-old.pt"), load_features),
    "images npz": Reader(("images.npz",), _images),
    "images zip": Reader(("images.zip",), _images),
    "settings": Reader(("settings.yaml",), lambda p: load_config(OptimizeConfig, p)),
    "fine-tuning settings": Reader(("finetune.yaml",), lambda p: load_config(FinetuneConfig, p)),
    "recipe": Reader(("merge.yaml",), Recipe),
    "events": Reader(("events.jsonl",), _run),
    "state": Reader(("state.safetensors",), _run),
    "state file": Reader(("state.safetensors", "weights.safetensors"), read_state),
}
CORPUS: Final[list[Path]] = []  # where it lies; one entry once it is made


# ----------------------------------------------------------------------------------- mutation

_WORDS: Final = (
    b"-1", b"0", b"1e999", b"NaN", b"Infinity", b"-Infinity", b"true", b"null", b"~", b'""', b"[]",
    b"{}", b"99999999999999999999", b"4294967296", b"2147483648", b"1.5", b"'", b'"', b"\0",
    b"\xff\xfe", b"&a [*a]", b"!!python/name:os.system", b"!!int ''", b"../../x", b"/etc/passwd",
    b"<<", b"\n---\n", b"\t", b"F64", b"BOOL", b"[[", b"-0", b"\xc3\xa9", b"x" * 300,
)  # fmt: skip


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARK}",)


_PAYLOADS: Final = (
    pickle.dumps(_Payload(), 0), pickle.dumps(_Payload(), 2), pickle.dumps(_Payload(), 4),
    b"cposix\nsystem\n(S'touch EXECUTED'\ntR.", b"(S'touch EXECUTED'\niposix\nsystem\n.",
    b"cbuiltins\neval\n(S'open(\"EXECUTED\",\"w\")'\ntR.", b"cbuiltins\nexec\n", b"cos\nsystem\n",
)  # fmt: skip


def mutate(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """A few damages, most of them where structure is: at the beginning, and in readable parts."""
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        data = draw.choice(_DAMAGES)(data, other, draw)
    return data


def _place(data: bytes, draw: random.Random) -> int:
    span = draw.choice((64, 1024, len(data)))
    place = draw.randrange(max(1, min(span, len(data))))
    return place if draw.random() < 0.7 else max(0, len(data) - 1 - place)


def _flip(data: bytes, _other: bytes, draw: random.Random) -> bytes:
    place = _place(data, draw)
    changed = bytes([data[place] ^ (1 << draw.randrange(8))]) if data else b""
    return data[:place] + changed + data[place + 1 :]


def _byte(data: bytes, _other: bytes, draw: random.Random) -> bytes:
    place = _place(data, draw)
    return (
        data[:place]
        + bytes([draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))])
        + data[place + 1 :]
    )


def _cut(data: bytes, _other: bytes, draw: random.Random) -> bytes:
    return data[: _place(data, draw)]


def _drop(data: bytes, _other: bytes, draw: random.Random) -> bytes:
    place = _place(data, draw)
    return data[:place] + data[place + draw.choice((1, 2, 8, 64, 1000)) :]


def _repeat(data: bytes, _other: bytes, draw: random.Random) -> bytes:
    place, length = _place(data, draw), draw.choice((1, 4, 30, 300))
    part = data[place : place + length]
    return data[:place] + part * draw.choice((1, 2, 50)) + data[place:]


def _word(data: bytes, _other: bytes, draw: random.Random) -> bytes:
    place, word = _place(data, draw), draw.choice(_WORDS)
    return data[:place] + word + data[place + draw.choice((0, len(word))) :]


def _splice(data: bytes, other: bytes, draw: random.Random) -> bytes:
    here, there = _place(data, draw), _place(other, draw)
    return data[:here] + other[there : there + draw.choice((8, 200, len(other)))]


def _payload(data: bytes, _other: bytes, draw: random.Random) -> bytes:
    place = _place(data, draw)
    return data[:place] + draw.choice(_PAYLOADS) + data[place:]


def _number(data: bytes, _other: bytes, draw: random.Random) -> bytes:
    """Another number, word or name in place of one that is written out."""
    places = [i for i, byte in enumerate(data[:20_000]) if 48 <= byte <= 57]
    if not places:
        return _word(data, _other, draw)
    begin = end = draw.choice(places)
    while end < len(data) and 48 <= data[end] <= 57:
        end += 1
    return data[:begin] + draw.choice(_WORDS) + data[end:]


_DAMAGES: Final = (_flip, _byte, _cut, _drop, _repeat, _word, _splice, _payload, _number, _number)


def mutated(reader: Reader, corpus: Path, draw: random.Random) -> bytes:
    """A case: damage of the file, or of what lies inside an archive or behind a header's length."""
    data = (corpus / draw.choice(reader.names)).read_bytes()
    other = (corpus / draw.choice(reader.names)).read_bytes()
    inner = draw.random() < 0.6
    if inner and data[:2] == b"PK":
        return _inside_archive(data, other, draw)
    if inner and reader.names[0].endswith(".safetensors") and len(data) > 8:
        length = int.from_bytes(data[:8], "little")
        header = mutate(data[8 : 8 + length], other[8:800], draw)
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    return mutate(data, other, draw)


def _inside_archive(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """With sound checksums: what is damaged is what the archive holds."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w") as made:
        names = archive.namelist()
        chosen = draw.choice(names)
        for name in names:
            content = archive.read(name)
            if name == chosen:
                content = mutate(content, other, draw)
            made.writestr(name, content, draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    return out.getvalue()


# ---------------------------------------------------------------------------------- a batch


def run_cases(name: str, seed: int, numbers: range, corpus: Path) -> Iterator[tuple[int, str]]:
    """(number, outcome) of each case; a child that is lost is replaced, and its case named."""
    CORPUS[:] = [corpus]
    begin = numbers.start
    while begin < numbers.stop:
        done = 0
        for done, outcome in enumerate(_in_child(name, seed, range(begin, numbers.stop)), 1):
            yield begin + done - 1, outcome
        begin += max(done, 1)


def _in_child(name: str, seed: int, numbers: range) -> Iterator[str]:
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receiving)
        try:
            _work(name, seed, numbers, sending)
        finally:
            os._exit(0)
    os.close(sending)
    count = 0
    with os.fdopen(receiving, "r") as lines:
        for line in lines:
            count += 1
            yield line.strip()
    _, status = os.waitpid(pid, 0)
    if count < len(numbers):
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        hung = number in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL)
        yield "hang" if hung else f"crash: signal {number}, status {status}"


def _work(name: str, seed: int, numbers: range, sending: int) -> None:
    reader = READERS[name]
    place = Path(tempfile.mkdtemp(prefix="case-", dir=CORPUS[0].parent))
    os.chdir(place)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.fsync = lambda fd: None  # noqa: ARG005 (nobody pulls the plug here)
    seen = list[str]()
    sys.addaudithook(lambda event, _args: seen.append(event) if event.startswith(_RUNS) else None)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    try:
        for number in numbers:
            signal.alarm(6 * SECONDS)
            spent = int(sum(os.times()[:2]))
            resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, resource.RLIM_INFINITY))
            outcome = _case(reader, f"{seed} {name} {number}", place, seen)
            os.write(sending, f"{' '.join(outcome.split())[:300]}\n".encode())
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _case(reader: Reader, key: str, place: Path, seen: list[str]) -> str:
    for item in place.iterdir():
        shutil.rmtree(item) if item.is_dir() else item.unlink()
    path = place / f"it{Path(reader.names[0]).suffix}"
    path.write_bytes(mutated(reader, CORPUS[0], random.Random(key)))
    seen.clear()
    outcome = "read"
    try:
        reader.read(path)
    except MergeRLError as error:
        outcome = "refused" if "\n" not in str(error) else f"several lines: {error!r}"
    except AssertionError as error:
        outcome = f"half-file: {error}"
    except MemoryError:
        outcome = "memory"
    except BaseException as error:  # noqa: BLE001 (what is looked for)
        last = traceback.extract_tb(error.__traceback__)
        own = [f for f in last if "merge_rl" in f.filename] or last
        outcome = (
            f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}: {error}"
        )
    if seen or (place / MARK).exists():
        outcome = f"executed: {', '.join(sorted(set(seen))) or MARK}"
    return outcome


def is_sound(outcome: str) -> bool:
    """Whether a case ended as it may."""
    return outcome in SOUND
