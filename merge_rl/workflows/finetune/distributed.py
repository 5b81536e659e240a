"""Fine-tuning steps over many processes: the first leads, all hold the network and learn alike.

The first process has the pool, the rewards and the files. It says what is to be made; every process
makes its share of the images and takes the loss of its share of the kept rollouts. Gradients are
averaged over processes, so that equal updates keep the weights equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from merge_rl.config import SamplerConfig, from_mapping, to_mapping
from merge_rl.parallel.blocks import Block, SharedWork, blocks_of_sizes, split_blocks
from merge_rl.parallel.group import Group
from merge_rl.parallel.rendezvous import is_broken_link
from merge_rl.rng import image_seeds
from merge_rl.storage.runs import StopSignals
from merge_rl.workflows.assembly import load_network
from merge_rl.workflows.finetune.job import FinetuneJob
from merge_rl.workflows.finetune.learner import Learner
from merge_rl.workflows.finetune.pathwise import PathwiseGradient, sum_in_order
from merge_rl.workflows.finetune.rollouts import (
    KeptRollouts,
    PolicyRollout,
    ProcessShare,
    read_kept,
    write_kept,
)
from merge_rl.workflows.finetune.sharded import ShardedLearner, replicated
from merge_rl.workflows.finetune.step import StepParts, memory_advice
from merge_rl.workflows.finetune.updates import UpdateStats
from merge_rl.workflows.rollout import Rollout


class DistributedStep(StepParts):
    """The parts of a step, made by all processes of a launch; torch's default group is open.

    The first process calls them, the others are in `follow`. A signal to stop interrupts the first
    at once where all weights are there to be saved. Where they lie in shards, which takes all
    processes to save, it waits for the end of what all are at: a block of images or one pass.
    """

    def __init__(
        self, job: FinetuneJob, group: Group, signals: StopSignals,
        announce: Callable[[str], None] = lambda _text: None,
    ) -> None:  # fmt: skip
        self.group, self.signals = group, signals
        self._work = SharedWork(group, announce)
        self.sharded = job.config.parallel == "fsdp"
        learner: Learner
        with self._links("start"):
            if self.sharded:
                learner = ShardedLearner(job.network, job.config.update, self._joined)
            else:
                learner = Learner(job.network, job.config.update, replicated)
        super().__init__(job, learner)
        self.networks: dict[str, nn.Module] = {"network": job.network}
        if learner.average is not job.network:
            self.networks["average"] = learner.average
        self.update.share = ProcessShare(group.rank, group.size)
        self.update.means = self._means
        if isinstance(self.update, PathwiseGradient):
            self.update.together = sum_in_order
        self._kept: KeptRollouts | None = None

    # ------------------------------------------------------------------ what the first one calls

    def features(
        self, rollout: Rollout, seeds: Sequence[int], labels: Tensor, phase: str = "features"
    ) -> Tensor:
        """Features (N, D) of the images of these seeds and labels, the same whoever makes which."""
        blocks = split_blocks([max(len(seeds), 1)], rollout.batch)
        self._work.tell_idle(blocks)
        asked = self._named(rollout)
        # In shards a stop has to wait for all: work is asked for a block or so a process.
        few = self.group.size * max(rollout.workers, 1) if self.sharded else len(blocks)
        found = []
        for i in range(0, len(blocks), few):
            part = slice(blocks[i].start, blocks[min(i + few, len(blocks)) - 1].stop)
            asked |= {
                "seeds": list(seeds[part]), "labels": labels[part].tolist(), "phase": phase,
                "sizes": [block.size for block in blocks[i : i + few]],
            }  # fmt: skip
            with self._joined("features", may_stop=True, **asked):
                found.append(self._make(rollout, asked))
        return torch.cat(found)

    def gradients(self, kept: KeptRollouts, epoch: int) -> dict[str, float]:
        """Gradients of the loss in the learner; what was seen, nothing if it is not finite."""
        asked: dict[str, Any] = {"epoch": epoch, "window": self.job.rollout.window}
        if epoch == 0:
            asked["kept"] = write_kept(kept)
            asked["pull"] = None if kept.pull is None else kept.pull.shape[1]
        with self._joined("gradients", may_stop=epoch == 0, **asked):
            if epoch == 0 and kept.pull is not None:
                dist.broadcast(kept.pull, 0)
            self._may_leave(epoch)
            return super().gradients(kept, epoch)

    def apply(self) -> None:
        """One update from the gradients."""
        with self._joined("apply"):
            super().apply()

    def send_state(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Set the learners of the others to a resume point."""
        with self._joined("state", tensors=_described(tensors), updates=updates):
            for tensor in tensors.values():
                dist.broadcast(tensor.contiguous(), 0)

    def send_networks(self, networks: Mapping[str, nn.Module]) -> None:
        """Let the others have further networks, which `features` may then be asked of."""
        self.networks |= networks
        for name, network in networks.items():
            with self._joined("network", name=name):
                _send(network)

    def end(self, result: Any = None) -> None:
        """Dismiss the others; `result`, plain data, is what `follow` returns there."""
        self._work.end(result)

    # ------------------------------------------------------------------ what the others do

    def follow(self) -> Any:
        """Do what the first process asks for until it ends the run; its result.

        Signals are passed on to it, which decides and has what is to be saved.
        """
        with self.signals, self.signals.noted():
            self._pass_on()
            return self._work.follow(self._follow)

    def _pass_on(self) -> None:
        if self.signals.pending:
            self.group.ask_to_stop()

    def _follow(self, asked: Mapping[str, Any]) -> None:
        with self._links(asked["do"]), memory_advice(self.config):
            self._act(asked)
        self._pass_on()

    def _act(self, asked: Mapping[str, Any]) -> None:
        match asked["do"]:
            case "features":
                self._make(self._rollout(asked), asked)
            case "gradients":
                self._follow_gradients(asked)
            case "apply":
                self.learner.apply()
            case "state":
                self._take_state(asked)
            case "network":
                network = load_network(self.config.model, self.config.network).to(
                    self.config.device
                )
                self.networks[asked["name"]] = network
                _send(network)
            case method:  # of a learner in shards
                getattr(self.learner, method)()

    def _follow_gradients(self, asked: Mapping[str, Any]) -> None:
        rollout, window = self.job.rollout, asked["window"]
        rollout.window = None if window is None else (window[0], window[1])
        if "kept" in asked:
            step = asked["kept"]["step"]
            seeds = image_seeds(
                self.config.images_per_step, self.config.seed, "rollout", step,
                rules=self.config.rules,
            )  # fmt: skip
            noise = rollout.noise([seeds[row] for row in asked["kept"]["rows"]])
            pull = None if asked["pull"] is None else torch.empty(len(noise), asked["pull"])
            if pull is not None:
                dist.broadcast(pull, 0)
            self._kept = read_kept(asked["kept"], noise, pull)
        if self._kept is None:  # pragma: no cover (the first epoch has brought them)
            raise RuntimeError("no rollouts to learn from")
        self._may_leave(asked["epoch"])
        try:
            super().gradients(self._kept, asked["epoch"])
        except _LeftError:
            return

    def _take_state(self, asked: Mapping[str, Any]) -> None:
        found = {}
        for name, dtype, shape in asked["tensors"]:
            found[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            dist.broadcast(found[name], 0)
        self.learner.load_state_dict(found, asked["updates"])

    # ------------------------------------------------------------------ what all do

    @contextmanager
    def _joined(self, do: str, *, may_stop: bool = False, **asked: Any) -> Iterator[None]:
        """On the first process: around its own part of what it asks all for.

        With `may_stop` nothing is asked for, but KeyboardInterrupt raised, if another process was
        told to stop.
        """
        hold: AbstractContextManager[None] = nullcontext()
        if self.sharded:
            hold = self.signals.held()
        try:
            with hold, self._links(do):
                if self.group.leads:
                    if may_stop and self.group.asked_to_stop:
                        raise KeyboardInterrupt
                    self._work.ask(do, **asked)
                yield
        except _LeftError:
            raise KeyboardInterrupt from None

    @contextmanager
    def _links(self, phase: str) -> Iterator[None]:
        """Say of a link that broke who was at its other end."""
        self.group.note(phase)
        try:
            yield
        except RuntimeError as error:
            if not is_broken_link(error):
                raise
            self.group.lost(phase)

    def _named(self, rollout: Rollout) -> dict[str, Any]:
        """What the others make the same rollout of."""
        policy = rollout is self.job.rollout
        return {
            "policy": policy, "window": self.job.rollout.window if policy else None,
            "sampler": to_mapping(rollout.sampler),
            "network": next(n for n, net in self.networks.items() if net is rollout.model),
        }  # fmt: skip

    def _rollout(self, asked: Mapping[str, Any]) -> Rollout:
        rollout: Rollout = self.job.rollout if asked["policy"] else self.job.scored
        if isinstance(rollout, PolicyRollout):
            window = asked["window"]
            rollout.window = None if window is None else (window[0], window[1])
        network = self.networks[asked["network"]]
        if network is not rollout.model:
            rollout = rollout.with_network(network)
        sampler = from_mapping(SamplerConfig, asked["sampler"])
        return rollout if sampler == rollout.sampler else rollout.with_sampler(sampler)

    def _make(self, rollout: Rollout, asked: Mapping[str, Any]) -> Tensor:
        """This process's blocks; on the first the features of all images, in order."""
        blocks, seeds = blocks_of_sizes(asked["sizes"]), asked["seeds"]
        labels = torch.tensor(asked["labels"], dtype=torch.int64)

        def inputs(block: Block) -> tuple[Tensor, Tensor]:
            part = slice(block.start, block.stop)
            return rollout.noise(seeds[part]), labels[part]

        def made(mine: Sequence[Block]) -> Iterator[Tensor]:
            return rollout.features_of([partial(inputs, block) for block in mine])

        dim, phase = rollout.extractor.dim, asked["phase"]
        return self._work.rows(blocks, dim, made, phase, rollout.on_images)

    def _may_leave(self, epoch: int) -> None:
        """Let all leave an update together at a stop, in shards and before any weight has moved."""
        self.update.between = self._agree if self.sharded and epoch == 0 else _go_on

    def _agree(self) -> None:
        stop = torch.tensor([float(self.signals.pending)])
        dist.all_reduce(stop, dist.ReduceOp.MAX)
        if float(stop):
            raise _LeftError

    def _means(self, watched: UpdateStats) -> dict[str, float]:
        """Over all processes, on the first; nothing on the others."""
        told = {"sums": watched.sums, "count": watched.count}
        found = self.group.collect(told, phase="what an update did")
        return {} if found is None else UpdateStats.together(found).means()


class _LeftError(Exception):
    """All processes have left an update."""


def _go_on() -> None:
    pass


def _described(tensors: Mapping[str, Tensor]) -> list[tuple[str, str, list[int]]]:
    return [
        (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, tensor in tensors.items()
    ]


def _send(network: nn.Module) -> None:
    """The weights of the first process's network in all of theirs."""
    for tensor in network.state_dict().values():
        dist.broadcast(tensor, 0)
