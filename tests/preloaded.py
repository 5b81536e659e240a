"""What a process imports before others are forked from it: see `tests.children`."""

import gc
from importlib import import_module

import merge_rl.cli.main
import merge_rl.workflows.finetune.distributed
import merge_rl.workflows.optimize
from tests.quick import draw_nothing

import_module("torch._dynamo")  # by every optimiser, and by what reports that a rank was lost
draw_nothing()
merge_rl.cli.main.command_line()
# Children that looked for garbage in all this would have to copy it.
gc.collect()
gc.freeze()
