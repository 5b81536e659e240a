"""Run folders: layout, beginning and going on, stop signals, boards."""

from merge_rl.storage.runs.lifecycle import (
    StopSignals,
    begin_finetune,
    begin_run,
    clear_beginnings,
    continued,
    goes_on,
    gone_unless,
    require_resumable,
    require_same,
)
from merge_rl.storage.runs.places import (
    Meant,
    described,
    find_run,
    find_set,
    folder_kind,
    holds_weights,
    located,
    only_inside,
    result_of,
)
from merge_rl.storage.runs.run_dir import (
    CURVES_FILE,
    INPUTS,
    SETTINGS,
    FinetuneRun,
    RunDir,
    fitting,
    is_finetune_run,
)
from merge_rl.storage.runs.trackers import Boards, require_extras

__all__ = [
    "CURVES_FILE",
    "INPUTS",
    "SETTINGS",
    "Boards",
    "FinetuneRun",
    "Meant",
    "RunDir",
    "StopSignals",
    "begin_finetune",
    "begin_run",
    "clear_beginnings",
    "continued",
    "described",
    "find_run",
    "find_set",
    "fitting",
    "folder_kind",
    "goes_on",
    "gone_unless",
    "holds_weights",
    "is_finetune_run",
    "located",
    "only_inside",
    "require_extras",
    "require_resumable",
    "require_same",
    "result_of",
]
