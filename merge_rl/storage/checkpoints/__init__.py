"""Sets of checkpoints, single models and manifests: opened, listed, merged on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from merge_rl.late import offered
from merge_rl.storage.checkpoints.catalogue import KnownSet, load_catalogue
from merge_rl.storage.checkpoints.checkpoint_set import CheckpointSet, open_checkpoints
from merge_rl.storage.checkpoints.diffusers_folder import (
    SCHEDULER_NAME,
    SCHEDULER_PLACE,
    is_network_config,
    is_of_library,
    library_documents,
    network_config,
)
from merge_rl.storage.checkpoints.listing import (
    Origin,
    by_progress,
    find_origin,
    newest_model,
    unknown_config,
)
from merge_rl.storage.checkpoints.manifest import (
    MANIFEST_NAME,
    MAX_EMA_STD,
    MIN_EMA_STD,
    CheckpointEntry,
    Manifest,
    SetDefaults,
    has_manifest,
    is_ema_std,
    parse_stem,
    read_manifest,
    relative_inside,
    write_manifest,
)
from merge_rl.storage.checkpoints.model_file import (
    CONFIG_KEY,
    CONFIG_NAME,
    ModelFile,
    check_model_file,
    first_config,
    folder_config,
    left_in_file,
    library_document,
    metadata_config,
    model_sha256,
    open_model_file,
    open_tensors,
    require_fit,
    require_network,
    save_checkpoint,
    stated_config,
)
from merge_rl.storage.checkpoints.one_pass import merge_pass
from merge_rl.storage.checkpoints.plan import MergePlan, base_index, merged_licence, plan_merge
from merge_rl.storage.checkpoints.recorded import (
    RECIPE_NAME,
    find_listing,
    licence_beside,
    recorded_facts,
)

if TYPE_CHECKING:
    from merge_rl.storage.checkpoints.merging import (
        DISK,
        keep_states,
        load_checkpoints,
        merge_into_memory,
        module_of,
    )

__all__ = [
    "CONFIG_KEY",
    "CONFIG_NAME",
    "DISK",
    "MANIFEST_NAME",
    "MAX_EMA_STD",
    "MIN_EMA_STD",
    "RECIPE_NAME",
    "SCHEDULER_NAME",
    "SCHEDULER_PLACE",
    "CheckpointEntry",
    "CheckpointSet",
    "KnownSet",
    "Manifest",
    "MergePlan",
    "ModelFile",
    "Origin",
    "SetDefaults",
    "base_index",
    "by_progress",
    "check_model_file",
    "find_listing",
    "find_origin",
    "first_config",
    "folder_config",
    "has_manifest",
    "is_ema_std",
    "is_network_config",
    "is_of_library",
    "keep_states",
    "left_in_file",
    "library_document",
    "library_documents",
    "licence_beside",
    "load_catalogue",
    "load_checkpoints",
    "merge_into_memory",
    "merge_pass",
    "merged_licence",
    "metadata_config",
    "model_sha256",
    "module_of",
    "network_config",
    "newest_model",
    "open_checkpoints",
    "open_model_file",
    "open_tensors",
    "parse_stem",
    "plan_merge",
    "read_manifest",
    "recorded_facts",
    "relative_inside",
    "require_fit",
    "require_network",
    "save_checkpoint",
    "stated_config",
    "unknown_config",
    "write_manifest",
]

_LATE: Final = {
    "merging": "DISK keep_states load_checkpoints merge_into_memory module_of",
}


def __getattr__(name: str) -> Any:
    return offered(__name__, name, _LATE)
