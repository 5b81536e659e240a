"""The model card of a fine-tuned model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from merge_rl.config.finetune import CURVES, FinetuneConfig
from merge_rl.storage.origin import Origin
from merge_rl.version import __version__
from merge_rl.workflows.card import TASK
from merge_rl.workflows.finetune_report import final_table
from merge_rl.workflows.licence import hub_licence, hub_repositories


def finetune_card(
    config: FinetuneConfig, origin: Origin, step: int, images: int, comparison: Mapping[str, Any]
) -> str:
    """Markdown with Hub metadata: how it was made, how good it is under which sampler."""
    licence = config.licence or origin.licence
    bases = hub_repositories([origin.source or ""])
    header: dict[str, Any] = {"library_name": "merge_rl", **hub_licence(licence)}
    if bases:
        header |= {"base_model": bases, "base_model_relation": "finetune"}
    header["pipeline_tag"] = TASK
    header["tags"] = ["diffusion", str(origin.config.get("model")), "finetuned", "merge_rl"]
    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip()
    how = "policy gradient" if config.algorithm == "pg" else "rejection sampling"
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
            *final_table(config, comparison),
            "",
            f"FID of features from the extractor `{config.extractor}` to "
            f"{comparison['headline']} data, N = {comparison['num_images']:,}, "
            f"{comparison['repeats']} repeats on fresh seeds, mean and 95 % interval.",
            "",
            f"Better beyond the interval under: {verdict}.",
            "",
            "## Loading",
            "",
            "```python",
            "import merge_rl as mrl",
            "",
            'model = mrl.load_model("path/to/this/folder")  # or "user/repo"',
            "```",
            "",
            "The weights have the official network's names and shapes, in float32.",
            "",
        ]
    )
