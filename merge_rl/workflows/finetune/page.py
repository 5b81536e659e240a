"""The page and the model card of a fine-tuning run: curves, scores, how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from merge_rl.config import CURVES, FinetuneConfig
from merge_rl.progress import number
from merge_rl.storage.checkpoints import Origin
from merge_rl.storage.files import write_text
from merge_rl.storage.runs import FinetuneRun
from merge_rl.version import __version__
from merge_rl.workflows.export import hub_header, hub_repositories, loading_section
from merge_rl.workflows.report import (
    can_draw,
    drawing,
    finetune_verdict,
    interval,
    markdown_table,
    steps_axis,
)

Points = Mapping[int, Mapping[str, Mapping[str, float | None]]]
LABELS: Final = {
    "ode-train": "ODE, {train} steps",
    "ode-eval": "ODE, {eval} steps",
    "sde-train": "SDE, {train} steps",
    "sde-eval": "SDE, {eval} steps",
}


ALGORITHMS: Final = {
    "pg": "policy gradient", "rs": "rejection sampling", "pathwise": "gradient through the rollout",
}  # fmt: skip


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
        f"**{finetune_verdict(comparison, {c: curve_label(config, c) for c in CURVES})}**",
        "",
        f"{ALGORITHMS[config.algorithm].capitalize()} with the "
        f"reward `{config.reward.text}`, credit by {config.credit}, seed {config.seed}; the result "
        f"is step {step}.",
        "",
        "## Start and result on fresh seeds",
        "",
        final_table(config, comparison),
        "",
        f"FID to {head}, N = {comparison['num_images']:,}, {comparison['repeats']} repeats, mean "
        "[95 % interval]; gain is start - result on the same seeds.",
        "",
        "## Along the run",
        "",
        *(["![curves](curves.png)", ""] if picture else []),
        curve_table(config, points, head),
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


def final_table(config: FinetuneConfig, comparison: Mapping[str, Any]) -> str:
    """A Markdown table: one row a curve."""
    head, rows = comparison["headline"], []
    for curve in CURVES:
        section = comparison["curves"][curve]
        cells = [interval(section["entries"][entry][head]) for entry in ("start", "result")]
        rows.append([curve_label(config, curve), *cells, interval(section["gain"], "+.3f")])
    return markdown_table(["sampler", "start", "result", "gain"], rows)


def curve_table(config: FinetuneConfig, points: Points, head: str) -> str:
    """A Markdown table: one row a scored step, one column a curve."""
    rows = [
        [str(step), *(number(points[step][curve][head]) for curve in CURVES)]
        for step in sorted(points)
    ]
    return markdown_table(["step", *(curve_label(config, curve) for curve in CURVES)], rows)


def draw_curves(path: Path, config: FinetuneConfig, points: Points, head: str) -> bool:
    """FID over steps, a line a curve; False without matplotlib or with fewer than two points."""
    if len(points) < 2 or not can_draw():
        return False
    steps = sorted(points)
    with drawing(path, 1, 1, (7, 4.2)) as (axes,):
        for i, curve in enumerate(CURVES):
            values = [points[step][curve][head] for step in steps]
            heights = [float("nan") if value is None else value for value in values]
            style = "-o" if curve.endswith("eval") else "--o"
            axes.plot(
                steps, heights, style, color=f"C{0 if curve.startswith('ode') else 3}",
                label=curve_label(config, curve), alpha=1.0 if i % 2 else 0.7, markersize=4,
            )  # fmt: skip
        steps_axis(axes)
        axes.set_ylabel(f"FID to {head}, N = {config.curves.num_images:,}")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    return True


def finetune_card(
    config: FinetuneConfig, origin: Origin, step: int, images: int, comparison: Mapping[str, Any]
) -> str:
    """Markdown with Hub metadata: how it was made, how good it is under which sampler."""
    licence = config.licence or origin.licence
    bases = hub_repositories([origin.source or ""])
    network = str(origin.config.get("model"))
    front = hub_header(licence, bases, "finetune", ["diffusion", "finetuned"], network).to_yaml()
    how = ALGORITHMS[config.algorithm]
    better = [c for c in CURVES if (comparison["curves"][c]["gain"]["low"] or 0) > 0]
    verdict = ", ".join(better) if better else "none of them"
    return "\n".join(
        [
            f"---\n{front}\n---",
            f"# {origin.name}, fine-tuned with a distribution-wise reward",
            "",
            f"Fine-tuned by merge_rl {__version__} from {origin.name}: {step} steps of {how} with "
            f"the reward `{config.reward.name}` (credit by {config.credit}), {images:,} generated "
            f"images, seed {config.seed}. Rollouts were made under the "
            f"{config.rollout_kind.upper()} with {config.rollout.train_steps} steps; a gain under "
            "one sampler need not carry over to another.",
            "",
            "## Scores",
            "",
            final_table(config, comparison),
            "",
            f"FID of features from the extractor `{config.extractor}` to "
            f"{comparison['headline']} data, N = {comparison['num_images']:,}, "
            f"{comparison['repeats']} repeats on fresh seeds, mean and 95 % interval.",
            "",
            f"Better beyond the interval under: {verdict}.",
            "",
            *loading_section(network, (), "in float32."),
        ]
    )
