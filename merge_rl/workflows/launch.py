"""A search over the processes of a launch: devices, equal inputs, and going on after a restart."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from merge_rl.config import AUTO_BATCH, OptimizeConfig, to_mapping
from merge_rl.config.finetune import FinetuneConfig
from merge_rl.errors import ConfigError, RunError
from merge_rl.parallel import Group, Place
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.storage.runs import RunDir
from merge_rl.version import __version__
from merge_rl.workflows.assemble import Job
from merge_rl.workflows.crew import Crew, require_agreement
from merge_rl.workflows.devices import require_device
from merge_rl.workflows.memory_plan import fit_batch

LAUNCH_NAME: Final = "launch.json"
# Where inputs lie may differ from machine to machine; what they hold is compared by hash.
PATHS: Final = (
    "checkpoints", "model", "extractor_weights", "reference", "heldout", "extra_references",
    "extra_weights", "autoencoder_weights",
)  # fmt: skip


def own_device(device: str, place: Place, count: int | None = None) -> str:
    """The device of one process: "cuda" means another GPU for every process of a machine.

    `count` is the number of GPUs, by default that of this machine. Raises ConfigError for one GPU
    shared by several processes.
    """
    if device.partition(":")[0] != "cuda" or place.size == 1:
        return device
    if ":" in device and device != f"cuda:{place.local_rank}":
        raise ConfigError(
            f"expected --device cuda with several processes, got {device}: each takes a GPU of "
            "its own"
        )
    count = torch.cuda.device_count() if count is None else count
    if place.local_rank >= count:
        raise ConfigError(
            f"expected a GPU for every process of a machine, found {count} GPUs for process "
            f"{place.local_rank + 1}; start fewer with --nproc-per-node"
        )
    return f"cuda:{place.local_rank}"


def device_facts(device: str) -> dict[str, Any]:
    """What of a device decides how sums round and how much fits: equal on all ranks."""
    if torch.device(device).type == "cuda":  # pragma: no cover (needs a GPU)
        found = torch.cuda.get_device_properties(device)
        return {"name": found.name, "memory": found.total_memory}
    return {
        "name": device,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def require_same_everywhere(
    group: Group, settings: Mapping[str, Any], hashes: Mapping[str, Any], device: str
) -> None:
    """Raise ParallelError unless all ranks have the same version, settings, inputs and device."""
    known = {k: v for k, v in settings.items() if k not in PATHS}
    known["sampler"] = {k: v for k, v in (settings["sampler"] or {}).items() if k != "guide"}
    facts = {
        "version": __version__, "torch": torch.__version__, "settings": known,
        "hashes of": hashes, "device": device_facts(device),
    }  # fmt: skip
    if group.size > 1:
        require_agreement(group, facts)


def gather_crew(
    group: Group,
    config: OptimizeConfig,
    job: Job,
    device: str,
    announce: Callable[[str], None],
) -> Crew:
    """The crew of a search, after all ranks were seen to have the same of everything.

    Raises ParallelError for ranks of another version, other settings or inputs, or unequal
    devices.
    """
    require_same_everywhere(group, to_mapping(config), job.hashes, device)
    return Crew(group, (job.rollout, job.final_rollout), announce)


def goes_on(out: str | os.PathLike[str], place: Place) -> bool:
    """Whether the run at `out` was begun by this launch: by a process that was restarted since."""
    run = RunDir(out)
    if not run.path.is_dir():
        return False
    recorded = run.read(LAUNCH_NAME) or {}
    return place.restarts > 0 or (place.job is not None and recorded.get("job") == place.job)


Run = TypeVar("Run")


def begin(
    out: str | os.PathLike[str], hashes: Mapping[str, Any], place: Place,
    *, reopen: Callable[[], Run], create: Callable[[], Run], files: Callable[[Run], RunDir],
) -> Run:  # fmt: skip
    """A run of any kind: new, or that of the same launch before it was restarted.

    `reopen` raises for a directory of other settings, `create` for one that exists; RunError for
    other inputs.
    """
    if goes_on(out, place):
        clear_beginnings(Path(out))
        if Path(out).is_dir():
            run = reopen()
            require_same_inputs(files(run), hashes)
            return run
    run = create()
    if place.job is not None:
        files(run).write(LAUNCH_NAME, {"job": place.job})
    return run


def begin_run(
    out: str | os.PathLike[str], config: OptimizeConfig, inputs: Mapping[str, Any], place: Place
) -> RunDir:
    """The run directory of a search: new, or that of the same launch before it was restarted.

    Raises RunError for a directory of other settings or inputs, or of anything else.
    """

    def reopen() -> RunDir:
        run = RunDir.open(out)
        if run.config() != config:
            raise RunError(
                f"{run.path} was begun with other settings; choose another --out, or resume that "
                "run"
            )
        return run

    return begin(
        out, inputs["hashes"], place, reopen=reopen,
        create=lambda: RunDir.create(out, config, inputs), files=lambda run: run,
    )  # fmt: skip


def clear_beginnings(folder: Path) -> None:
    """Remove a run directory that was lost before it had settings; nothing else is touched."""
    found = list(folder.iterdir())
    if all(file.name == "inputs.json" or file.name.startswith(".tmp-") for file in found):
        for file in found:
            file.unlink()
        folder.rmdir()


def require_same_inputs(run: RunDir, hashes: Mapping[str, Any]) -> None:
    """Raise RunError unless the inputs are those that a run began with."""
    recorded = (run.read("inputs.json") or {}).get("hashes")
    if recorded != hashes:
        changed = [k for k, v in hashes.items() if (recorded or {}).get(k) != v]
        raise RunError(
            f"{run.path}: cannot resume, the inputs have changed since it began: "
            f"{', '.join(changed)} (by SHA-256)"
        )


Settings = TypeVar("Settings", OptimizeConfig, FinetuneConfig)


def on_device(config: Settings, group: Group) -> Settings:
    """The settings with this process's own device, which is the current one from here on."""
    device = own_device(config.device, group.place)
    require_device(device)
    if device != config.device:  # pragma: no cover (needs a GPU)
        torch.cuda.set_device(device)
    return dataclasses.replace(config, device=device)


def common_batch(
    config: OptimizeConfig,
    checkpoints: CheckpointSet,
    group: Group,
    out: str | os.PathLike[str],
    announce: Callable[[str], None],
) -> OptimizeConfig:
    """The settings with the batch that rank 0's device has room for, where they leave it open.

    A run that goes on after a restart keeps the batch that it began with.
    """
    if config.batch != AUTO_BATCH:
        return config
    found = None
    if group.leads and goes_on(out, group.place) and RunDir(out).config_path.is_file():
        found = RunDir(out).config().batch
    elif group.leads:
        placed = on_device(config, group)
        found = fit_batch(placed, checkpoints, announce=announce).batch
    return dataclasses.replace(config, batch=group.broadcast(found, phase="choosing the batch"))
