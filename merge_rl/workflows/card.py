"""The model card of a merged model: what it is, how it was found, how good it is."""

from __future__ import annotations

from typing import Any

import yaml
from torch import Tensor

from merge_rl.config import OptimizeConfig
from merge_rl.version import __version__
from merge_rl.workflows.assemble import Job
from merge_rl.workflows.comparison import ENTRIES, Comparison


def model_card(
    job: Job, config: OptimizeConfig, coefficients: Tensor, comparison: Comparison
) -> str:
    """Markdown with Hub metadata, the comparison, the coefficients and how to load the weights."""
    checkpoints = job.checkpoints
    header: dict[str, Any] = {"tags": ["diffusion", "model-merging", "merge_rl"]}
    if checkpoints.licence:
        header["license"] = checkpoints.licence.lower()
    name = checkpoints.manifest.name if checkpoints.manifest else None
    front = yaml.safe_dump(header, sort_keys=True).strip()
    return "\n".join(
        [
            f"---\n{front}\n---",
            f"# Merge of {len(checkpoints)} checkpoints of {name or checkpoints.folder.name}",
            "",
            f"Found by merge_rl {__version__} with the searcher `{config.search.name}` and the "
            f"reward `{config.reward.name}`, {config.budget} generated images at most, seed "
            f"{config.seed}.",
            "",
            "## Scores",
            "",
            *score_table(comparison),
            "",
            f"FID of features from the extractor `{config.extractor}` at N = "
            f"{comparison.num_images} images, {len(comparison.scores['result'])} repeats on fresh "
            "seeds (the same for every row), mean and 95 % interval. FID is biased upward at "
            "small N: compare only numbers of equal N.",
            "",
            "## Coefficients",
            "",
            *coefficient_table(job, coefficients),
            "",
            "## Loading",
            "",
            "```python",
            "import merge_rl as mrl",
            'model = mrl.load_model("path/to/this/folder")',
            "```",
            "",
            "`model.safetensors` holds the official network's names and shapes, in float32. "
            "`merge.yaml` lists the sources with their SHA-256; "
            "`mergerl merge CHECKPOINTS --recipe merge.yaml` makes the same weights again.",
            "",
        ]
    )


def score_table(comparison: Comparison) -> list[str]:
    """Lines of a Markdown table: one row an entry, one column a reference."""
    names = comparison.references
    lines = ["| model | " + " | ".join(f"FID, {name}" for name in names) + " |"]
    lines.append("| --- |" + " --- |" * len(names))
    for entry in ENTRIES:
        summary = comparison.summary(entry)
        label = f"{entry} ({comparison.best_single})" if entry == "best single" else entry
        cells = [
            f"{summary[n]['mean']:.3f} [{summary[n]['low']:.3f}, {summary[n]['high']:.3f}]"
            for n in names
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def coefficient_table(job: Job, coefficients: Tensor) -> list[str]:
    """Lines of a Markdown table: one row a checkpoint, one column a group of tensors."""
    lines = ["| checkpoint | " + " | ".join(job.group_names) + " |"]
    lines.append("| --- |" + " --- |" * len(job.group_names))
    for i, name in enumerate(job.checkpoints.names):
        cells = [f"{value:+.4f}" for value in coefficients[:, i].tolist()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines
