"""A small SiT set and settings of runs on it that take a second or two."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_rl.config.finetune import CurveConfig, FinetuneConfig, RolloutConfig, UpdateConfig
from merge_rl.config.optimize import RewardConfig
from merge_rl.models.sit import SiT
from merge_rl.storage.checkpoints.manifest import (
    MANIFEST_NAME,
    CheckpointEntry,
    Manifest,
    read_manifest,
    write_manifest,
)
from merge_rl.storage.checkpoints.model_file import save_checkpoint

SIT: dict[str, Any] = {
    "model": "sit", "input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 8,
    "depth": 1, "num_heads": 2, "mlp_ratio": 2.0, "class_dropout_prob": 0.1, "num_classes": 10,
    "learn_sigma": False,
}  # fmt: skip


def sit_weights(seed: int = 0) -> dict[str, Tensor]:
    """Random weights that are not the identity network of a new SiT."""
    generator = torch.Generator().manual_seed(seed)
    state = SiT(**{k: v for k, v in SIT.items() if k != "model"}).state_dict()
    drawn = {k: 0.2 * torch.randn(t.shape, generator=generator) for k, t in state.items()}
    return {**drawn, "pos_embed": state["pos_embed"]}


def write_sit_set(folder: Path, tiny: Path) -> Path:
    """Two checkpoints of a small SiT in FOLDER, with the extractor and statistics of `tiny`."""
    entries = []
    for i in (1, 2):
        file = f"raw/sit-{i}.safetensors"
        save_checkpoint(folder / file, sit_weights(i))
        entries.append(CheckpointEntry(file=file, nimg=1000 * i, track="raw"))
    defaults = read_manifest(tiny).defaults
    for source in (tiny / "evaluation").iterdir():
        target = folder / "evaluation" / source.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes())
    manifest = Manifest(
        name="small-sit", licence="MIT", model=SIT, checkpoints=tuple(entries),
        defaults=replace(defaults, sampler={"solver": "midpoint", "num_steps": 2}),
    )  # fmt: skip
    write_manifest(folder / MANIFEST_NAME, manifest)
    return folder


def small_config(model: Path, **changes: Any) -> FinetuneConfig:
    """Three steps of 4 sets of 4 images; sections are mappings that change single settings."""
    sections: dict[str, tuple[Any, dict[str, Any]]] = {
        "reward": (RewardConfig, {"pool_size": 20, "subset_size": 4, "refresh": "2"}),
        "rollout": (RolloutConfig, {"subsets": 4, "train_steps": 3}),
        "update": (UpdateConfig, {"learning_rate": 1e-3, "micro_batch": 3}),
        "curves": (
            CurveConfig,
            {
                "eval_steps": 4, "ode_solver": "euler", "every": 2, "num_images": 10,
                "final_images": 10, "repeats": 2,
            },
        ),
    }  # fmt: skip
    built = {
        name: cls(**{**fixed, **changes.pop(name, {})}) for name, (cls, fixed) in sections.items()
    }
    top = {"steps": 3, "save_every": 1, "snapshot_every": 2, "seed": 4, **changes}
    return FinetuneConfig(model=str(model), **built, **top)


def outcome_of(run: Path) -> dict[str, Any]:
    """What a run came to, by file: all but times, memory and the places of its inputs."""
    files = {str(f.relative_to(run)): f for f in run.rglob("*") if f.is_file()}
    found: dict[str, Any] = {
        name: file.read_bytes()
        for name, file in files.items()
        if name not in ("finetune.yaml", "curves.png", "report.html")
        and not name.startswith("state/")
    }
    timed = ("seconds", "images_per_second", "memory_bytes")
    found["events.jsonl"] = [{**e, **dict.fromkeys(timed)} for e in events_of(run)]
    return found


def events_of(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of events.jsonl, of one kind."""
    lines = (run / "events.jsonl").read_text().splitlines()
    events: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [event for event in events if kind is None or event["kind"] == kind]
