"""Whole settings by name, under whatever else is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from merge_rl.errors import UnknownNameError

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    # Li et al., 2026 (arXiv:2607.02291), sections 4.1 and 4.3: EMANet from the newest checkpoint,
    # one free coefficient a checkpoint, std fixed to 1, the best quarter of the candidates, ratio
    # clip 1e-4, the whole pool renewed every 10 rounds, the last policy mean reported. What a unit
    # of theta is worth, the population and Adam's step the paper does not say.
    "paper": {
        "merge": {"map": "free", "start": "newest", "scale": 0.02, "grouping": "one"},
        "search": {
            "name": "policy-gradient", "policy": "mlp", "update": "adam", "std": 1.0,
            "learn_std": False, "top_fraction": 0.25, "clip": 1e-4, "antithetic": False,
            "betas": [0.9, 0.999], "decay": 1.0, "learning_rate": 0.1, "start_share": 0.0,
            "final_share": 0.0, "incumbents": 0,
        },
        "reward": {
            "name": "fid-subset", "pool_size": 5000, "subset_size": 50, "refresh": "10",
        },
    },
}  # fmt: skip


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset, as a config file would have them; UnknownNameError for others."""
    if name not in PRESETS:
        raise UnknownNameError("preset", name, PRESETS)
    return {key: dict(value) for key, value in PRESETS[name].items()}
