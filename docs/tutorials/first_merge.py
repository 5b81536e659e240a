"""
A first merge, step by step
===========================

The package comes with small training runs of handwritten digits. Here the raw snapshots of one
are merged, with a budget so small that it takes seconds; the defaults ask for 50,000 images.
"""

# sphinx_gallery_thumbnail_number = 2

# %%
# A set of checkpoints
# --------------------
# ``mergerl demo digits`` writes the runs; this is the same from Python. Opening a set reads headers
# only.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import merge_rl as mrl
from merge_rl.demo import write_demo

folder = Path(tempfile.mkdtemp())
runs = write_demo(folder / "digits")
ckpts = mrl.open_checkpoints(runs["sit"], track="raw")
print(len(ckpts), "checkpoints, the newest", ckpts.names[-1])

# %%
# A merge without a search
# ------------------------
# ``merge`` sums weights with the coefficients it is given: here the average of the newest four.

average = mrl.merge(ckpts, [0, 0, 0, 0, 0.25, 0.25, 0.25, 0.25])
print(len(average), "tensors, the first is", next(iter(average)))

# %%
# A search
# --------
# 5,000 images, made with 4 Euler steps, where a good merge gains much: a pool of images is renewed
# bit by bit, and the gradient of its distance to real digits says where to go. By default a search
# begins at the best merge that costs nothing; this one begins at the newest snapshot. At the end
# start and result are scored on fresh seeds, against digits that the search never saw.

result = mrl.optimize(
    runs["sit"],
    out=folder / "run",
    track="raw",
    budget=5000,
    searcher="pathwise",
    start="newest",
    start_share=0,
    final_share=0,
    solver="euler",
    num_steps=4,
    num_images=100,
    repeats=3,
    selection_images=50,
    progress=False,
)
print(result.verdict)

# %%
# Every tensor has a coefficient for every checkpoint; those of a tensor have the sum 1, and may be
# negative. The search began with 1 for the newest and 0 for all others: this is what it changed.

change = result.coefficients - torch.eye(len(ckpts))[-1]
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
limit = float(change.abs().max())
picture = axes.imshow(change, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
axes.set(title="change of the coefficients", xlabel="checkpoint, oldest to newest", ylabel="tensor")
figure.colorbar(picture)
plt.show()

# %%
# Before and after
# ----------------
# The same noise and classes through the newest snapshot and through the merge.

noise = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
labels = torch.arange(20) % 10
models = {"newest": ckpts.paths[-1], "merged": result.run_dir / "merged"}
figure, rows = plt.subplots(2, 1, figsize=(8, 2.4), layout="constrained")
for axes, (name, path) in zip(rows, models.items(), strict=True):
    with torch.no_grad():
        samples = mrl.sample(mrl.load_model(path), noise, labels, solver="euler", num_steps=4)
    axes.imshow(torch.cat(samples[:, 0].unbind(), 1), cmap="gray_r", vmin=-1, vmax=1)
    axes.set(title=name, xticks=[], yticks=[])
plt.show()
