"""Reference statistics from images: streamed, resumable, optionally in two halves."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_rl.config import ReferenceConfig, with_settings
from merge_rl.core.distances.statistics import FeatureStats
from merge_rl.errors import ConfigError, ImageError, TooFewSamplesError
from merge_rl.interfaces import FeatureExtractor, NullTracker, Tracker
from merge_rl.parallel import joined
from merge_rl.rng import draw_subset, stream
from merge_rl.storage.files import (
    ImageSource,
    WorkFolder,
    locked_output,
    open_images,
    require_new,
)
from merge_rl.version import __version__
from merge_rl.workflows.reference.file import save_reference
from merge_rl.workflows.reference.formats import few_images
from merge_rl.workflows.reference.moments import (
    Collected,
    CollectPlan,
    collect,
    help_collect,
    kept_features,
)
from merge_rl.workflows.rollout import device_facts, own_device, require_agreement


def build_reference(
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    extractor: FeatureExtractor,
    extractor_sha256: str | None = None,
    config: ReferenceConfig | None = None,
    tracker: Tracker | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Write statistics of a folder, zip or .npz of images; say what was made.

    Images stream through the extractor; beside the moments nothing grows with their number. An
    interrupted call leaves its work in a hidden folder beside `out`, and the same call goes on from
    there: the files come out as if nothing had happened, bit for bit.

    Args:
        images: what `open_images` takes.
        out: file to write; must not exist. With `split` two, with "-a" and "-b" before the ending.
        extractor, extractor_sha256: recorded; statistics of another one are refused later.
        config: settings as of `mergerl reference`; it must not say otherwise than the call.
        tracker: hears of progress.
        settings: any of `ReferenceConfig` by its name. `keep_features` may be the rows of features
            to keep at most in each file, spread evenly over the images, for KID and precision /
            recall.

    Raises ImageError for images that are broken, or of mixed size or mode, and
    TooFewSamplesError for fewer than two.
    """
    said, keep = _kept(config, settings)
    outs = _outputs(Path(out), said.split)
    for file in outs:
        require_new(file)
    source = open_images(images)
    plan = _plan(source, str(images), said, keep, len(outs))
    key = _key(source, said, keep, extractor, extractor_sha256)
    with joined() as group:
        placed = own_device(said.device, group.place)
        if group.size > 1:
            facts = {"version": __version__, "work": key, "device": device_facts(placed)}
            require_agreement(group, facts)
        if not group.leads:
            help_collect(
                source, plan, extractor, group, device=placed, skip_broken=said.skip_broken
            )
            return dict(group.broadcast(phase="end"))
        tracker = tracker or NullTracker()
        tracker.phase("reference", len(plan.rows))
        with locked_output(out):
            work = WorkFolder(Path(out), key)
            found = collect(
                source, plan, extractor, work, device=placed, skip_broken=said.skip_broken,
                on_images=tracker.advance, group=group,
            )  # fmt: skip
            document = _write(outs, source, plan, found, work, extractor, extractor_sha256)
            work.remove()
        for text in [*source_notes(source), *_warnings(document)]:
            tracker.event({"kind": "warning", "text": text})
        group.broadcast(document, phase="end")
        return document


def _kept(config: ReferenceConfig | None, settings: dict[str, Any]) -> tuple[ReferenceConfig, int]:
    """The settings, and the rows of features that each file keeps at most."""
    keep = settings.pop("keep_features", None)
    said = with_settings(ReferenceConfig, config, **settings)
    if type(keep) is not int:
        keep = said.max_features if keep or said.keep_features else 0
    if keep < 0:
        raise ConfigError(f"expected kept features >= 0, got {keep}")
    return said, keep


def _key(
    source: ImageSource,
    said: ReferenceConfig,
    keep: int,
    extractor: FeatureExtractor,
    sha256: str | None,
) -> dict[str, Any]:
    """All that the work of an interrupted call depends on."""
    return {
        "images": source.fingerprint, "extractor": extractor.name, "sha256": sha256,
        "dim": extractor.dim, "batch": said.batch, "keep": keep, "split": said.split,
        "skip_broken": said.skip_broken, "limit": said.limit, "balanced": said.balanced,
        "seed": said.seed,
    }  # fmt: skip


def _plan(
    source: ImageSource, images: str, said: ReferenceConfig, keep: int, files: int
) -> CollectPlan:
    """Which images there are statistics of, and in which file each."""
    rows = choose_rows(source, said.limit, balanced=said.balanced, seed=said.seed)
    if len(rows) < 2 * files:
        raise TooFewSamplesError(
            f"{images}: expected at least {2 * files} images, found {len(rows)}"
        )
    parts = torch.zeros(len(rows), dtype=torch.int64)
    if said.split:
        parts[split_rows(source, rows, said.seed)] = 1
    return CollectPlan(rows, parts, _spread(parts, keep), files, said.batch)


def _write(
    outs: Sequence[Path],
    source: ImageSource,
    plan: CollectPlan,
    found: Collected,
    work: WorkFolder,
    extractor: FeatureExtractor,
    sha256: str | None,
) -> dict[str, Any]:
    """The files of all parts, and what to tell about them."""
    stats = [_enough(part, source, found) for part in found.stats]
    kept, kind = kept_features(work, found), found.kind
    resolution = kind.width if kind and kind.width == kind.height else None
    files = []
    for part, (out, moments) in enumerate(zip(outs, stats, strict=True)):
        features, labels = None, None
        if kept is not None:
            chosen = kept[0][plan.parts[kept[0]] == part]
            features = kept[1][plan.parts[kept[0]] == part]
            labels = None if source.labels is None else source.labels[plan.rows[chosen]]
        save_reference(
            out, moments, extractor=extractor.name, extractor_sha256=sha256,
            preprocessing=str(getattr(extractor, "preprocessing", extractor.name)),
            resolution=resolution, source=_source_text(source, len(outs), part),
            features=features, labels=labels,
        )  # fmt: skip
        rows = 0 if features is None else len(features)
        files.append({"out": str(out), "images": moments.count, "features_kept": rows})
    return {
        "files": files,
        "extractor": extractor.name,
        "extractor_sha256": sha256,
        "dim": extractor.dim,
        "resolution": resolution,
        "left_out": source.left_out_text or None,
        "broken": len(found.broken),
        "first_broken": list(found.broken[:10]),
    }


def _enough(stats: FeatureStats | None, source: ImageSource, found: Collected) -> FeatureStats:
    if stats is None or stats.count < 2:
        raise TooFewSamplesError(
            f"{source.path}: expected at least 2 sound images for each file of statistics, found "
            f"{stats.count if stats else 0} ({len(found.broken)} broken)"
        )
    return stats


def _source_text(source: ImageSource, num_parts: int, part: int) -> str:
    half = f", half {'ab'[part]}" if num_parts > 1 else ""
    return f"{source.path.name}{half}"


def source_notes(source: ImageSource) -> list[str]:
    """What of a source is not used, and why."""
    notes = [source.left_out_text] if source.left_out_text else []
    if source.labels is None and source.label_problem:
        notes.append(f"labels left aside: {source.label_problem}")
    return notes


def _warnings(document: dict[str, Any]) -> list[str]:
    texts = []
    if document["broken"]:
        first = document["first_broken"][0]
        texts.append(f"{document['broken']} broken images skipped; first: {first}")
    fewest = min(file["images"] for file in document["files"])
    return [*texts, *few_images(fewest, document["dim"])]


def _outputs(out: Path, split: bool) -> list[Path]:
    if out.suffix != ".safetensors":
        raise ConfigError(f"expected an output that ends in .safetensors, got {out.name!r}")
    return [out.with_name(f"{out.stem}-{half}{out.suffix}") for half in "ab"] if split else [out]


def _spread(parts: Tensor, keep: int) -> Tensor:
    """(N,) bool: at most `keep` members of each part, evenly over it."""
    chosen = torch.zeros(len(parts), dtype=torch.bool)
    for part in sorted(set(parts.tolist())):
        members = (parts == part).nonzero()[:, 0]
        count = len(members)
        index = torch.arange(count, dtype=torch.int64)
        kept = min(keep, count)
        # One of every count / kept members: where the running share passes a whole number.
        chosen[members] = (index + 1) * kept // count > index * kept // count
    return chosen


def choose_rows(source: ImageSource, limit: int | None, *, balanced: bool, seed: int) -> Tensor:
    """Ascending rows (N,) of at most `limit` images of a source, drawn by the seed.

    Where the labels are known, classes keep their shares; with `balanced` each class gives the
    same number, within one. Raises ImageError if that is asked of images without labels.
    """
    count, labels = len(source), source.labels
    if limit is not None and limit < 2:
        raise ConfigError(f"expected a limit of at least 2 images, got {limit}")
    if balanced and labels is None:
        expected = (
            'expected a dataset.json with "labels" beside the images, or an array "labels" in '
            "their file"
        )
        raise ImageError(
            f"{source.path}: class-balanced subsets need labels; {source.label_problem or expected}"
        )
    generator = stream(seed, "images")
    if balanced and labels is not None:
        return _balanced_rows(labels, count if limit is None else limit, generator)
    if limit is None or limit >= count:
        return torch.arange(count)
    classes = torch.zeros(count, dtype=torch.int64) if labels is None else labels
    return draw_subset(classes, limit, generator)


def split_rows(source: ImageSource, rows: Tensor, seed: int) -> Tensor:
    """Which half each row falls in, (N,) bool, drawn by the seed; classes keep their shares."""
    labels = torch.zeros(len(rows), dtype=torch.int64)
    if source.labels is not None:
        labels = source.labels[rows]
    second = torch.zeros(len(rows), dtype=torch.bool)
    second[draw_subset(labels, len(rows) // 2, stream(seed, "halves"))] = True
    return second


def _balanced_rows(labels: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    sizes = Counter(labels.tolist())
    each = min(limit // len(sizes), *sizes.values())
    if each == 0:
        raise TooFewSamplesError(
            f"expected a balanced subset of at least {len(sizes)} images, one of each class, "
            f"got a limit of {limit}"
        )
    picked = []
    for label in sorted(sizes):
        of_class = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(of_class), generator=generator)
        picked.append(of_class[order[:each]])
    return torch.cat(picked).sort().values
