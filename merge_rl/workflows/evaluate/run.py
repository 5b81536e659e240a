"""Scores of a model, of images or of features: repeats over disjoint blocks, with an interval."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from merge_rl.config import MODEL_IMAGES, EvaluateConfig, SamplerConfig, with_settings
from merge_rl.core.distances.intervals import summarize_repeats
from merge_rl.core.distances.statistics import check_features
from merge_rl.core.sampling.compatibility import prediction_of
from merge_rl.errors import TooFewSamplesError, about
from merge_rl.interfaces import Autoencoder, FeatureExtractor, Tracker
from merge_rl.parallel import joined
from merge_rl.parallel.group import Group
from merge_rl.progress import tracker_of
from merge_rl.rng import image_seeds
from merge_rl.storage.files import as_path, locked
from merge_rl.version import __version__
from merge_rl.workflows.assembly import (
    ExtractorId,
    Statistics,
    expected_extractor,
    extractor_of,
    find_extractor,
    find_references,
    image_size,
    load_model,
    name_extractor,
    network_rollout,
    notes_of,
    other_resolutions,
)
from merge_rl.workflows.evaluate.features import (
    block_features,
    blocks_of,
    image_features,
    sampler_summary,
)
from merge_rl.workflows.evaluate.inputs import Given
from merge_rl.workflows.evaluate.metrics import MetricScores, require_metrics
from merge_rl.workflows.reference import (
    FeatureStore,
    Reference,
    few_images,
    kind_to_score,
    load_features,
    weights_digest,
)
from merge_rl.workflows.report import EvaluateResult
from merge_rl.workflows.rollout import (
    DistributedRollout,
    MergedRollout,
    Rollout,
    device_facts,
    own_device,
    require_agreement,
    require_device,
)

FRECHET: Final = ("fid", "fid-infinity")


def evaluate(
    model: nn.Module | str | os.PathLike[str],
    *,
    reference: Statistics | None = None,
    heldout: Statistics | None = None,
    extractor: FeatureExtractor | str | None = None,
    extractor_sha256: str | None = None,
    sampler: SamplerConfig | Mapping[str, SamplerConfig] | None = None,
    autoencoder: Autoencoder | None = None,
    config: EvaluateConfig | None = None,
    tracker: Tracker | None = None,
    progress: bool = True,
    **settings: Any,
) -> EvaluateResult:
    """Scores against reference statistics: each metric's mean, 95 % interval and minimum.

    Args:
        model: network with `sample_shape` and `label_dim`, as `load_model` gives; a path of what it
            takes (a run, a set, a name of the Hub), of images (folder, .zip, .npz) or of features.
        reference, heldout: statistics, or files of them. Without a reference they are those of the
            run or set that the model lies in, and so is the extractor.
        extractor: what made the statistics' features: an object, or a name with
            `extractor_weights`; by default the one that the reference names.
        extractor_sha256: hash of an object's weights, compared with what the statistics record.
        sampler: solver settings, or several by name; by default those of the model's recipe, run or
            set: an ODE, and for networks that predict velocities (SiT) an SDE too, see
            `samplers_of`.
        autoencoder: from samples to images, as `load_autoencoder` gives, by default that of the
            model's run or set; pixel models need none.
        config: settings as of `mergerl evaluate`; it must not say otherwise than the call.
        tracker: hears of progress; by default it is printed, unless `progress` is off.
        settings: any of `EvaluateConfig` by its name. `metrics` may be a list; `num_images` is
            5,000 of a model by default, and all there are of images and features; FID is biased
            upward at small N: compare equal N only; papers use 50,000. A call with
            `save_features` that was cut short goes on from what is there, and ends in the same
            numbers.

    `result.score("fid", "heldout")` is one of the scores that come back; where there is only one
    block of images an interval's ends are None. Raises CheckpointError for
    what is no model, ConfigError where no reference is known or settings cannot work,
    StatisticsError for statistics of another extractor, NonFiniteSamplesError for samples that are
    not finite.
    """
    if isinstance(settings.get("metrics"), (list, tuple)):
        settings["metrics"] = ",".join(settings["metrics"])
    said = with_settings(EvaluateConfig, config, **settings)
    given = Given(
        reference or said.reference, heldout or said.heldout, extractor or said.extractor,
        said.extractor_weights, extractor_sha256, sampler or said.sampler, autoencoder,
    )  # fmt: skip
    document = _scored(model, given, said, tracker_of(tracker, progress))
    return EvaluateResult(document)


def _scored(
    model: nn.Module | str | os.PathLike[str], given: Given, said: EvaluateConfig, tracker: Tracker
) -> dict[str, Any]:
    require_device(said.device)
    path = "" if isinstance(model, nn.Module) else str(as_path(model, "model"))
    kind = kind_to_score(path) if path else "model"
    given, metrics = given.completed(path, kind, said.network), said.metric_names

    def begin(maker: ExtractorId, group: Group) -> EvaluationContext:
        references = find_references(given.statistics, maker)
        scores = MetricScores(
            metrics, references, device=said.device, max_rows=said.max_rows, seed=said.seed
        )
        notes = notes_of(references, maker)
        return EvaluationContext(group, scores, maker, said, tracker, notes, references)

    with joined() as group, locked(said.save_features if group.leads else None):
        if kind == "features":
            saved = load_features(path)
            job = begin(extractor_of(saved, given.extractor), group)
            return job.alone(lambda: job.document(kind, job.score_blocks(saved.features, path)))
        chosen = name_extractor(given.extractor, given.reference or "")
        if isinstance(chosen, str):
            require_scorable(chosen, given.weights, given.statistics, metrics)
        built, maker = find_extractor(chosen, given.weights, given.sha256, said.device)
        job = begin(maker, group)
        if kind == "images":
            return job.alone(lambda: job.document(kind, _of_images(job, path, built)))
        if not isinstance(model, nn.Module):
            model = load_model(path, network=said.network, announce=job.note)
        return _of_network(job, model, built, given)


def require_scorable(
    name: str,
    weights: str | None,
    references: Mapping[str, Statistics | None],
    metrics: Sequence[str],
) -> None:
    """Raise before weights are fetched for an extractor, statistics or metrics that do not fit.

    A module of the user's is known when it is called: for it names of metrics are looked at.
    """
    maker = expected_extractor(name, weights)
    require_metrics(metrics, find_references(references, maker) if maker else {})


@dataclass(frozen=True, eq=False)
class EvaluationContext:
    """What all ways of evaluating share."""

    group: Group
    scores: MetricScores
    maker: ExtractorId
    said: EvaluateConfig
    tracker: Tracker
    notes: list[str]
    references: Mapping[str, tuple[Reference, str]]

    def note(self, text: str) -> None:
        """Tell a sentence."""
        self.tracker.event({"kind": "note", "text": text})

    def document(self, kind: str, found: dict[str, Any]) -> dict[str, Any]:
        """What was found, with what to know about it."""
        rows = self.scores.rows_used
        return {
            "kind": kind,
            **found,
            **({} if rows is None else {"max_rows": rows}),
            **({"notes": self.notes} if self.notes else {}),
        }

    def note_doubts(self, count: int, resolution: int | None = None) -> None:
        """Note what makes scores of blocks of `count` images, of this side, doubtful."""
        self.notes.extend(other_resolutions(self.references, resolution))
        if not set(self.said.metric_names).isdisjoint(FRECHET):
            self.notes.extend(few_images(count, self.maker.dim))

    def alone(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What rank 0 does by itself; the others get its result."""
        ranks = DistributedRollout(self.group, ())
        if not self.group.leads:
            return dict(ranks.follow())
        document = work()
        ranks.end(document)
        return document

    def store(self, key: Mapping[str, Any]) -> FeatureStore | None:
        """Where features are kept, if they are."""
        if self.said.save_features is None:
            return None
        name, sha256, _ = self.maker
        return FeatureStore(Path(self.said.save_features), extractor=name, sha256=sha256, key=key)

    def score_blocks(
        self, features: Tensor, path: str, resolution: int | None = None
    ) -> dict[str, Any]:
        """Scores of disjoint blocks of what there is, of images of this side."""
        with about(path):
            check_features(features, at_least=2)
        blocks = blocks_of(features, self.said.num_images, self.said.repeats, self.said.seed, path)
        self.note_doubts(len(blocks[0]), resolution)
        found = [self.scores.of(block) for block in blocks]
        return {
            "num_images": len(blocks[0]), "repeats": len(blocks), "available": len(features),
            **summarize_repeats(found),
        }  # fmt: skip


def _of_images(job: EvaluationContext, images: str, extractor: FeatureExtractor) -> dict[str, Any]:
    found = image_features(
        images, extractor, batch=job.said.batch, device=job.said.device,
        skip_broken=job.said.skip_broken, store=job.store({}), tracker=job.tracker,
    )  # fmt: skip
    job.notes.extend(found.notes)
    document = job.score_blocks(found.features, images, found.resolution)
    return {**document, "broken": len(found.broken), "first_broken": found.broken[:10]}


def _of_network(
    job: EvaluationContext,
    network: nn.Module,
    extractor: FeatureExtractor,
    given: Given,
) -> dict[str, Any]:
    count = MODEL_IMAGES if job.said.num_images is None else job.said.num_images
    if count < 2:
        raise TooFewSamplesError(f"FID needs at least 2 images, got {count}")
    if job.said.repeats < 2:
        raise TooFewSamplesError(f"an interval needs at least 2 repeats, got {job.said.repeats}")
    if given.sampler is None and given.near is not None and given.near.note is not None:
        job.note(given.near.note)
    settings, device = given.samplers(network), own_device(job.said.device, job.group.place)
    rollout = network_rollout(
        network, next(iter(settings.values())), job.said.batch, device, Rollout,
        extractor=extractor, autoencoder=given.decoder(network), on_images=job.tracker.advance,
        announce=job.note,
    )  # fmt: skip
    parts = (network, rollout.guide, rollout.autoencoder, extractor)
    keyed = job.said.save_features is not None or job.group.size > 1
    key = {"networks": [weights_digest(part) for part in parts]} if keyed else {}
    if job.group.size > 1:
        ways = {name: sampler_summary(s, prediction_of(network)) for name, s in settings.items()}
        require_agreement(job.group, {
            "version": __version__, "weights of": key, "samplers": ways, "batch": job.said.batch,
            "device": device_facts(str(rollout.device)),
        })  # fmt: skip
    made = MergedRollout(None, rollout, name="network")
    ranks = DistributedRollout(job.group, (made,), job.note)
    if not job.group.leads:
        return dict(ranks.follow())
    job.note_doubts(count, image_size(rollout.shape, rollout.autoencoder))
    job.tracker.phase("evaluate", count * job.said.repeats * len(settings))
    found = {
        name: _section(job, made.with_sampler(chosen), name, count, job.store(key))
        for name, chosen in settings.items()
    }
    common = {"num_images": count, "repeats": job.said.repeats, "seed": job.said.seed}
    shown = next(iter(found.values())) if len(found) == 1 else {"samplers": found}
    document = job.document("model", {**common, **shown})
    ranks.end(document)
    return document


def _section(
    job: EvaluationContext, made: MergedRollout, name: str, count: int, store: FeatureStore | None
) -> dict[str, Any]:
    """Scores under one sampler."""
    rows = []
    for repeat in range(job.said.repeats):
        seeds = image_seeds(count, job.said.seed, "evaluate", repeat)
        piece = f"{name}-seed{job.said.seed}-{repeat}-{count}"
        rows.append(job.scores.of(block_features(made, seeds, name=piece, store=store)))
    summary = sampler_summary(made.rollout.sampler, prediction_of(made.rollout.model))
    return {"sampler": summary, **summarize_repeats(rows)}
