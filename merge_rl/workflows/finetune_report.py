"""The page of a fine-tuning run: four curves, start against result, pictures of the same seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from merge_rl.config.finetune import CURVES, FinetuneConfig
from merge_rl.storage.atomic import atomic_path, write_text
from merge_rl.storage.finetune_run import FinetuneRun

Points = Mapping[int, Mapping[str, Mapping[str, float | None]]]
LABELS: Final = {
    "ode-train": "ODE, {train} steps",
    "ode-eval": "ODE, {eval} steps",
    "sde-train": "SDE, {train} steps",
    "sde-eval": "SDE, {eval} steps",
}


def write_report(
    run: FinetuneRun,
    config: FinetuneConfig,
    points: Points,
    comparison: Mapping[str, Any],
    step: int,
) -> Path:
    """RUN/report.md, and RUN/curves.png where matplotlib (extra `report`) is installed."""
    head = comparison["headline"]
    picture = draw_curves(run.path / "curves.png", config, points, head)
    lines = [
        f"# Fine-tuning of {Path(config.model).name}",
        "",
        f"{'Policy gradient' if config.algorithm == 'pg' else 'Rejection sampling'} with the "
        f"reward `{config.reward.text}`, credit by {config.credit}, seed {config.seed}; the result "
        f"is step {step}.",
        "",
        "## Start and result on fresh seeds",
        "",
        *final_table(config, comparison),
        "",
        f"FID to {head}, N = {comparison['num_images']:,}, {comparison['repeats']} repeats, mean "
        "[95 % interval]; gain is start - result on the same seeds.",
        "",
        "## Along the run",
        "",
        *(["![curves](curves.png)", ""] if picture else []),
        *curve_table(config, points, head),
        "",
        f"FID to {head}, N = {config.curves.num_images:,}, the same seeds at every step; the "
        "moving average of the weights is scored.",
        "",
    ]
    path = run.path / "report.md"
    write_text(path, "\n".join(lines))
    return path


def curve_label(config: FinetuneConfig, curve: str) -> str:
    """What a curve is of."""
    label = LABELS[curve].format(train=config.rollout.train_steps, eval=config.curves.eval_steps)
    return f"{label} (rollouts)" if curve == f"{config.rollout_kind}-train" else label


def final_table(config: FinetuneConfig, comparison: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table: one row a curve."""
    head = comparison["headline"]
    lines = ["| sampler | start | result | gain |", "| --- | --- | --- | --- |"]
    for curve in CURVES:
        section = comparison["curves"][curve]
        cells = [interval(section["entries"][entry][head]) for entry in ("start", "result")]
        gain = interval(section["gain"], sign="+")
        lines.append(f"| {curve_label(config, curve)} | {' | '.join(cells)} | {gain} |")
    return lines


def curve_table(config: FinetuneConfig, points: Points, head: str) -> list[str]:
    """Lines of a Markdown table: one row a scored step, one column a curve."""
    lines = ["| step | " + " | ".join(curve_label(config, curve) for curve in CURVES) + " |"]
    lines.append("| --- |" + " --- |" * len(CURVES))
    for step in sorted(points):
        cells = [number(points[step][curve][head]) for curve in CURVES]
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    return lines


def interval(summary: Mapping[str, float | None], *, sign: str = "") -> str:
    """mean [low, high]."""
    mean, low, high = (number(summary[key], sign) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def number(value: float | None, sign: str = "") -> str:
    """Three decimals, or that it is none."""
    return "not finite" if value is None else f"{value:{sign}.3f}"


def draw_curves(path: Path, config: FinetuneConfig, points: Points, head: str) -> bool:
    """FID over steps, a line a curve; False without matplotlib or with fewer than two points."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return False
    if len(points) < 2:
        return False
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    steps = sorted(points)
    for i, curve in enumerate(CURVES):
        values = [points[step][curve][head] for step in steps]
        heights = [float("nan") if value is None else value for value in values]
        style = "-o" if curve.endswith("eval") else "--o"
        axes.plot(
            steps, heights, style, color=f"C{0 if curve.startswith('ode') else 3}", markersize=4,
            label=curve_label(config, curve), alpha=1.0 if i % 2 else 0.7,
        )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there are no half steps
    axes.set_xlabel("step")
    axes.set_ylabel(f"FID to {head}, N = {config.curves.num_images:,}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return True
