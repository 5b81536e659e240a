"""Pages and pictures of runs and comparisons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from merge_rl.late import offered

if TYPE_CHECKING:
    from merge_rl.workflows.report import compare_page
    from merge_rl.workflows.report.compare_page import write_comparison
    from merge_rl.workflows.report.figures import can_draw, drawing, steps_axis
    from merge_rl.workflows.report.markup import (
        NAMES,
        few_columns,
        floor_lines,
        interval,
        markdown_table,
        metric_text,
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
    "few_columns",
    "finetune_verdict",
    "floor_lines",
    "interval",
    "markdown_table",
    "metric_text",
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
_HOMES: Final = {
    "compare_page": "write_comparison",
    "figures": "can_draw drawing steps_axis",
    "markup": "NAMES few_columns floor_lines interval markdown_table metric_text",
    "plots": "draw_run",
    "results": (
        "CompareResult EvaluateResult Score SearcherScore Verdict compare_verdict "
        "finetune_verdict outcome run_verdict"
    ),
    "run_page": "search_lines",
    "writing": "LivePage Report with_page write_report",
}


def __getattr__(name: str) -> Any:
    return offered(__name__, name, _HOMES)
