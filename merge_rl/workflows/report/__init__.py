"""Pages and pictures of runs and comparisons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from merge_rl.late import offered

if TYPE_CHECKING:
    from merge_rl.workflows.report import compare_page
    from merge_rl.workflows.report.compare_page import write_comparison
    from merge_rl.workflows.report.figures import can_draw, drawing, steps_axis
    from merge_rl.workflows.report.markup import (
        NAMES,
        duration,
        floor_lines,
        interval,
        markdown_table,
        number,
    )
    from merge_rl.workflows.report.plots import draw_run
    from merge_rl.workflows.report.results import (
        CompareResult,
        EvaluateResult,
        Score,
        SearcherScore,
        Verdict,
        compare_verdict,
        finetune_verdict,
        outcome,
        run_verdict,
    )
    from merge_rl.workflows.report.run_page import search_lines
    from merge_rl.workflows.report.writing import LivePage, Report, with_page, write_report

__all__ = [
    "NAMES",
    "CompareResult",
    "EvaluateResult",
    "LivePage",
    "Report",
    "Score",
    "SearcherScore",
    "Verdict",
    "can_draw",
    "compare_page",
    "compare_verdict",
    "draw_run",
    "drawing",
    "duration",
    "finetune_verdict",
    "floor_lines",
    "interval",
    "markdown_table",
    "number",
    "outcome",
    "run_verdict",
    "search_lines",
    "steps_axis",
    "with_page",
    "write_comparison",
    "write_report",
]

# Each is loaded when it is asked for: some need torch, others do without. A module that is offered
# whole is found without being named.
_HOMES = {
    "write_comparison": "compare_page",
    **dict.fromkeys(("can_draw", "drawing", "steps_axis"), "figures"),
    "draw_run": "plots",
    **dict.fromkeys(("CompareResult", "EvaluateResult", "Score", "SearcherScore"), "results"),
    "search_lines": "run_page",
    **dict.fromkeys(
        ("NAMES", "duration", "floor_lines", "interval", "markdown_table", "number"), "markup"
    ),
    **dict.fromkeys(
        ("Verdict", "compare_verdict", "finetune_verdict", "outcome", "run_verdict"), "results"
    ),
    **dict.fromkeys(("LivePage", "Report", "with_page", "write_report"), "writing"),
}


def __getattr__(name: str) -> Any:
    return offered(__name__, name, _HOMES)
