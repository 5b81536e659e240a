"""What a search or a fine-tuning run came to, on the terminal and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_rl.cli.output import ProgressTracker, escape, say, tell
from merge_rl.cli.tables import print_table
from merge_rl.errors import quoted
from merge_rl.progress import number, pool_text

if TYPE_CHECKING:
    from merge_rl.workflows.evaluate import Comparison, SamplerComparison, SecondScores
    from merge_rl.workflows.finetune import FinetuneResult
    from merge_rl.workflows.optimize import OptimizeResult, SearchResult
    from merge_rl.workflows.report import Report


def there(folder: Path, *names: str) -> list[str]:
    """Those names that are files of the folder: a page that cannot be written ends no run."""
    return [name for name in names if (folder / name).is_file()]


def write_page(run: Path, *, reloads: bool = False) -> Report:
    """The page of a run, with a note of what could not be written beside it."""
    from merge_rl.workflows.report import write_report

    written = write_report(run, reloads=reloads)
    if written.note:
        say(f"no plot: {escape(written.note)}")
    return written


def interval_text(summary: Mapping[str, Any]) -> str:
    """A mean with its 95 % interval, where there is one."""
    mean, low, high = (summary[key] for key in ("mean", "low", "high"))
    if mean is None or math.isnan(mean):
        return "not finite"
    if low is None:
        return number_text(mean, mean)
    return f"{number_text(mean, mean)} [{number_text(low, mean)}, {number_text(high, mean)}]"


def number_text(value: float, like: float) -> str:
    """A number to the decimals that one of the size of `like` needs."""
    few = abs(like) >= 0.1 or 0 < abs(like) < 1e-4
    return number(value, ".3f" if few else ".6f", like)


def result_document(result: OptimizeResult) -> dict[str, Any]:
    """The result for --json."""
    found = result.found.as_dict()
    return {
        "run_dir": str(result.run_dir),
        "merged": str(result.run_dir / "merged"),
        "coefficients": result.coefficients.tolist(),
        **{
            key: found[key]
            for key in ("search_images", "images", "start", "final", "tuned")
            if key in found
        },
        "comparison": result.comparison.as_dict(),
        "warnings": result.comparison.warnings,
    }


def print_result(result: OptimizeResult) -> None:
    """Tables of the comparison, where the merge lies, and the verdict last."""
    from merge_rl.workflows.evaluate import ENTRIES
    from merge_rl.workflows.report import floor_lines, run_verdict

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
    for line in floor_lines(vars(comparison)):
        tell(line)
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
    kept = "merged model" if comparison.written == "result" else "its start, no merge,"
    tell(f"searched with {result.images:,} images; {kept} in {merged}")
    if shown := there(result.run_dir, "report.html", "before-after.png"):
        tell(f"look at it: {', '.join(str(result.run_dir / name) for name in shown)}")
    tell(run_verdict(comparison.as_dict()).line)


def _print_gain(comparison: Comparison | SamplerComparison, other: str) -> None:
    from merge_rl.workflows.report import interval, outcome

    gain = comparison.gain(other)
    if math.isnan(gain.mean):
        tell(f"result against {other}: one of them has no finite score")
        return
    verdict = outcome(vars(gain))
    tell(
        f"result against {other}: {interval(gain, '+.3f')} "
        f"{comparison.headline} FID gained, {verdict}"
    )


def _print_second(second: SecondScores) -> None:
    from merge_rl.workflows.report import metric_text

    gain, entries = second.gain(), second.as_dict()["entries"]
    if math.isnan(gain.mean):
        return
    means = " to ".join(f"{entries[entry]['mean']:.4g}" for entry in ("start", "result"))
    tell(
        f"{metric_text(second.name)} to the reference, start to result: {means}, "
        f"gained {gain.mean:+.4g} [{gain.low:+.4g}, {gain.high:+.4g}]"
    )


def _print_search(found: SearchResult) -> None:
    """Where it began, what was chosen at the end, and how much that flattered itself."""
    from merge_rl.workflows.report import search_lines

    for line in search_lines(found.as_dict()):
        tell(line)


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
        f"step {step}", pool_text(event, event["pool_fid"]), f"gap {event['pool_gap']:+.0%}",
        f"reward std {event['reward_std']:.4f}", f"grad {event['grad_norm']:.2f}",
    ]  # fmt: skip
    if "ratio_mean" in event:
        parts.append(f"KL {event['approx_kl']:.1e}")
    elif "loss" in event:
        parts.append(f"loss {event['loss']:.3f}")
    return "  ".join([*parts, f"{event['seconds']:.1f} s"])


def _score_text(event: Mapping[str, Any]) -> str:
    if event.get("kind") != "score":
        return ""
    head = event["headline"]
    values = {curve: scores[head] for curve, scores in event["scores"].items()}
    shown = [f"{c} {number(v)}" for c, v in values.items()]
    return f"[bold]step {event['step']}[/]  {head} FID  " + "  ".join(shown)


def finetuned_document(result: FinetuneResult) -> dict[str, Any]:
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


def print_finetuned(result: FinetuneResult) -> None:
    """The table of the final scores, where everything lies, and the verdict last."""
    from merge_rl.config import CURVES
    from merge_rl.storage.runs import FinetuneRun
    from merge_rl.workflows.finetune import curve_label
    from merge_rl.workflows.report import finetune_verdict, interval, outcome

    config, comparison = FinetuneRun.open(result.run_dir).config(), result.comparison
    head, rows = comparison["headline"], []
    labels = {curve: curve_label(config, curve) for curve in CURVES}
    for curve in CURVES:
        section = comparison["curves"][curve]
        cells = [interval(section["entries"][entry][head]) for entry in ("start", "result")]
        gain = section["gain"]
        rows.append([labels[curve], *cells, interval(gain, "+.3f"), outcome(gain)])
    title = (
        f"{head} FID, N = {comparison['num_images']:,}, {comparison['repeats']} repeats on fresh "
        "seeds, mean [95 % interval]"
    )
    print_table(title, ["sampler", "start", "result", "gain", ""], rows)
    pages = [f", page in {result.run_dir / name}" for name in there(result.run_dir, "report.html")]
    tell(
        f"step {result.step} is the result, {result.images:,} images; model in "
        f"{result.model_path}{''.join(pages)}"
    )
    if result.skipped:
        tell(f"{result.skipped} steps were skipped: their reward or loss was not finite")
    tell(f"merge the trajectory: mergerl optimize {quoted(result.run_dir)}")
    tell(finetune_verdict(comparison, labels).line)
