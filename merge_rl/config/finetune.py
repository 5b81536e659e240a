"""Settings of a fine-tuning run: frozen, keyword-only, checked once.

Every default is what `mergerl finetune` does when nothing is said.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from merge_rl.config.mapping import changed, to_mapping
from merge_rl.config.optimize import OptimizeConfig, RunConfig
from merge_rl.config.reward import RewardConfig
from merge_rl.config.sampler import FIXED_SOLVERS, SDE_SOLVERS, SamplerConfig, require
from merge_rl.config.setting import LEARN, MODEL, RUN, setting
from merge_rl.config.training import CURVES as CURVES
from merge_rl.config.training import CurveConfig as CurveConfig
from merge_rl.config.training import LoraConfig as LoraConfig
from merge_rl.config.training import RolloutConfig as RolloutConfig
from merge_rl.config.training import UpdateConfig as UpdateConfig
from merge_rl.errors import ConfigError, UnknownNameError

TRACKERS: Final = ("tensorboard", "wandb", "trackio")
# N = 5,000, n = 50, a new pool every 10 steps (arXiv:2607.02291).
PAPER_REWARD: Final = RewardConfig(pool_size=5000, subset_size=50, refresh="10")
# What may differ when a run goes on: how far, what is kept of it, who is told, how processes share.
FREE_ON_RESUME: Final = ("steps", "save_every", "keep_last", "track", "parallel")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """Everything that fixes the outcome of `mergerl finetune`, and where its inputs lie."""

    model: str = ""  # which one: the call, or the command's argument, says it too
    algorithm: str = setting(
        "pg",
        "pg: policy gradient; rs: rejection sampling; pathwise: the reward's gradient through "
        "rollouts.",
        LEARN, "--algorithm", choices=("pg", "rs", "pathwise"),
    )  # fmt: skip
    credit: str = setting(
        "set", "set: one reward for the images of a subset; per-image: one each.",
        LEARN, "--credit", choices=("set", "per-image"),
    )  # fmt: skip
    steps: int = setting(100, "Steps of the training.", LEARN, "--steps")
    batch: int = setting(250, "Images in one forward pass without gradients.", MODEL, "--batch")
    parallel: str = setting(
        "ddp",
        "Under torchrun: all weights in every process (ddp), or gradients and averages in shards "
        "(fsdp).",
        MODEL, "--parallel", choices=("ddp", "fsdp"),
    )  # fmt: skip
    save_every: int = setting(10, "Steps between resume points.", RUN, "--save-every")
    keep_last: int = setting(2, "Resume points that are kept.", RUN, "--keep-last")
    snapshot_every: int = setting(
        25, "Steps between snapshots of the weights.", RUN, "--snapshot-every"
    )
    track: tuple[str, ...] = setting(
        (),
        f"{', '.join(TRACKERS[:-1])} or {TRACKERS[-1]} (extras of those names), repeatable; "
        "events.jsonl is always there.",
        RUN, "--log-to",
    )  # fmt: skip
    sampler: SamplerConfig | None = None
    reward: RewardConfig = PAPER_REWARD
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    curves: CurveConfig = field(default_factory=CurveConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch", "save_every", "keep_last", "snapshot_every"):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        for name in self.track:
            if name not in TRACKERS:
                raise UnknownNameError("tracker", name, TRACKERS)
        if self.algorithm == "pg" and self.rollout.under == "ode":
            raise ConfigError(
                "the steps of an ODE draw nothing, so that a policy gradient has nothing to learn "
                "from; expected rollouts under sde, or the algorithm rs"
            )
        if self.algorithm == "pathwise":
            self._require_pathwise()
        if self.rollout.window_size is not None and self.rollout_kind == "ode":
            raise ConfigError("a window of noisy steps needs rollouts under sde, got ode")
        if self.reward.num_subsets != 1 or self.reward.num_replacements != 1:
            raise ConfigError(
                "fine-tuning compares rollout.subsets sets of images, each in the same rows of the "
                "pool; expected reward.num_subsets and reward.num_replacements to be 1"
            )

    def _require_pathwise(self) -> None:
        """Raise ConfigError for what a gradient through whole rollouts cannot have."""
        if self.rollout.window_size is not None:
            raise ConfigError(
                "the algorithm pathwise follows every step of a rollout; expected no window_size, "
                f"got {self.rollout.window_size}"
            )
        if self.rollout_kind == "ode" and self.curves.ode_solver not in FIXED_SOLVERS:
            raise ConfigError(
                f"the algorithm pathwise needs a solver with fixed steps "
                f"({', '.join(FIXED_SOLVERS)}), got curves.ode_solver {self.curves.ode_solver}"
            )
        if self.parallel != "ddp":
            raise ConfigError(
                "the algorithm pathwise keeps all weights in every process; expected parallel ddp, "
                f"got {self.parallel}"
            )

    @property
    def subsets(self) -> int:
        """B; a gradient through the rollouts, with nothing to compare, needs few of them."""
        return self.rollout.subsets or (2 if self.algorithm == "pathwise" else 16)

    @cached_property
    def images_per_step(self) -> int:
        """Rollouts of a step: B n."""
        return self.subsets * self.reward.images_per_subset

    @property
    def rollout_kind(self) -> str:
        """What rollouts are made under: "sde" or "ode"."""
        return self.rollout.under or ("sde" if self.algorithm == "pg" else "ode")

    def rollout_sampler(self) -> SamplerConfig:
        """The sampler of rollouts: that of the curve "sde-train" or "ode-train"."""
        return self.curve_samplers()[f"{self.rollout_kind}-train"]

    def training_sde(self) -> SamplerConfig:
        """The SDE with the steps of training: Euler-Maruyama, whose every step has a density."""
        base = self.sampler or SamplerConfig()
        if base.is_sde and base.solver != "sde-euler":
            raise ConfigError(
                f"steps of {base.solver} have no density that depends on the weights; expected "
                f"{SDE_SOLVERS[0]} to train under"
            )
        return dataclasses.replace(base, solver="sde-euler", num_steps=self.rollout.train_steps)

    def curve_samplers(self) -> dict[str, SamplerConfig]:
        """The four samplers that weights are scored under, by the name of their curve."""
        sde = self.training_sde()
        ode = dataclasses.replace(sde, solver=self.curves.ode_solver)
        return {
            f"{kind}-{which}": dataclasses.replace(sampler, num_steps=steps)
            for kind, sampler in (("ode", ode), ("sde", sde))
            for which, steps in (
                ("train", self.rollout.train_steps), ("eval", self.curves.eval_steps),
            )
        }  # fmt: skip

    def part_settings(self) -> OptimizeConfig:
        """The same inputs as a search names them, with the sampler of rollouts."""
        shared = {item.name: getattr(self, item.name) for item in dataclasses.fields(RunConfig)}
        return OptimizeConfig(
            checkpoints=self.model, batch=self.batch, sampler=self.rollout_sampler(),
            reward=self.reward, **shared,
        )  # fmt: skip


def differing_keys(one: FinetuneConfig, other: FinetuneConfig) -> list[str]:
    """Dotted names of settings that differ and that a run may not change as it goes on."""
    found = changed(to_mapping(one), to_mapping(other))
    return sorted(found.keys() - {*FREE_ON_RESUME, "rules"})
