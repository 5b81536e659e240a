"""Pages and pictures of runs and comparisons."""

from merge_rl.workflows.report import compare_page
from merge_rl.workflows.report.compare_page import write_comparison
from merge_rl.workflows.report.figures import can_draw, drawing, steps_axis
from merge_rl.workflows.report.run_page import search_lines, write_report
from merge_rl.workflows.report.text import interval, markdown_table, number

__all__ = [
    "can_draw",
    "compare_page",
    "drawing",
    "interval",
    "markdown_table",
    "number",
    "search_lines",
    "steps_axis",
    "write_comparison",
    "write_report",
]
