"""The model card of a merged model: what it is, how it was found, how good it is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from merge_rl.own_code import is_own
from merge_rl.progress import counted, number
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.workflows.report import few_columns, interval, markdown_table

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from merge_rl.workflows.evaluate import Comparison

TASK: Final = "unconditional-image-generation"  # the Hub's nearest name, with classes or without


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card tells."""

    name: str  # of the checkpoint set
    family: str | None  # "edm2", "sit"
    checkpoints: Sequence[str]
    group_names: Sequence[str]
    coefficients: Sequence[Sequence[float]]  # (G, K)
    dtype: str
    how: str  # a sentence: how the coefficients were found
    conditional: bool = True  # whether the network takes labels
    licence: str | None = None
    base_models: Sequence[str] = ()
    comparison: Comparison | None = None
    extractor: str | None = None
    data: Mapping[str, str] | None = None  # reference name -> what it was made from


def model_card(facts: CardFacts) -> str:
    """Markdown with Hub metadata, the comparison, the coefficients and how to load the weights."""
    front = card_header(facts).to_yaml()
    title = f"Merge of {counted(len(facts.checkpoints), 'checkpoint')} of {facts.name}"
    scores = [] if facts.comparison is None else _scores(facts, facts.comparison)
    return "\n".join(
        [
            f"---\n{front}\n---",
            f"# {title}",
            "",
            facts.how,
            "",
            *scores,
            "## Coefficients",
            "",
            coefficient_table(facts),
            "",
            *_loading(facts),
        ]
    )


def card_header(facts: CardFacts) -> ModelCardData:
    """The header in the Hub's vocabulary, as its client writes it."""
    return hub_header(
        facts.licence, facts.base_models, "merge", ["merge", "diffusion"], facts.family,
        name=f"{facts.name} merge", results=evaluation_results(facts),
    )  # fmt: skip


def hub_header(
    licence: str | None,
    bases: Sequence[str],
    relation: str,
    tags: Sequence[str],
    network: str | None,
    *,
    name: str | None = None,
    results: Sequence[EvalResult] = (),
) -> ModelCardData:
    """What every card of ours says to the Hub; `relation` is the model's to its bases.

    A `network` of a family is a tag; the name of the user's code says nothing to others.
    """
    from huggingface_hub import ModelCardData

    family = [network] if network is not None and not is_own(network) else []
    return ModelCardData(
        library_name="merge_rl", **hub_licence(licence), base_model=list(bases) or None,
        base_model_relation=relation if bases else None, pipeline_tag=TASK,
        tags=[*tags, *family, "merge_rl"], model_name=name if results else None,
        eval_results=list(results) or None,
    )  # fmt: skip


def evaluation_results(facts: CardFacts) -> list[EvalResult]:
    """Scores of the result, one entry for each reference; no NaN."""
    from huggingface_hub import EvalResult

    comparison, found = facts.comparison, []
    if comparison is None:
        return []
    summary = comparison.summary(comparison.written)
    repeats = len(comparison.scores["result"])
    for name in comparison.references:
        mean, low, high = (summary[name][key] for key in ("mean", "low", "high"))
        if not math.isfinite(mean):
            continue
        label = (facts.data or {}).get(name) or name
        how = (
            f"FID ({facts.extractor} features, N = {comparison.num_images:,}, mean of "
            f"{repeats} repeats, 95 % interval {number(low)} to {number(high)})"
        )
        found.append(
            EvalResult(
                task_type=TASK, task_name="Image generation", dataset_type=_slug(label),
                dataset_name=f"{label} ({name})", metric_type="fid", metric_name=how,
                metric_value=round(mean, 4) if mean >= 0.01 else float(f"{mean:.3g}"),
            )
        )  # fmt: skip
    return found


def score_table(comparison: Comparison) -> str:
    """A Markdown table: one row an entry and sampler, one column a reference."""
    from merge_rl.workflows.evaluate import ENTRIES

    names = comparison.references
    rows = [
        (f"{entry} ({comparison.best_single})" if entry == "best single" else entry,
         comparison.summary(entry))
        for entry in ENTRIES
    ]  # fmt: skip
    if comparison.sde is not None:
        sde = comparison.sde
        under = f"{sde.sampler.solver}, {sde.sampler.num_steps} steps"
        rows += [(f"{entry} ({under})", sde.summary(entry)) for entry in sde.scores]
    cells = [[label, *(interval(summary[name]) for name in names)] for label, summary in rows]
    return markdown_table(["model", *(f"FID, {name}" for name in names)], cells)


EACH: Final = "Those of each group are in `merge.yaml`."


def coefficient_table(facts: CardFacts) -> str:
    """A Markdown table: one row a checkpoint, one column a group of tensors, if they are few."""
    columns, coefficients = few_columns(facts.group_names, facts.coefficients)
    rows = [
        [name, *(f"{value:+.4f}" for value in own)]
        for name, *own in zip(facts.checkpoints, *coefficients, strict=True)
    ]
    drawn = markdown_table(["checkpoint", *columns], rows)
    return drawn if len(columns) == len(facts.group_names) else f"{drawn}\n\n{EACH}"


def _scores(facts: CardFacts, comparison: Comparison) -> list[str]:
    return [
        "## Scores",
        "",
        score_table(comparison),
        "",
        f"FID of features from the extractor `{facts.extractor}` at N = "
        f"{comparison.num_images:,} images, {len(comparison.scores['result'])} repeats on fresh "
        "seeds (the same for every row), mean and 95 % interval. FID is biased upward at "
        "small N: compare only numbers of equal N.",
        "",
    ]


def load_call(network: str, place: str) -> str:
    """How Python loads a model folder whose config names a network: the user's own is named."""
    named = f', network="{network}"' if is_own(network) else ""
    return f'load_model("{place}"{named})'


def loading_section(network: str | None, more: Sequence[str], sentences: str) -> list[str]:
    """How a card says that its weights are loaded; `more` are lines of Python behind that."""
    own = network is None or is_own(network)
    read = [
        "from safetensors.torch import load_file",
        "",
        'weights = load_file("path/to/this/folder/model.safetensors")  # for load_state_dict',
    ]
    if network is not None:
        call = load_call(network, "path/to/this/folder")
        read = ["import merge_rl as mrl", "", f'model = mrl.{call}  # or "user/repo"', *more]
        read = ["import torch", *read] if more else read
    library = ["diffusers' own `from_pretrained` loads this folder too.", ""]
    whose = "network's own" if own else "official network's"
    return [
        "## Loading",
        "",
        "```python",
        *read,
        "```",
        "",
        *(library if network == "diffusers" else []),
        f"The weights have the {whose} names and shapes, {sentences}",
        "",
    ]


def _loading(facts: CardFacts) -> list[str]:
    labels = ", torch.arange(4)" if facts.conditional else ""
    hint = "  # and labels, if it has classes" if is_own(facts.family or "") else ""
    sampling = [
        "noise = torch.randn(4, *model.sample_shape)",
        f"samples = mrl.sample(model, noise{labels}){hint}",
    ]
    again = (
        f"in {facts.dtype}; `merge.yaml` lists the sources with their SHA-256, and "
        "`mergerl merge CHECKPOINTS OUT --recipe merge.yaml` makes the same files again."
    )
    return loading_section(facts.family, sampling, again)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "images"


_HUB_REPO: Final = re.compile(r"^(?:https://huggingface\.co/|hf://)([\w.-]+/[\w.-]+?)(?:[@/].*)?$")
# Names that the Hub knows, among those that checkpoints of images models carry; others go into
# `license_name`.
_KNOWN: Final = frozenset(
    [
        "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0",
        "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0",
        "openrail", "creativeml-openrail-m", "openrail++", "gpl-3.0", "agpl-3.0", "lgpl-3.0",
    ]
)  # fmt: skip


def hub_licence(licence: str | None) -> dict[str, Any]:
    """Entries of a model card's header for a licence."""
    if licence is None:
        return {}
    name = licence.lower()
    if name in _KNOWN:
        return {"license": name}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.+-]+", "-", name).strip("-")}


def base_models(checkpoints: CheckpointSet) -> list[str]:
    """Hub repositories that the sources say they come from, each once."""
    return hub_repositories([entry.source or "" for entry in checkpoints.entries])


def hub_repositories(sources: Sequence[str]) -> list[str]:
    """user/repo of every address on the Hub among `sources`, each once, in order."""
    found = (_HUB_REPO.match(source) for source in sources)
    return list(dict.fromkeys(match.group(1) for match in found if match))
