"""What a search found: its result, the merged model that it writes, and pictures of both ends."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from merge_rl.config import COEFFICIENTS, OptimizeConfig, SamplerConfig, to_mapping
from merge_rl.core.merging.tuned_map import setup_of
from merge_rl.core.sampling.compatibility import balanced_labels
from merge_rl.errors import ConfigError, NonFiniteSamplesError
from merge_rl.interfaces import Tracker
from merge_rl.storage.checkpoints import base_index, merged_licence
from merge_rl.storage.files import enlarge, image_grid, side_by_side, write_picture, write_png
from merge_rl.storage.hub import GUIDE_FOLDER
from merge_rl.storage.runs import RunDir
from merge_rl.version import __version__
from merge_rl.workflows.assembly import (
    GuideSet,
    Job,
    find_defaults,
    load_autoencoder,
    load_network,
    network_rollout,
)
from merge_rl.workflows.evaluate import Comparison, comparison_from
from merge_rl.workflows.export import (
    carried_metadata,
    merge_recipe,
    model_card,
    sampled,
    save_model,
    set_facts,
    without_places,
)
from merge_rl.workflows.optimize.prepare import picture_layout
from merge_rl.workflows.optimize.search import SearchResult
from merge_rl.workflows.report import NAMES, Verdict, draw_run, interval, run_verdict
from merge_rl.workflows.rollout import Rollout


@dataclass(frozen=True, repr=False)
class OptimizeResult:
    """What a finished search found; printed, it shows its verdict.

    Attributes:
        run_dir: the run directory; `merged` in it is the merged model.
        found: the result's coefficients and history.
        comparison: scores of start, uniform average, best checkpoint and result.
    """

    run_dir: Path
    found: SearchResult
    comparison: Comparison

    @property
    def coefficients(self) -> Tensor:
        """Coefficients of the result, (G, K) float64: a row a group, a column a checkpoint."""
        return self.found.coefficients

    @property
    def images(self) -> int:
        """Number of images that the search generated, without the final comparison."""
        return self.found.images

    @property
    def baseline(self) -> Mapping[str, Any]:
        """Scores of the starting point."""
        return self.comparison.summary("start")

    @property
    def final(self) -> Mapping[str, Any]:
        """Scores of the result, on the same fresh seeds."""
        return self.comparison.summary("result")

    @property
    def verdict(self) -> Verdict:
        """The outcome for people: what the result is better than, and the numbers that say so."""
        return run_verdict(self.comparison.as_dict())

    def __repr__(self) -> str:
        return f"{self.run_dir}: {self.verdict}"

    def plot(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Draw the search (extra `report`): RUN/report.png, or a file whose ending says the kind.

        Returns where it lies. Raises ConfigError for an ending that is not a picture's, a PDF's or
        an SVG's.
        """
        run = RunDir.open(self.run_dir)
        picture = self.run_dir / "report.png" if path is None else Path(path)
        draw_run(run.events(), run.read("result.json"), picture)
        return picture

    def samples(self, count: int = 16, *, seed: int = 0, device: str = "cpu") -> Tensor:
        """Images uint8 (N, 1 or 3, H, W) of the merged model, of the seeds from `seed` on.

        They are those of `mergerl sample`. Raises ConfigError for fewer than one image, and for a
        run that generates with a function of the user's.
        """
        if count < 1:
            raise ConfigError(f"expected at least 1 image, got {count}")
        config = RunDir.open(self.run_dir).config()
        if config.generate is not None:
            raise ConfigError(f"{self.run_dir} generates with {config.generate}: call it instead")
        network = load_network(self.run_dir / "merged")
        decoder, _ = load_autoencoder(
            config.autoencoder, config.autoencoder_weights, shape=network.sample_shape,
            dtype=config.autoencoder_dtype,
        )  # fmt: skip
        sampler = find_defaults(self.run_dir / "merged").sampler or SamplerConfig()
        rollout = network_rollout(
            network, sampler, config.batch, device, Rollout, autoencoder=decoder
        )
        labels = balanced_labels(count, int(getattr(network, "label_dim", 0)))
        return rollout.images(rollout.noise(range(seed, seed + count)), labels)


def to_plain(result: OptimizeResult) -> dict[str, Any]:
    """For the other processes."""
    return {
        "run_dir": str(result.run_dir),
        "found": result.found.to_plain(),
        "comparison": dataclasses.asdict(result.comparison),
    }


def from_plain(values: Mapping[str, Any]) -> OptimizeResult:
    """What `to_plain` gave."""
    comparison = comparison_from(values["comparison"])
    found = SearchResult.from_plain(values["found"])
    return OptimizeResult(Path(values["run_dir"]), found, comparison)


def _carried_by_module(job: Job, config: OptimizeConfig) -> list[str]:
    """Patterns of the buffers of numbers that a module of the user's carries, and no name says."""
    if config.generate is None:
        return []
    infos, freeze = job.checkpoints.tensors, config.merge.freeze
    return [
        f"^{re.escape(name)}$"
        for name in sorted(job.flat.fixed)
        if infos[name].is_floating and not any(re.search(pattern, name) for pattern in freeze)
    ]


def write_merged(
    path: Path, job: Job, config: OptimizeConfig, rows: Tensor, comparison: Comparison
) -> None:
    """The merged model of a finished search, float32, with recipe and card.

    `rows` are those of the entry that the comparison says is written. Where more than coefficients
    was searched the recipe says how it is sampled; a guide that is a merge lies in its folder.
    """
    coefficients, sampler = setup_of(job.map, rows).coefficients, tuned_sampler(config, job, rows)
    checkpoints, base = job.checkpoints, base_index(job.checkpoints, config.merge.start)
    licence = merged_licence(checkpoints, config.licence)
    recipe = merge_recipe(
        checkpoints, coefficients, base=base, groups=config.merge.groups,
        frozen=[*config.merge.freeze, *_carried_by_module(job, config)], licence=licence,
    )  # fmt: skip
    recipe["search"] = without_places(to_mapping(config))
    recipe |= {} if sampler is None else {"sampler": without_places(to_mapping(sampler))}
    recipe["comparison"] = comparison.as_dict()
    weights = job.flat.weights(coefficients)
    # The official order of names, so that files compare line by line with their sources.
    ordered = {name: weights[name] for name in checkpoints.tensors}
    how = (
        f"Found by merge_rl {__version__} with the searcher `{config.search.name}` and the "
        f"reward `{config.reward.text}`, {config.budget} generated images at most, seed "
        f"{config.seed}."
    )
    if sampler is not None:
        how += sampled(sampler)
    how += "".join(f" Warning: {text}." for text in comparison.warnings)
    facts = set_facts(checkpoints, job.group_names, coefficients, "float32", how, licence)
    sources = {name: reference.source for name, reference in job.references.items()}
    facts = dataclasses.replace(
        facts, comparison=comparison, extractor=config.extractor, data=sources
    )
    save_model(
        path, ordered, checkpoints.config, recipe=recipe, card=model_card(facts), replace=True,
        metadata=carried_metadata(checkpoints.metadata(base)),
    )  # fmt: skip
    if job.guide is not None:
        _write_guide(path / GUIDE_FOLDER, job.guide, setup_of(job.map, rows).guide)


def _write_guide(path: Path, guide: GuideSet, coefficients: Tensor | None) -> None:
    """The merge that guides, as a model folder of its own."""
    found, merge = guide.checkpoints, guide.start if coefficients is None else coefficients
    weights = guide.flat.weights(merge)
    groups = {name: pattern for name, pattern in guide.groups.items() if name in guide.group_names}
    recipe = merge_recipe(
        found, merge, base=found.newest, groups=groups, licence=merged_licence(found)
    )
    save_model(
        path, {name: weights[name] for name in found.tensors}, found.config, recipe=recipe,
        metadata=carried_metadata(found.metadata(found.newest)),
    )  # fmt: skip


def tuned_sampler(config: OptimizeConfig, job: Job, rows: Tensor) -> SamplerConfig | None:
    """The sampler that rows are to be sampled with; None where coefficients alone were searched."""
    if config.search.tune == (COEFFICIENTS,):
        return None
    sampler, values = config.sampler or SamplerConfig(), setup_of(job.map, rows).guidance
    if job.guide is not None:
        sampler = dataclasses.replace(sampler, guide=GUIDE_FOLDER)
    elif sampler.guide is not None and Path(sampler.guide).is_absolute():
        sampler = dataclasses.replace(sampler, guide=Path(sampler.guide).name)
    if values is None:
        return sampler
    strength, low, high = values.tolist()
    return dataclasses.replace(
        sampler, guidance=strength, guidance_interval=(low, high), guidance_ends="shared"
    )


WIDTH: Final = 480  # pixels that a grid is enlarged to, or nearly so


def write_samples(
    run: RunDir, job: Job, merges: Mapping[str, Tensor], comparison: Comparison, tracker: Tracker
) -> None:
    """RUN/samples and RUN/before-after.png: images of merges (G, K) by entry, on equal seeds.

    The seeds count up from that of the run, as those of `mergerl sample --seed` do. An entry whose
    samples are not finite has no picture, and neither has what is no image.
    """
    if not job.parts.makes_images:
        return
    merged, settings = job.final_rollout, job.parts.settings
    seed = settings.seed
    count, columns = picture_layout(settings.autoencoder, job.parts.shape)
    labels = balanced_labels(count, job.num_classes)
    noise = merged.rollout.noise(range(seed, seed + count))
    tracker.phase("pictures", len(merges) * count)
    panels, size = [], (0, 0)
    for entry, rows in merges.items():
        merged.merge(rows)
        try:
            images = merged.rollout.images(noise, labels)
        except NonFiniteSamplesError:
            continue
        if images.dtype != torch.uint8 or images.ndim != 4:  # a decoder of the user's
            return
        size = (images.shape[2], images.shape[3])
        write_png(run.path / f"samples/{entry}.png", image_grid(images, columns, padding=0))
        grid = image_grid(images, columns)
        score = interval(comparison.summary(entry)[comparison.headline])
        caption = f"{entry}\n{NAMES[comparison.headline]} FID {score}"
        panels.append((caption, enlarge(grid, max(1, WIDTH // grid.shape[-1]))))
    if panels:
        write_picture(run.path / "before-after.png", side_by_side(panels))
        shown = [int(label) for label in labels] if job.num_classes else [None] * count
        record = {"height": size[0], "width": size[1], "columns": columns, "first_seed": seed}
        run.write("samples/samples.json", {**record, "labels": shown})
