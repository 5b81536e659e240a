"""What `mergerl finetune` prints: a line a step, the scores, the table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from merge_rl.cli.output import ProgressTracker, print_table, say

if TYPE_CHECKING:
    from merge_rl.workflows.finetune import FinetuneResult


class FinetuneTracker(ProgressTracker):
    """Bars of images, and a line a step, short enough to read."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Show what a step or a score came to."""
        super().event(event)
        text = _step_text(event) if event.get("kind") == "step" else _score_text(event)
        if text and not self._quiet:
            say(text)


def _step_text(event: Mapping[str, Any]) -> str:
    step = event["step"]
    if "skipped" in event:
        return f"[yellow]step {step}: skipped, its {event['skipped']} is not finite[/]"
    parts = [
        f"step {step}", f"pool FID {event['pool_fid']:.3f}", f"gap {event['pool_gap']:+.0%}",
        f"reward std {event['reward_std']:.4f}", f"grad {event['grad_norm']:.2f}",
    ]  # fmt: skip
    if "ratio_mean" in event:
        parts.append(f"KL {event['approx_kl']:.1e}")
    else:
        parts.append(f"loss {event['loss']:.3f}")
    return "  ".join([*parts, f"{event['seconds']:.1f} s"])


def _score_text(event: Mapping[str, Any]) -> str:
    if event.get("kind") != "score":
        return ""
    head = event["headline"]
    values = {curve: scores[head] for curve, scores in event["scores"].items()}
    shown = [f"{c} {'not finite' if v is None else f'{v:.3f}'}" for c, v in values.items()]
    return f"[bold]step {event['step']}[/]  {head} FID  " + "  ".join(shown)


def result_document(result: FinetuneResult) -> dict[str, Any]:
    """For --json."""
    return {
        "run_dir": str(result.run_dir),
        "model": str(result.model_path),
        "step": result.step,
        "images": result.images,
        "skipped": result.skipped,
        "curves": {str(step): point for step, point in result.curves.items()},
        "comparison": result.comparison,
    }


def print_result(result: FinetuneResult) -> None:
    """The table of the final scores, and where everything lies."""
    from merge_rl.config.finetune import CURVES
    from merge_rl.storage.finetune_run import FinetuneRun
    from merge_rl.workflows.finetune_report import curve_label, interval

    config, comparison = FinetuneRun.open(result.run_dir).config(), result.comparison
    head = comparison["headline"]
    rows = []
    for curve in CURVES:
        section = comparison["curves"][curve]
        cells = [interval(section["entries"][entry][head]) for entry in ("start", "result")]
        gain = section["gain"]
        low, high = gain["low"], gain["high"]
        verdict = "not finite" if low is None else "better" if low > 0 else "worse"
        if low is not None and low <= 0 <= high:
            verdict = "no clear difference"
        rows.append([curve_label(config, curve), *cells, interval(gain, sign="+"), verdict])
    title = (
        f"{head} FID, N = {comparison['num_images']:,}, {comparison['repeats']} repeats on fresh "
        "seeds, mean [95 % interval]"
    )
    print_table(title, ["sampler", "start", "result", "gain", ""], rows)
    typer.echo(
        f"step {result.step} is the result, {result.images:,} images; model in "
        f"{result.model_path}, page in {result.run_dir / 'report.md'}"
    )
    if result.skipped:
        typer.echo(f"{result.skipped} steps were skipped: their reward or loss was not finite")
    typer.echo(f"merge the trajectory: mergerl optimize {result.run_dir}")
