"""
A UNet of diffusers: merged, and loaded by diffusers again
==========================================================

A training run of the library diffusers is a set of checkpoints as it is: ``checkpoint-N/unet`` and
the scheduler's config. Here a small ``UNet2DModel`` learns handwritten digits for some seconds; its
last snapshots are merged, and the library loads the result.
"""

# %%
# A training run
# --------------
# The usual loop: noise is added as the scheduler says, and the network predicts it. The learning
# rate stays high, so that the last snapshots circle about a good place. Each is written by the
# library's own ``save_pretrained``.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits

import merge_rl as mrl
from merge_rl.demo import write_demo

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp())
training = folder / "ddpm-digits"

digits = load_digits()
images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
labels = torch.from_numpy(digits.target)

unet = UNet2DModel(
    sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8,
    block_out_channels=(16, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=10,
)  # fmt: skip
scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
scheduler.save_pretrained(training / "scheduler")
optimizer = torch.optim.Adam(unet.parameters(), lr=3e-3)

for step in range(1, 401):
    rows = torch.randint(len(images), (64,))
    noise, when = torch.randn(64, 1, 8, 8), torch.randint(1000, (64,))
    noisy = scheduler.add_noise(images[rows], noise, when)
    predicted = unet(noisy, when, class_labels=labels[rows]).sample
    loss = (predicted - noise).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step >= 225 and step % 25 == 0:
        unet.save_pretrained(training / f"checkpoint-{step}" / "unet")

# %%
# A set without a conversion
# --------------------------
# Betas, what the network predicts and how steps are spaced are the scheduler's word.

checkpoints = mrl.open_checkpoints(training)
print(checkpoints.names)
print(mrl.load_model(training / "checkpoint-400").sample_shape)

# %%
# The search
# ----------
# Features and statistics of real digits come with the package. Euler's steps in the network's own
# noise levels are those of DDIM. So few images only show the way; a real search takes 50,000.

evaluation = write_demo(folder / "demo")["sit"] / "evaluation"
result = mrl.optimize(
    training,
    out=folder / "run",
    extractor="digits",
    extractor_weights=str(evaluation / "extractor.safetensors"),
    reference=str(evaluation / "reference.safetensors"),
    heldout=str(evaluation / "heldout.safetensors"),
    searcher="pathwise",
    budget=4000,
    solver="euler",
    num_steps=8,
    pool_size=500,
    num_images=200,
    repeats=3,
    selection_images=100,
    final_share=0,
    progress=False,
)
print(result)

# %%
# Back in the library
# -------------------
# The result lies in the library's layout. Its network, and its scheduler, sample without this
# package.

merged = UNet2DModel.from_pretrained(folder / "run" / "merged").eval()
ddim = DDIMScheduler.from_pretrained(
    folder / "run" / "merged", subfolder="scheduler", clip_sample=False
)
ddim.set_timesteps(25)
sample, classes = torch.randn(20, 1, 8, 8), torch.arange(20) % 10
with torch.no_grad():
    for when in ddim.timesteps:
        predicted = merged(sample, when, class_labels=classes).sample
        sample = ddim.step(predicted, when, sample).prev_sample

figure, axes = plt.subplots(2, 10, figsize=(8, 1.8))
for axis, picture in zip(axes.flat, sample[:, 0], strict=True):
    axis.imshow(picture, cmap="gray", vmin=-1, vmax=1)
    axis.axis("off")
figure.tight_layout()
