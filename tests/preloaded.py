"""What a process imports before others are forked from it: see `tests.children`."""

import gc
import os
from contextlib import suppress
from importlib import import_module

import merge_rl.cli.main
import merge_rl.workflows.finetune.distributed
import merge_rl.workflows.optimize
from merge_rl.errors import MergeRLError
from tests.quick import spare

for name in ("torch._dynamo", "torch.distributed.launcher.api"):  # of optimisers, and of launches
    import_module(name)
spare()
os.fsync = lambda _descriptor: None  # type: ignore[assignment]  # as in the tests' own process
with suppress(MergeRLError):  # what reads options imports more when it reads the first
    merge_rl.cli.main.command_line()(["inspect", "nothing"], standalone_mode=False)
# Children that looked for garbage in all this would have to copy it.
gc.collect()
gc.freeze()
