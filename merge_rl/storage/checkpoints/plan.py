"""What a merge of a set is: which tensors it averages or carries from the base, which licence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from merge_rl import registry
from merge_rl.core.forms import network_constants
from merge_rl.core.merging.groups import Groups, assign_groups, with_weights
from merge_rl.errors import (
    ConfigError,
    IncompatibleCheckpointError,
    UnknownNameError,
)
from merge_rl.storage.checkpoints.checkpoint_set import CheckpointSet
from merge_rl.storage.checkpoints.model_file import require_fit, require_network
from merge_rl.storage.files import count_nonfinite, nonfinite

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """What a merge does with every tensor of a set: average it in a group, or carry it."""

    merged: tuple[str, ...]  # names of the tensors that are averaged
    carried: tuple[str, ...]  # taken from the base as they are
    groups: Groups  # of the merged ones
    base: int  # index of the checkpoint that carried tensors come from
    frozen: tuple[str, ...] = ()  # patterns of the tensors that are carried by the user's word

    @property
    def group_of(self) -> dict[str, int]:
        """Merged name -> index of its group."""
        return dict(zip(self.merged, self.groups.index, strict=True))


def plan_merge(
    checkpoints: CheckpointSet,
    *,
    groups: Mapping[str, str] | None = None,
    base: str = "newest",
    freeze: Sequence[str] = (),
    model: nn.Module | None = None,
) -> MergePlan:
    """The plan for a set: its network, and `freeze`, say what is carried.

    `groups` maps group names to regular expressions of tensor names. `freeze` are regular
    expressions too: what they are found in stays as in the base. `model` saves building the
    network of the set's config again. Whole numbers are carried, and complex ones, which must be
    the same in all checkpoints unless a network or `freeze` says that they are carried.
    """
    infos, where, known = checkpoints.tensors, str(checkpoints.folder), None
    if model is not None:
        require_fit(infos, model, where)
    elif checkpoints.config is not None:
        require_network(infos, checkpoints.config, where)
        known = network_constants(checkpoints.config, {k: info.shape for k, info in infos.items()})
        model = None if known else registry.build_on_meta(checkpoints.config)
    if model is not None:
        known = carried_names(model), fixed_names(model)
    carried, constants = (set(), ()) if known is None else (set(known[0]), known[1])
    require_shared(checkpoints, constants)
    carried |= frozen_names(infos, freeze)
    other = {name for name, info in infos.items() if not info.is_floating} - carried
    waves = sorted(name for name in other if infos[name].kind.startswith("complex"))
    require_shared(checkpoints, waves, _COMPLEX)
    carried |= other
    merged = tuple(name for name in infos if name not in carried)
    if not merged:
        said = f"--freeze takes all {len(infos)} tensors" if freeze else "no tensor is averaged"
        raise ConfigError(f"{said}; expected some to merge")
    groups = with_weights(groups or {}, merged)
    assigned = assign_groups(merged, groups) if groups else Groups(("all",), (0,) * len(merged))
    return MergePlan(
        merged=merged,
        carried=tuple(sorted(carried)),
        groups=assigned,
        base=base_index(checkpoints, base),
        frozen=tuple(freeze),
    )


def frozen_names(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """Names that one of the regular expressions is found in; ConfigError for one found in none."""
    found: set[str] = set()
    for pattern in patterns:
        try:
            taken = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise ConfigError(
                f"expected a regular expression to freeze, got {pattern!r}: {error}"
            ) from None
        if not taken:
            raise ConfigError(f"expected {pattern!r} to freeze at least one tensor, got none")
        found |= taken
    return found


def carried_names(model: nn.Module) -> set[str]:
    """Tensors that a merge carries from the base instead of averaging: buffers and constants."""
    stored = model.state_dict().keys()
    buffers = {name for name, _ in model.named_buffers() if name in stored}
    return buffers | set(fixed_names(model))


def fixed_names(model: nn.Module) -> tuple[str, ...]:
    """Parameters that hold constants, by the network's own word (`fixed_names`)."""
    names: tuple[str, ...] = getattr(model, "fixed_names", ())
    return names


_RUN: Final = ("the constant", "expected checkpoints of one run")
_COMPLEX: Final = ("the complex", "averages are of real numbers: carry it with --freeze")


def require_shared(
    checkpoints: CheckpointSet, names: Sequence[str], said: tuple[str, str] = _RUN
) -> None:
    """Raise IncompatibleCheckpointError unless all checkpoints hold the same values of `names`."""
    for name in names:
        first = finite_bytes(checkpoints, 0, name)
        for index in range(1, len(checkpoints)):
            if finite_bytes(checkpoints, index, name) != first:
                raise IncompatibleCheckpointError(
                    f"{checkpoints.paths[index]}: {said[0]} {name!r} differs from that of "
                    f"{checkpoints.paths[0].name}; {said[1]}"
                )


def finite_bytes(checkpoints: CheckpointSet, index: int, name: str) -> bytes:
    """One tensor's bytes in one checkpoint; NonFiniteWeightsError for NaN and infinity."""
    info = checkpoints.tensors[name]
    with checkpoints.reader(index) as reader:
        data = reader.read_bytes(name, 0, info.nbytes)
    if odd := count_nonfinite(data, info.code):
        raise nonfinite(checkpoints.paths[index], name, odd, info)
    return data


def base_index(checkpoints: CheckpointSet, start: str) -> int:
    """The checkpoint that coefficients start from and buffers are carried from."""
    named = start if start in checkpoints.names else checkpoints.duplicates.get(start)
    if named is not None:
        return checkpoints.names.index(named)
    if start not in ("auto", "newest", "uniform"):
        known = ("auto", "newest", "uniform", *checkpoints.names)
        raise UnknownNameError("checkpoint", start, known)
    return checkpoints.newest


def merged_licence(checkpoints: CheckpointSet, given: str | None = None) -> str | None:
    """Licence of a merge of a set: `given` if there is one, else the one all sources share.

    Sources that state different licences are refused (ConfigError): whether and how they combine
    is for a person to decide. None if no source states any.
    """
    if given is not None:
        if not given.strip():
            raise ConfigError("expected the name of a licence, got an empty text")
        return given.strip()
    stated: dict[str, str] = {}
    for licence in checkpoints.licences:
        stated.setdefault(licence.lower(), licence)
    if len(stated) > 1:
        raise ConfigError(
            f"{checkpoints.folder}: the checkpoints are under {len(stated)} licences, "
            f"{' and '.join(stated.values())}; pass --license NAME if they allow a merge under one"
        )
    return next(iter(stated.values()), None)
