"""What a comparison's results are worth by metrics that no search saw.

    python -m benchmarks.unseen build/bench/searchers/sit [--out FILE.json]

A folder of `benchmarks.sample_efficiency`. Pixels, not features: Fréchet and kernel distance,
precision and recall against all digits, and how many an SVM, trained on real digits, reads as what
was asked for. N = 2,000 fresh images of each result; median [range] over the search seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from sklearn.svm import SVC
from torch import Tensor

from benchmarks.digits_data import load_images
from merge_rl.config import OptimizeConfig, from_mapping
from merge_rl.core.distances.frechet import frechet_distance
from merge_rl.core.distances.kernels import kernel_distance
from merge_rl.core.distances.neighbours import prdc
from merge_rl.core.distances.statistics import feature_stats
from merge_rl.core.sampling.compatibility import balanced_labels
from merge_rl.rng import image_seeds
from merge_rl.storage.checkpoints import open_checkpoints
from merge_rl.storage.runs import SETTINGS, RunDir
from merge_rl.workflows.assembly import Job, build_job, resolve_config
from merge_rl.workflows.compare.scores import spread_of
from merge_rl.workflows.compare.trials import SearcherSpec

COUNT, NEIGHBOURS = 2000, 5


def pixel_metrics() -> Callable[[Tensor, Tensor], dict[str, float]]:
    """Images uint8 (N, 1, 8, 8) and labels (N,) -> the metrics by name."""
    images, digits = load_images()
    real = images.flatten(1).double() / 255
    moments, reader = feature_stats(real), SVC(gamma=0.5, C=10).fit(real.numpy(), digits.numpy())

    def metrics(made: Tensor, labels: Tensor) -> dict[str, float]:
        rows = made.flatten(1).double() / 255
        near = prdc(real, rows[: len(real)], NEIGHBOURS)
        return {
            "pixel FID x 100": 100 * float(frechet_distance(feature_stats(rows), moments)),
            "pixel KID x 1,000": 1000 * float(kernel_distance(rows, real)),
            "precision": near.precision,
            "recall": near.recall,
            "accuracy": float((reader.predict(rows.numpy()) == labels.numpy()).mean()),
        }

    return metrics


def images_of(job: Job, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Fresh images of coefficients (G, K), and their labels."""
    merged, labels = job.final_rollout, balanced_labels(COUNT, job.num_classes)
    if merged.live is not None:
        merged.live.set_coefficients(rows)
    noise = merged.rollout.noise(image_seeds(COUNT, 0, "unseen"))
    return merged.rollout.images(noise, labels), labels


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Metrics that no search saw.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    compared, begun = RunDir(given.folder).read("compare.json"), RunDir(given.folder).read(SETTINGS)
    if compared is None or begun is None:
        parser.error(f"no finished comparison in {given.folder}")
    config = from_mapping(OptimizeConfig, begun["settings"]["config"])
    opened = open_checkpoints(config.checkpoints, track=config.track, select=config.select or None)
    job, metrics = build_job(resolve_config(config, opened), opened, print), pixel_metrics()
    found = {"newest": [metrics(*images_of(job, job.coefficients(opened.newest)))]}
    for line in compared["searchers"]:
        results = [torch.tensor(run["coefficients"]).double() for run in line["runs"]]
        starts = {str(run["start"]) for run in line["runs"]}
        # Each has groups of tensors of its own.
        slug, seed = SearcherSpec(line["searcher"], line["name"]).slug, line["runs"][0]["seed"]
        path = given.folder / f"{slug}-seed{seed}"
        job = build_job(RunDir.open(path).config(), opened, print)
        found[line["searcher"]] = [metrics(*images_of(job, rows)) for rows in results]
        print(f"{line['searcher']}: began at {', '.join(sorted(starts))}")
    document = {
        name: {metric: spread_of([row[metric] for row in rows]) for metric in rows[0]}
        for name, rows in found.items()
    }
    for name, spreads in document.items():
        values = (
            f"{m} {s['median']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" for m, s in spreads.items()
        )
        print(f"{name:>20}: {'  '.join(values)}")
    if given.out:
        given.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
