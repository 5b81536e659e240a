"""What a search costs through a function of the user's, against `optimize` on the same network.

    python -m benchmarks.function_cost [--pairs 3] [--budget 3000] [--count] [--out FILE.json]

The embedded EDM2 of the digits, the same sampler, extractor, budget and seed; policy gradient, and
along the gradient with half of the budget. Processor time of whole calls, by turns, one thread.
With `--count` the operations of one pair instead, and the elements that they made, which no other
program on the machine changes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import merge_rl as mrl
from merge_rl.config import SamplerConfig
from merge_rl.core.sampling.sampler import sample_with
from merge_rl.demo import write_demo
from merge_rl.registry import build_autoencoder, build_model
from merge_rl.storage.checkpoints import open_checkpoints
from merge_rl.workflows.assembly import build_extractor


def pair_of(source: Path, out: Path, searcher: str, budget: int) -> dict[str, Callable[[], object]]:
    """The two calls, by name; each takes a folder of its own."""
    opened = open_checkpoints(source, track="raw")
    said = opened.defaults
    decoder: Any = build_autoencoder()
    extractor, _ = build_extractor(said.extractor or "", str(said.extractor_weights))
    sampler, network = SamplerConfig(**said.sampler), build_model(opened.config or {})

    def generate(model: Any, seeds: Sequence[int], labels: Tensor) -> Tensor:
        noise, grads = mrl.seeded_noise(seeds, model.sample_shape), torch.is_grad_enabled()
        made = sample_with(sampler, model, noise, labels, through=(lambda v: v) if grads else None)
        features: Tensor = extractor(decoder.levels(made) if grads else decoder.decode(made))
        return features

    common: dict[str, Any] = {
        "budget": budget, "seed": 1, "searcher": searcher, "pool_size": 500, "subset_size": 50,
        "track": "raw", "progress": False,
    }  # fmt: skip
    places = (out / f"{searcher}-{i}" for i in range(10_000))
    return {
        "optimize": lambda: mrl.optimize(source, out=next(places), **common),
        "search": lambda: mrl.search(
            str(source), generate=generate, model=network, reference=str(said.reference),
            heldout=str(said.heldout), out=next(places), num_classes=10, **common,
        ),
    }  # fmt: skip


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, operations of torch are counted, and the elements of what they make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations, self.elements = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        first = made[0] if isinstance(made, (tuple, list)) and made else made
        self.operations += 1
        self.elements += first.numel() if isinstance(first, Tensor) else 0
        return made


def counts_of(call: Callable[[], object]) -> list[float]:
    """[operations, elements] of one call."""
    with Counted() as counted:
        call()
    return [counted.operations, counted.elements]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--budget", type=int, default=3000)
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        write_demo(Path(place) / "digits")
        for searcher, share in (("policy-gradient", 1), ("pathwise", 2)):
            calls = pair_of(
                Path(place) / "digits/edm2", Path(place), searcher, given.budget // share
            )
            if given.count:
                counts = found[searcher] = {name: counts_of(call) for name, call in calls.items()}
                ratios = [s / o for s, o in zip(counts["search"], counts["optimize"], strict=True)]
                print(f"{searcher}: {counts}: {ratios[0]:.3f} and {ratios[1]:.3f} (seed 1)")
                continue
            spent = found[searcher] = {name: [] for name in calls}
            for turn in range(given.pairs + 1):  # the first pair only warms up
                for name in list(calls)[:: -1 if turn % 2 else 1]:
                    began = time.process_time()
                    calls[name]()
                    spent[name] += [time.process_time() - began] if turn else []
            one, two = median(spent["optimize"]), median(spent["search"])
            print(
                f"{searcher}: optimize {one:.2f} s, search {two:.2f} s: {two / one:.3f} "
                f"(seed 1, {given.pairs} pairs)"
            )
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
