"""Names of files: their order, which hold weights, what their network is called."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from decimal import Decimal
from pathlib import Path, PurePath
from typing import Final, TypeVar

from merge_rl.storage.files.shards import DIFFUSERS_STEM, INDEX_NAME, INDEX_SUFFIX, MODEL_NAME

T = TypeVar("T")
SUFFIX: Final = ".safetensors"
# The ends of names of what `mergerl convert` reads.
CONVERTED: Final = (".pkl", ".pt", ".pth", ".pth.tar", ".ckpt", ".bin")
PARTS: Final = ("unet", "transformer", "unet_ema", "transformer_ema")  # diffusers' folders
# A training program's folder: checkpoint-500, global_step500, epoch=1-step=500, ckpt_5e4, 500.
SAVED: Final = re.compile(
    r"[0-9]{1,12}|(?:(?:[a-z]+[-_])?(?:checkpoint|ckpt|step|epoch|iter(?:ation)?)"
    r"[-_=]?[0-9]+(?:e[0-9]+)?[km]?[-_]?)+",
    re.IGNORECASE,
)
# In the folder of a checkpoint alone: the folder of one model is called by its files elsewhere.
SHARED: Final = (MODEL_NAME, INDEX_NAME, "adapter_model.safetensors")
PLAIN: Final = (f"{DIFFUSERS_STEM}{SUFFIX}", f"{DIFFUSERS_STEM}{INDEX_SUFFIX}")


def network_name(path: PurePath) -> str:
    """What a network is called by its file: the stem, or the folder of files that have one name.

    "checkpoint-500/unet/diffusion_pytorch_model.safetensors" is "checkpoint-500".
    """
    folders = [part for part in path.parent.parts if part not in PARTS]
    fixed = path.name in PLAIN or (path.name in SHARED and folders and SAVED.fullmatch(folders[-1]))
    named = fixed and folders and folders[-1] not in ("/", "..")
    return folders[-1] if named else weights_stem(path.name)


def in_series(folder: PurePath) -> bool:
    """Whether a folder is, by its name, one of several: of a checkpoint, or of a network in it."""
    return folder.name in PARTS or SAVED.fullmatch(folder.name) is not None


def averaged(path: PurePath) -> bool:
    """Whether the folder says that it holds an average (`unet_ema`)."""
    return path.parent.name in PARTS and path.parent.name.endswith("_ema")


def is_weights_name(name: str) -> bool:
    """Whether a name is that of a `.safetensors`, in letters of either case, or of an index."""
    return name.endswith(INDEX_SUFFIX) or name.lower().endswith(SUFFIX)


def weights_stem(name: str) -> str:
    """A name without the ending of a `.safetensors` or of an index."""
    plain = name.removesuffix(INDEX_SUFFIX)
    return plain[: -len(SUFFIX)] if plain.lower().endswith(SUFFIX) else plain


def reference_file(path: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """The file of PATH or PATH.pkl#ENTRY, and the entry."""
    text = os.fspath(path)
    stem, mark, entry = text.rpartition("#")
    if mark and stem.lower().endswith(".pkl") and not Path(text).exists():
        return Path(stem), entry
    return Path(text), None


# Such as 1e6, 1.5M, 16Ki or 500kimg: words of their own, or after one that says what is counted
# (step500k), as 12e5f may well be a hash and s1e10 an epoch.
_COUNTED = ("step", "steps", "iter", "it", "ckpt", "checkpoint", "img", "nimg", "net", "model")
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_BEGIN = "|".join(["(?<![0-9A-Za-z.])", *(rf"(?<=\b{w})|(?<=_{w})" for w in _COUNTED)])
_SCALED = (
    rf"(?:(?i:{_BEGIN}))[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{{1,2}}|[kKMG]i?|[mB])"
    r"(?=(?i:imgs?|images?|steps?)?(?![0-9A-Za-z]))"
)
_NUMBER = re.compile(rf"({_SCALED}|(?<![0-9.])0\.[0-9]+|[0-9]+)")  # 1.10 may well be a version
_ANY_NUMBER = re.compile(rf"{_SCALED}|[0-9]+(?:\.[0-9]+)?")
_SCORES = re.compile(
    r"(loss|fid|kid|mse|score|acc(uracy)?)[-_=]?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?", re.IGNORECASE
)
# Without a word before it, where a whole number follows: ckpt_0.001234_30000.
_FRACTION = re.compile(r"(?<![0-9A-Za-z.])[0-9]+\.[0-9]{4,}(?=[-_][0-9]+$)")
_THOUSANDS = re.compile(r"(?<![0-9.])(?<![0-9]_)[1-9][0-9]{0,2}(?:_[0-9]{3})+(?![0-9.]|_[0-9])")
_WORDS = re.compile(r"(?<![a-z])(best|last|latest|final)(?![a-z])", re.IGNORECASE)

_Parts = list[tuple[int, str, str]]
Key = tuple[_Parts, str]


def natural_key(name: str) -> Key:
    """Sorts "step_750" before "step_2000": numbers by value, the rest as text.

    Numbers are whole, between 0 and 1 ("ema-0.050" comes before "ema-0.1"), or words of their own
    with an exponent or unit (1e6, 1.5M, 500k, 16Ki), in the digits of any script. Names of the same
    numbers keep the order of text.
    """
    return _parts(name), name


def training_key(name: str) -> tuple[int, _Parts, Key]:
    """Sorts files of one training naturally, but "best" first and "last" or "final" last.

    These words, where no number says more, are of no place in the order of text. A score
    ("loss=0.2-step=500", "0.0123_500") and the case of letters count where all else is equal.
    """
    word = None if any(map(str.isdecimal, name)) else _WORDS.search(name)
    place = 1 if word is None else 0 if word[1].lower() == "best" else 2
    parts = [
        (size, text.lower(), more)
        for size, text, more in _parts(_FRACTION.sub("", _SCORES.sub("", name)))
    ]
    return place, parts, natural_key(name)


def in_training_order(items: Iterable[T], name_of: Callable[[T], str]) -> list[T]:
    """Files of one training by `training_key` of their names, thousands as one number."""
    found = list(items)
    joined = with_thousands(map(name_of, found))
    return sorted(found, key=lambda item: training_key(joined[name_of(item)]))


def with_thousands(names: Iterable[str]) -> dict[str, str]:
    """Name -> itself, without what sets thousands apart: "step_1_000" beside "step_900".

    So only where it makes a series of names that else are none, no number has more than three
    digits, and no name goes on where another ends ("run_1", "run_1_500"): else two numbers may be
    meant, and names stay as they are.
    """
    plain = {name: name for name in names}
    joined = {name: _THOUSANDS.sub(lambda m: m[0].replace("_", ""), name) for name in plain}
    kinds, whole = ({without_numbers(n) for n in of.values()} - {*of} for of in (plain, joined))
    long = any(len(digits) > 3 for name in plain for digits in re.findall("[0-9]+", name))
    ends = (name[: cut.start()] for name in plain for cut in re.finditer("_(?=[0-9])", name))
    apart = len(kinds) > 1 == len(whole) and not long and plain.keys().isdisjoint(ends)
    return joined if apart else plain


def without_numbers(name: str) -> str:
    """What names of one series share: "step_750" and "step_2000" are both "step_#"."""
    return _ANY_NUMBER.sub("#", name)


def of_series(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Of other names those that differ from one of `names`, and from all, in their numbers."""
    known = set(names)
    series = {without_numbers(name) for name in known} - known
    return [name for name in others if name not in known and without_numbers(name) in series]


def is_convertible(name: str) -> bool:
    """Whether a name is that of a file which `mergerl convert` reads."""
    return name.lower().endswith(CONVERTED)


def convertible(folder: Path) -> list[Path]:
    """The files in a folder that by their names `mergerl convert` reads, in their natural order."""
    found = (f for f in folder.iterdir() if is_convertible(f.name) and f.is_file())
    return sorted(found, key=lambda file: natural_key(file.stem))


_UNFINISHED: Final = (".part", ".crdownload", ".download", ".partial", ".incomplete", ".aria2")


def left_out(folder: Path, files: Iterable[Path]) -> list[str]:
    """A sentence each on what lies beside the files of a set, and is none of them."""
    found = (item.name for item in folder.iterdir() if item.suffix.lower() in _UNFINISHED)
    cut = sorted((n for n in found if is_weights_name(PurePath(n).stem)), key=natural_key)
    shown = ", ".join(cut[:3]) + " ..." * (len(cut) > 3)
    told = [f"{folder}: left out {shown}, whose download is not finished"] if cut else []
    return [*told, *filter(None, [_left_to_convert(folder, files)])]


def _left_to_convert(folder: Path, files: Iterable[Path]) -> str:
    """A sentence on what is of a series, but to be converted; or "".

    Other formats beside the `.safetensors` of a series, or beside one of a finished training the
    folders of its checkpoints (`checkpoint-500/`).
    """
    files, whole = list(files), "all"
    names = [file.name for file in convertible(folder)]
    found = {PurePath(name.removesuffix(".tar")).stem: name for name in names}
    left = sorted(of_series([weights_stem(file.name) for file in files], found), key=natural_key)
    if not left and len(files) == 1 and files[0].parent == folder:
        inner = (item for item in folder.iterdir() if SAVED.fullmatch(item.name))
        homes = [item.name for item in inner if any(item.glob("**/*.safetensors"))]
        left, found, whole = sorted(homes, key=natural_key), {n: n for n in homes}, "these"
    if not left:
        return ""
    shown = ", ".join(found[stem] for stem in left[:3]) + " ..." * (len(left) > 3)
    made = f"`mergerl convert` makes a set of {whole}"
    return f"{folder}: left out {shown}, of the same series; {made}"


def _parts(name: str) -> _Parts:
    """The texts and the numbers of a name in turn."""
    parts = _NUMBER.split(_western(name))
    return [_value(part) if i % 2 else (0, part, "") for i, part in enumerate(parts)]


def _western(name: str) -> str:
    """With digits of other scripts as 0 to 9."""
    if name.isascii():
        return name
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in name)


def _value(number: str) -> tuple[int, str, str]:
    """Of any length: by length first, leading zeros aside, then by digits, is by value."""
    if not number[-1].isdigit():
        plain = number.rstrip("kKmMGBi")
        scaled = Decimal(plain) * _UNITS[number[len(plain) :].lower()]
        number = format(scaled.normalize(), "f")
    elif "e" in number.lower():
        number = format(Decimal(number), "f")
    whole, _, fraction = number.partition(".")
    return len(whole.lstrip("0")), whole.lstrip("0"), fraction
