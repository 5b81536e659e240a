"""A rollout whose candidates differ in guidance, and in the guide's coefficients, too."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merge_rl.core.merging.live_model import LiveModel
from merge_rl.core.merging.tuned_map import Layout, Setup
from merge_rl.workflows.rollout.rollout import MergedRollout, Rollout


class TunedRollout(MergedRollout):
    """A merged rollout whose items' coefficients are rows of a layout.

    Rows of coefficients alone have the guidance of the sampler, and the guide as it starts.

    Args:
        live, rollout, name: as of `MergedRollout`; the guide of the rollout is that of `guide`.
        layout: of the rows.
        guide: sets the guide's weights; None for one that stays as it is.
        guide_start: its coefficients (G', K') where rows say nothing of them.
    """

    def __init__(
        self,
        live: LiveModel,
        rollout: Rollout,
        *,
        name: str,
        layout: Layout,
        guide: LiveModel | None = None,
        guide_start: Tensor | None = None,
    ) -> None:
        super().__init__(live, rollout, name=name)
        self.layout, self.guide, self._guide_start = layout, guide, guide_start

    def merge(self, coefficients: Tensor | None) -> None:
        """Set network, guidance and guide to rows of the layout."""
        if coefficients is None:
            return
        setup = self.layout.split(coefficients)
        super().merge(setup.coefficients)
        self.rollout.guidance = setup.guidance
        rows = self._guide_start if setup.guide is None else setup.guide
        if self.guide is not None and rows is not None:
            self.guide.set_coefficients(rows)

    @property
    def lives(self) -> list[LiveModel]:
        """What sets weights by coefficients: the network, and a guide that is searched."""
        return [live for live in (self.live, self.guide) if live is not None]

    def gradient_rows(self, gradients: Sequence[Tensor], guidance: Tensor | None) -> Tensor:
        """The gradient of rows, from those of `lives`' coefficients and of guidance (3,)."""
        own, *guide = gradients
        if not self.layout.guidance:
            return self.layout.join(Setup(own, None, *guide))
        return self.layout.join(
            Setup(own, own.new_zeros(3) if guidance is None else guidance, *guide)
        )
