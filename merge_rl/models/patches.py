"""What networks over square patches of an image have in common: their sizes, and their classes."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from merge_rl.core.network import Network
from merge_rl.core.sampling.compatibility import require_class_ids
from merge_rl.errors import ConfigError


def position_table(hidden_size: int, side: int) -> Tensor:
    """Sines and cosines of the tokens' coordinates: (side^2, hidden_size) float32, row by row.

    The first half of the channels is for the column, the second for the row; each half is
    [sin(p w_0), ..., cos(p w_0), ...] with w_k = 10000^(-4 k / hidden_size), in float64.
    """
    quarter = hidden_size // 4
    rates = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64).outer(rates)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, hidden_size / 2)
    columns = line.repeat(side, 1)
    rows = line.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()


class PatchNetwork(Network):
    """A network of tokens, each of p x p pixels, with classes and perhaps a null class.

    Args:
        input_size, patch_size, in_channels: H, p, C of images (B, C, H, H).
        hidden_size: D, a multiple of `parts`.
        num_classes: classes, without the null class.

    Raises ConfigError for sizes that do not divide as they must.
    """

    capturable = True
    # A constant that official files store as a parameter: carried by a merge like a buffer.
    fixed_names: Final = ("pos_embed",)

    def __init__(
        self,
        *,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        parts: tuple[int, ...],
        num_classes: int,
    ) -> None:
        super().__init__()
        divided = [("hidden_size", hidden_size, part) for part in parts]
        for name, whole, part in [("input_size", input_size, patch_size), *divided]:
            if part < 1 or whole < 1 or whole % part:
                raise ConfigError(f"expected {name} to be a multiple of {part}, got {whole}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes = num_classes
        table = torch.empty((input_size // patch_size) ** 2, hidden_size)
        if not table.is_meta:  # where only shapes matter, arithmetic would load a compiler
            table = position_table(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, H) of one sample."""
        return (self.in_channels, self.input_size, self.input_size)

    @property
    def label_dim(self) -> int:
        """Number of classes, without the null class."""
        return self.num_classes

    @property
    def null_label(self) -> int | None:
        """The label that means "no class"; None where the network has no such row."""
        return self.num_classes

    def drop_labels(self, labels: Tensor, drop: Tensor) -> Tensor:
        """Labels (B,) with the null class where drop (B,) is true: for training.

        The network never drops labels itself, so that a call is a function of its arguments alone.
        """
        return labels.masked_fill(drop, self._require_null())

    def _ids(self, labels: Tensor | None, x: Tensor) -> Tensor:
        if labels is None:
            return torch.full((len(x),), self._require_null(), device=x.device)
        if labels.shape != x.shape[:1] or labels.is_floating_point():
            raise ConfigError(
                f"expected class ids of shape {tuple(x.shape[:1])} as labels, found "
                f"{str(labels.dtype).removeprefix('torch.')} {tuple(labels.shape)}"
            )
        require_class_ids(labels, self.num_classes + (self.null_label is not None))
        return labels.to(x.device)

    def _require_null(self) -> int:
        if self.null_label is None:
            raise ConfigError(
                f"this {type(self).__name__} has no null class (its label table has "
                f"{self.num_classes} rows); expected a label for every image and no guidance"
            )
        return self.null_label
