"""Fine-tuning by the reward's own gradient: through features, decoder and steps of a rollout."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from merge_rl.config import UpdateConfig
from merge_rl.core.network import against
from merge_rl.workflows.finetune.learner import Learner
from merge_rl.workflows.finetune.rollouts import KeptRollouts, PolicyRollout
from merge_rl.workflows.finetune.updates import Update, UpdateStats
from merge_rl.workflows.rollout import exact_products, prepare_network, pull_back


def _alone(_trained: Mapping[str, nn.Parameter]) -> None:
    pass


class PathwiseGradient(Update):
    """The weights' gradient of the reward of what a solver makes of an image's own noise.

    An SDE's steps draw from that image's stream, whatever the weights: given what was drawn, its
    samples have a derivative as those of an ODE have.

    The loss is the mean over images of their influence on the pool's distance: to first order that
    of the distance itself, and exactly its gradient (`merge_rl.workflows.rewards.subset_reward`).
    Each process differentiates its own images, and `together` sums what they found in the order of
    the ranks. A call of the network is made again when its turn comes, so that memory is that of
    one, whatever the number of steps.
    """

    together: Callable[[Mapping[str, nn.Parameter]], None] = staticmethod(_alone)

    def __init__(self, learner: Learner, rollout: PolicyRollout, settings: UpdateConfig) -> None:
        self.learner, self.rollout, self.settings = learner, rollout, settings
        # Not what averages gradients over processes: it would exchange them in every part.
        self.network = prepare_network(learner.network, rollout.sampler, rollout.device)

    def begin(self, kept: KeptRollouts) -> None:
        """Nothing: images are made again as they are differentiated."""

    def gradients(self, kept: KeptRollouts, _epoch: int) -> dict[str, float]:
        """Add the gradient of the mean over all images; how long it is at a sample."""
        watched, size = UpdateStats(), self.share.size
        for part, count in self.share.parts(kept, self.settings.micro_batch):
            self.between()
            if count:
                pulled = self._part(part, count / (size * len(part) * len(kept)))
                watched.add(len(part), sample_gradient=float(pulled.flatten(1).norm(dim=1).mean()))
        self.together(self.learner.trained)
        return self.means(watched)

    def _part(self, part: KeptRollouts, share: float) -> Tensor:
        """Add the gradient of images that weigh `share` each; that of their samples, unweighed."""
        if part.pull is None:  # pragma: no cover (`StepParts.collect` has made it)
            raise RuntimeError("no gradient of the reward")
        samples = self.rollout.followed(part.noise, part.labels, self.network)
        with exact_products():
            pulled = pull_back(self.rollout, samples, part.pull.to(samples.device))
        against(samples, -share * pulled).backward()  # type: ignore[no-untyped-call]
        return pulled


def sum_in_order(trained: Mapping[str, nn.Parameter]) -> None:
    """Gradients become their sums over processes, added in the order of the ranks everywhere."""
    for parameter in trained.values():
        mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine.contiguous())
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        parameter.grad = total
