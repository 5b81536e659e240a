"""What trainers keep at places of their own: DeepSpeed's parts, Composer's state, counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from merge_rl.errors import CheckpointError
from merge_rl.storage.pickles import TensorRef, kind_of, shown

WHOLE: Final = "mp_rank_00_model_states.pt"  # DeepSpeed's, where one file has all weights
_PARTS: Final = "*_model_states.pt"
_OPTIMIZER: Final = "_optim_states.pt"
_PROGRAM: Final = "zero_to_fp32.py"
_HALVES: Final = ("F16", "BF16")


def deepspeed_weights(folder: Path) -> Path | None:
    """The file of a DeepSpeed folder that has all weights; None for any other folder.

    Lightning's strategy has that folder as `checkpoint/` in its own. Raises CheckpointError where
    several files have a part each.
    """
    for inner in (folder, folder / "checkpoint"):
        found = sorted(inner.glob(_PARTS))
        if found and [file.name for file in found] != [WHOLE]:
            raise CheckpointError(f"{inner}: {_parts_text(found[0].name)}")
        if found:
            return found[0]
    return None


def _parts_text(name: str) -> str:
    return (
        f"a checkpoint of DeepSpeed in parts ({name}); expected what {_PROGRAM}, which lies in the "
        "folder above, makes of them"
    )


def require_no_optimizer(path: Path) -> None:
    """Raise CheckpointError for DeepSpeed's file of an optimizer, by its name."""
    if path.name.endswith(_OPTIMIZER):
        raise CheckpointError(f"{path}: the state of an optimizer, and no weights of a network")


def require_whole(data: Mapping[str, object], path: Path) -> None:
    """Raise CheckpointError for a file of DeepSpeed that holds a part of a network."""
    module, shapes = data.get("module"), data.get("param_shapes")
    tensors = module.values() if isinstance(module, dict) and shapes is not None else ()
    # Stage 3 leaves empty tensors in the place of the weights, which lie with the optimizers.
    if any(isinstance(t, TensorRef) and 0 in t.shape for t in tensors):
        raise CheckpointError(f"{path}: {_parts_text(path.name)}")


def precision_note(path: Path, tensors: Mapping[str, TensorRef]) -> tuple[str, ...]:
    """That DeepSpeed has the weights more exactly, where those of the passes are rounded."""
    codes = {tensor.info.code for tensor in tensors.values()} & set(_HALVES)
    if not codes or not any(path.parent.glob(f"*{_OPTIMIZER}")):
        return ()
    return (f"took the weights of the passes, in {min(codes)}; {_PROGRAM} writes them in float32",)


def is_composer(data: Mapping[str, object]) -> bool:
    """Whether data is that of a checkpoint by Composer's trainer."""
    state = data.get("state")
    return isinstance(state, dict) and isinstance(state.get("model"), dict) and "timestamp" in state


def of_composer(data: Mapping[str, Any]) -> dict[str, object]:
    """Composer's weights, the average of its EMA, and its counts, where they are looked for.

    When a checkpoint is written the average is in the place of the weights, which the algorithm
    keeps meanwhile.
    """
    state = data["state"]
    found: dict[str, object] = {key: state[key] for key in state if key != "algorithms"}
    timestamp = state["timestamp"]
    counts = timestamp.get("Timestamp", timestamp) if isinstance(timestamp, dict) else {}
    if isinstance(counts, dict):
        found |= {"global_steps": counts.get("batch"), "global_samples": counts.get("sample")}
    for kept in _states_of(state.get("algorithms")):
        ema = kept.get("ema_model")
        if not isinstance(ema, dict):
            continue
        other: dict[str, object] = {}
        for part in ("named_parameters_dict", "named_buffers_dict"):
            other |= ema[part] if isinstance(ema.get(part), dict) else {}
        here, there = "model", "ema"
        if kept.get("ema_weights_active") is True:
            here, there = there, here
        found |= {here: state["model"], there: {**state["model"], **other}}
    return found


def _states_of(algorithms: object) -> list[dict[str, Any]]:
    """The states of Composer's algorithms, which are pairs with their names."""
    pairs = algorithms if isinstance(algorithms, (list, tuple)) else ()
    found = [pair[1] for pair in pairs if isinstance(pair, (list, tuple)) and len(pair) == 2]
    return [state for state in found if isinstance(state, dict)]


def is_lightning(data: Mapping[str, object]) -> bool:
    """Whether data is that of a checkpoint by Lightning's trainer."""
    return isinstance(data.get("state_dict"), dict) and (
        "pytorch-lightning_version" in data or {"epoch", "global_step"} <= data.keys()
    )


def batches_of(data: Mapping[str, object]) -> object:
    """The batches that Lightning has begun; None where data says none.

    Its steps leave out what gradients accumulate over, and are one for each optimizer.
    """
    found: object = data.get("loops")
    for key in ("fit_loop", "epoch_loop.batch_progress", "total", "ready"):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def by_place(data: object) -> object:
    """A list of state dicts and counts, as DDIM's program writes, as a mapping by their places."""
    if isinstance(data, (list, tuple)) and any(map(_holds_tensors, data)):
        return {str(place): item for place, item in enumerate(data)}
    return data


def unknown(data: object, path: Path) -> CheckpointError:
    """The refusal of what is no checkpoint, with what it is, or where in it weights lie."""
    if not isinstance(data, dict):
        found = kind_of(data)
    elif deep := list(_deep(data, "")):
        parts = " and ".join(deep[:8])
        return CheckpointError(
            f"{path}: holds tensors in {parts}; --part NAME takes those of a name"
        )
    elif any(str(key).startswith("optim") or key == "opt" for key in data):
        return CheckpointError(f"{path}: the state of an optimizer, and no weights of a network")
    else:
        keys = ", ".join([shown(key, 30) for key in data if isinstance(key, str)][:8])
        found = f"a mapping with the keys {keys or '(none)'}"
    expected = "an EDM2 snapshot or training state, or tensors by name"
    return CheckpointError(f"{path}: expected {expected}, found {found}")


def _holds_tensors(item: object) -> bool:
    return isinstance(item, dict) and any(
        isinstance(key, str) and "." in key and isinstance(value, TensorRef)
        for key, value in item.items()
    )


def _deep(data: Mapping[Any, object], place: str) -> Iterator[str]:
    """The names of mappings in mappings that hold the tensors of parts."""
    for key, item in data.items():
        if _holds_tensors(item):
            yield shown(f"{place}{key}", 60)
        elif isinstance(item, dict):
            yield from _deep(item, f"{place}{key}/")
