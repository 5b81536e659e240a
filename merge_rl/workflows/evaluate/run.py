"""Scores of a model, of images or of features: repeats over disjoint blocks, with an interval."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from merge_rl.config import SamplerConfig
from merge_rl.core.distances.intervals import summarize_repeats
from merge_rl.core.sampling.compatibility import prediction_of
from merge_rl.errors import StatisticsError, TooFewSamplesError
from merge_rl.interfaces import Autoencoder, FeatureExtractor, NullTracker, Tracker
from merge_rl.parallel import joined
from merge_rl.parallel.group import Group
from merge_rl.rng import image_seeds
from merge_rl.storage.files import locked
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
    samplers_of,
)
from merge_rl.workflows.evaluate.metrics import MAX_ROWS, MetricScores, require_metrics
from merge_rl.workflows.reference import (
    FeatureStore,
    Reference,
    few_images,
    kind_of,
    load_features,
    weights_digest,
)
from merge_rl.workflows.rollout import (
    DistributedRollout,
    MergedRollout,
    Rollout,
    device_facts,
    own_device,
    require_agreement,
    require_device,
)

NUM_IMAGES: Final = 50_000
FRECHET: Final = ("fid", "fid-infinity")


def evaluate(
    model: nn.Module | str | os.PathLike[str],
    *,
    reference: Statistics,
    extractor: FeatureExtractor | str | None = None,
    extractor_weights: str | None = None,
    extractor_sha256: str | None = None,
    heldout: Statistics | None = None,
    metrics: Sequence[str] = ("fid",),
    num_images: int | None = None,
    repeats: int = 3,
    sampler: SamplerConfig | Mapping[str, SamplerConfig] | None = None,
    autoencoder: Autoencoder | None = None,
    batch: int = 250,
    device: str = "cpu",
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    save_features: str | os.PathLike[str] | None = None,
    skip_broken: bool = False,
    tracker: Tracker | None = None,
) -> dict[str, Any]:
    """Scores against reference statistics: each metric's mean, 95 % interval and minimum.

    Args:
        model: network with `sample_shape` and `label_dim`, as `load_model` gives, or a path: of a
            model, of images (folder, .zip, .npz) or of saved features.
        reference, heldout: statistics, or files of them.
        extractor: what made the statistics' features: an object, or a name with
            `extractor_weights`; by default the one that the reference names.
        extractor_sha256: hash of an object's weights, compared with what the statistics record.
        metrics: "fid", "kid", "mmd", "prdc", "fid-infinity". Those in between compare with
            features, which the reference must hold.
        num_images: N of one repeat; by default 50,000 of a model, and all images or features that
            there are. FID is biased upward at small N: compare equal N only.
        repeats: of a model at least 2, each with a block of seeds of its own; EDM2 reports the
            minimum of 3. Of images and features as many as there are images for.
        sampler: solver settings, or several by name; by default an ODE, and for networks that
            predict velocities (SiT) an SDE too, see `samplers_of`.
        autoencoder: from samples to images, as `load_autoencoder` gives; pixel models need none.
        batch, device: bounds memory, says where to work.
        seed: of images, no two seeds sharing one, and of draws of the blocks and rows compared.
        max_rows: rows of either set that metrics over pairs of rows compare.
        save_features: folder for the features of every block. A call that was cut short goes on
            from what is there, and ends in the same numbers.
        skip_broken: leave out images that cannot be read, and count them; `tracker` hears of it.

    Returns {"kind", "num_images", "repeats", METRIC: {"reference": {"mean", "low", "high", "min",
    "values"}}}; for several samplers the metrics lie in {"samplers": {NAME: ...}}. Where there is
    only one block an interval's ends are None. Never a score for a failure: StatisticsError for
    statistics of another extractor, NonFiniteSamplesError for samples that are not finite.
    """
    require_device(device)
    path = "" if isinstance(model, nn.Module) else os.fspath(model)
    kind = kind_of(path) if path else "model"
    if kind == "reference":
        raise StatisticsError(
            f"{path} holds statistics; expected a model, images, or features to compare"
        )

    def begin(maker: ExtractorId, group: Group) -> EvaluationContext:
        references = find_references({"reference": reference, "heldout": heldout}, maker)
        scores = MetricScores(metrics, references, device=device, max_rows=max_rows, seed=seed)
        return EvaluationContext(
            group, scores, maker, batch, device, seed, repeats, num_images,
            tracker or NullTracker(), save_features, notes_of(references, maker), references,
            set(metrics),
        )  # fmt: skip

    with joined() as group, locked(save_features if group.leads else None):
        if kind == "features":
            saved = load_features(path)
            job = begin(extractor_of(saved, extractor), group)
            return job.alone(lambda: job.document(kind, job.score_blocks(saved.features, path)))
        chosen = name_extractor(extractor, reference)
        if isinstance(chosen, str):
            given = {"reference": reference, "heldout": heldout}
            require_scorable(chosen, extractor_weights, given, metrics)
        built, maker = find_extractor(chosen, extractor_weights, extractor_sha256, device)
        job = begin(maker, group)
        if kind == "images":
            return job.alone(lambda: job.document(kind, _of_images(job, path, built, skip_broken)))
        network = model if isinstance(model, nn.Module) else load_model(path, announce=job.note)
        return _of_network(job, network, built, sampler, autoencoder)


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
    batch: int
    device: str
    seed: int
    repeats: int
    num_images: int | None
    tracker: Tracker
    folder: str | os.PathLike[str] | None
    notes: list[str]
    references: Mapping[str, tuple[Reference, str]]
    metrics: set[str]

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
        if not self.metrics.isdisjoint(FRECHET):
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
        if self.folder is None:
            return None
        name, sha256, _ = self.maker
        return FeatureStore(Path(self.folder), extractor=name, sha256=sha256, key=key)

    def score_blocks(
        self, features: Tensor, path: str, resolution: int | None = None
    ) -> dict[str, Any]:
        """Scores of disjoint blocks of what there is, of images of this side."""
        blocks = blocks_of(features, self.num_images, self.repeats, self.seed, path)
        self.note_doubts(len(blocks[0]), resolution)
        found = [self.scores.of(block) for block in blocks]
        return {
            "num_images": len(blocks[0]), "repeats": len(blocks), "available": len(features),
            **summarize_repeats(found),
        }  # fmt: skip


def _of_images(
    job: EvaluationContext, images: str, extractor: FeatureExtractor, skip_broken: bool
) -> dict[str, Any]:
    found = image_features(
        images, extractor, batch=job.batch, device=job.device, skip_broken=skip_broken,
        store=job.store({}), tracker=job.tracker,
    )  # fmt: skip
    job.notes.extend(found.notes)
    document = job.score_blocks(found.features, images, found.resolution)
    return {**document, "broken": len(found.broken), "first_broken": found.broken[:10]}


def _of_network(
    job: EvaluationContext,
    network: nn.Module,
    extractor: FeatureExtractor,
    sampler: SamplerConfig | Mapping[str, SamplerConfig] | None,
    autoencoder: Autoencoder | None,
) -> dict[str, Any]:
    count = NUM_IMAGES if job.num_images is None else job.num_images
    if count < 2:
        raise TooFewSamplesError(f"FID needs at least 2 images, got {count}")
    if job.repeats < 2:
        raise TooFewSamplesError(f"an interval needs at least 2 repeats, got {job.repeats}")
    if isinstance(sampler, SamplerConfig):
        sampler = {"sde" if sampler.is_sde else "ode": sampler}
    settings = dict(sampler or samplers_of(network))
    rollout = network_rollout(
        network, next(iter(settings.values())), job.batch, own_device(job.device, job.group.place),
        Rollout, extractor=extractor, autoencoder=autoencoder, on_images=job.tracker.advance,
    )  # fmt: skip
    parts = (network, rollout.guide, rollout.autoencoder, extractor)
    keyed = job.folder is not None or job.group.size > 1
    key = {"networks": [weights_digest(part) for part in parts]} if keyed else {}
    if job.group.size > 1:
        ways = {name: sampler_summary(s, prediction_of(network)) for name, s in settings.items()}
        require_agreement(job.group, {
            "version": __version__, "weights of": key, "samplers": ways, "batch": job.batch,
            "device": device_facts(str(rollout.device)),
        })  # fmt: skip
    made = MergedRollout(None, rollout, name="network")
    ranks = DistributedRollout(job.group, (made,), job.note)
    if not job.group.leads:
        return dict(ranks.follow())
    job.note_doubts(count, image_size(rollout.shape, rollout.autoencoder))
    job.tracker.phase("evaluate", count * job.repeats * len(settings))
    found = {
        name: _section(job, made.with_sampler(chosen), name, count, job.store(key))
        for name, chosen in settings.items()
    }
    common = {"num_images": count, "repeats": job.repeats, "seed": job.seed}
    shown = next(iter(found.values())) if len(found) == 1 else {"samplers": found}
    document = job.document("model", {**common, **shown})
    ranks.end(document)
    return document


def _section(
    job: EvaluationContext, made: MergedRollout, name: str, count: int, store: FeatureStore | None
) -> dict[str, Any]:
    """Scores under one sampler."""
    rows = []
    for repeat in range(job.repeats):
        seeds = image_seeds(count, job.seed, "evaluate", repeat)
        piece = f"{name}-seed{job.seed}-{repeat}-{count}"
        rows.append(job.scores.of(block_features(made, seeds, name=piece, store=store)))
    summary = sampler_summary(made.rollout.sampler, prediction_of(made.rollout.model))
    return {"sampler": summary, **summarize_repeats(rows)}
