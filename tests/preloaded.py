"""What a process imports before others are forked from it: see `tests.children`."""

import merge_rl.cli.main
import merge_rl.workflows.finetune.distributed
import merge_rl.workflows.optimize
from tests.quick import draw_nothing

draw_nothing()
merge_rl.cli.main.command_line()
