"""What each part of a search is worth: a searcher without it, or with another.

    python -m benchmarks.ablation [--set edm2] [--budget 20000] [--seeds 0,1,2]
                                  [--searcher policy-gradient]
                                  [--variants "default,rank shaping"]
                                  [--folder build/bench/ablation] [--out FILE.json]

A set of `benchmarks.sample_efficiency`; all variants are scored on the same fresh seeds, N = 2,000,
4 repeats, held-out FID. The folder is kept: what is done is not done again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.sample_efficiency import CASES, settings
from merge_rl.demo import write_demo
from merge_rl.workflows.compare.run import compare_searchers

FORMER = (
    "merge.grouping=one search.update=adam merge.map=affine merge.start=newest search.start_share=0"
)
VARIANTS = {
    "default": "",
    "one group": "merge.grouping=one",
    "stages": "merge.grouping=stages",
    "every block": "merge.grouping=blocks",
    "every tensor": "merge.grouping=tensors",
    "fixed width": "search.width_rate=0",
    "plain affine map": "merge.map=affine",
    "independent draws": "search.antithetic=false",
    "no momentum": "search.momentum=0",
    "learned std": "search.learn_std=true",
    "rank shaping": "search.shaping=rank",
    "best quarter": "search.top_fraction=0.25",
    "influence reward": "reward.name=fid-influence",
    "half the subset": "reward.subset_size=50",
    "start at the newest": "merge.start=newest",
    "Adam": "search.update=adam",
    "the former default": f"{FORMER} search.final_share=0",
    "the paper's": "preset=paper",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Parts of the default search.")
    parser.add_argument("--set", default="edm2", choices=CASES)
    parser.add_argument("--budget", type=int, default=20_000)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--searcher", default="policy-gradient")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--folder", type=Path, default=Path("build/bench/ablation"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    if not (given.folder / "digits").exists():
        write_demo(given.folder / "digits")
    document = compare_searchers(
        settings(given.folder / "digits", given.set, given.budget),
        out=given.folder / given.set,
        searchers=[
            f'{given.searcher} label="{name}" {VARIANTS[name]}'
            for name in given.variants.split(",")
        ],
        seeds=[int(text) for text in given.seeds.split(",")],
        curve_images=0,
    )
    for line in document["searchers"]:
        found = line["fid"]["heldout"]
        print(f"{line['searcher']:>20}: {found['median']:.3f} "
              f"[{found['low']:.3f}, {found['high']:.3f}]")  # fmt: skip
    for name, entry in document["fixed"].items():
        print(f"{name:>20}: {entry['fid']['heldout']['mean']:.3f}")
    if given.out:
        given.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
