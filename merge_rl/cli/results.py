"""What a search came to, on the terminal and as JSON."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from merge_rl.cli.output import interval_text, print_table, say

if TYPE_CHECKING:
    from merge_rl.workflows.comparison import Comparison, SamplerComparison
    from merge_rl.workflows.optimize import OptimizeResult
    from merge_rl.workflows.search import Found
    from merge_rl.workflows.second_metric import SecondScores


def result_document(result: OptimizeResult) -> dict[str, Any]:
    """The result for --json."""
    found = result.found.as_dict()
    return {
        "run_dir": str(result.run_dir),
        "merged": str(result.run_dir / "merged"),
        "coefficients": result.coefficients.tolist(),
        **{key: found[key] for key in ("search_images", "images", "start", "final")},
        "comparison": result.comparison.as_dict(),
        "warnings": result.comparison.warnings,
    }


def print_result(result: OptimizeResult) -> None:
    """Tables of the comparison, and where the merge lies."""
    from merge_rl.workflows.comparison import ENTRIES

    comparison = result.comparison
    rows = []
    for entry in ENTRIES:
        summary = comparison.summary(entry)
        label = f"{entry} ({comparison.best_single})" if entry == "best single" else entry
        rows.append([label, *(interval_text(summary[name]) for name in comparison.references)])
    title = (
        f"FID, N = {comparison.num_images:,}, {len(comparison.scores['result'])} repeats on fresh "
        "seeds, mean [95 % interval]"
    )
    print_table(title, ["model", *comparison.references], rows)
    for other in ENTRIES[:-1]:
        _print_gain(comparison, other)
    if comparison.second is not None:
        _print_second(comparison.second)
    if comparison.sde is not None:
        _print_sde(comparison)
    _print_search(result.found)
    for text in comparison.warnings:
        say(f"[yellow]warning:[/] {escape(text)}")
    merged = result.run_dir / "merged"
    typer.echo(f"searched with {result.images:,} images; merged model in {merged}")
    typer.echo(f"look at it: mergerl sample {merged}")


def _print_gain(comparison: Comparison | SamplerComparison, other: str) -> None:
    gain = comparison.gain(other)
    if math.isnan(gain.mean):
        typer.echo(f"result against {other}: one of them made samples that are not finite")
        return
    verdict = "better" if gain.low > 0 else "worse" if gain.high < 0 else "no clear difference"
    typer.echo(
        f"result against {other}: {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] "
        f"{comparison.headline} FID gained, {verdict}"
    )


def _print_second(second: SecondScores) -> None:
    gain, entries = second.gain(), second.as_dict()["entries"]
    if math.isnan(gain.mean):
        return
    means = " to ".join(f"{entries[entry]['mean']:.4g}" for entry in ("start", "result"))
    typer.echo(
        f"{second.name.upper()} to the reference, start to result: {means}, "
        f"gained {gain.mean:+.4g} [{gain.low:+.4g}, {gain.high:+.4g}]"
    )


def _print_search(found: Found) -> None:
    """Where it began, what was chosen at the end, and how much that flattered itself."""
    from merge_rl.workflows.search_text import search_lines

    for line in search_lines(found.as_dict()):
        typer.echo(line)


def _print_sde(comparison: Comparison) -> None:
    sde = comparison.sde
    if sde is None:
        return
    rows = [
        [entry, *(interval_text(sde.summary(entry)[name]) for name in sde.references)]
        for entry in sde.scores
    ]
    title = f"the same under the SDE: {sde.sampler.solver}, {sde.sampler.num_steps} steps"
    print_table(title, ["model", *sde.references], rows)
    _print_gain(sde, "start")
