"""Guidance: away from a weaker network, or from the same network without a class."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_rl.interfaces import Denoiser


def autoguided(model: Denoiser, guide: Denoiser, guidance: float) -> Denoiser:
    """guide + guidance (model - guide), at the same x, sigma or t, labels.

    For denoised samples: Karras et al., 2024 (arXiv:2406.02507, equation 3). A path's velocity is
    linear in the denoised sample, so the same combination of velocities is the same guidance.
    """

    def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        weaker = guide(x, sigma, labels)
        return weaker + guidance * (model(x, sigma, labels) - weaker)

    return denoise


def classifier_free(
    model: Denoiser,
    null_label: int,
    guidance: float,
    *,
    channels: int | None = 3,
    low_memory: bool = False,
) -> Denoiser:
    """v_null + guidance (v_class - v_null) on the first channels; the others stay v_class.

    Ho & Salimans, 2022 (arXiv:2207.12598). The public samplers of SiT guide three of the four
    latent channels, and published numbers depend on it.

    Args:
        model: a network that takes class ids (B,), `null_label` among them.
        null_label: the id that means "no class".
        guidance: strength; 1 is off.
        channels: how many are guided (at most what there are); None for all.
        low_memory: two forward passes of B images instead of one of 2B.
    """

    def denoise(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        null = torch.full((len(x),), null_label, device=x.device)
        if labels is None:  # nothing to be guided towards
            return model(x, t, null)
        if low_memory:
            with_class, without = model(x, t, labels), model(x, t, null)
        else:
            both = model(torch.cat([x, x]), t, torch.cat([labels.to(null), null]))
            with_class, without = both.chunk(2)
        mixed = without + guidance * (with_class - without)
        if channels is None or channels >= x.shape[1]:
            return mixed
        return torch.cat([mixed[:, :channels], with_class[:, channels:]], dim=1)

    return denoise
