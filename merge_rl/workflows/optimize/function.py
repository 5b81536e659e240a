"""A search with a function of the user's: any weights, and any way to generate from them."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from merge_rl import own_code
from merge_rl.config import (
    OptimizeConfig,
    SamplerConfig,
    or_defaults,
    with_settings,
)
from merge_rl.core.distances.statistics import FeatureStats, feature_stats
from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.interfaces import Tracker
from merge_rl.parallel import Place, joined
from merge_rl.parallel.group import Group
from merge_rl.progress import announcing, notes_of, tracker_of
from merge_rl.storage.checkpoints import CheckpointSet, keep_states, open_checkpoints, plan_merge
from merge_rl.storage.files import require_new
from merge_rl.storage.hub import local_set
from merge_rl.storage.runs import INPUTS, find_set, goes_on
from merge_rl.workflows.assembly import (
    Given,
    Statistics,
    auto_note,
    build_extractor,
    find_model,
    load_weights,
    own_extractors,
    own_weights,
    why_not_as_set,
)
from merge_rl.workflows.optimize.result import OptimizeResult
from merge_rl.workflows.optimize.run import begin
from merge_rl.workflows.reference import Reference, save_reference
from merge_rl.workflows.rollout import Generate, as_tensor, made_without_gradient

AUTO_SEARCHER: Final = "auto"
ROUNDING: Final = 0.01  # of the largest value that a function makes
Features = Statistics | Tensor | NDArray[Any]
Checkpoint = Mapping[str, Tensor] | nn.Module | str | os.PathLike[str]
Checkpoints = str | os.PathLike[str] | Sequence[Checkpoint] | Mapping[str, Checkpoint]


def search(
    checkpoints: Checkpoints,
    *,
    generate: Generate,
    reference: Features,
    out: str | os.PathLike[str],
    heldout: Features | None = None,
    model: nn.Module | None = None,
    searcher: str | Callable[..., Any] | None = None,
    config: OptimizeConfig | None = None,
    tracker: Tracker | None = None,
    progress: bool = True,
    **settings: Any,
) -> OptimizeResult:
    """Find merging coefficients of any checkpoints, by what a function generates from the merge.

    The function may be a sampler, a pipeline of another library, or no diffusion model at all.

    Args:
        checkpoints: state dicts of equal names and shapes, oldest first: mappings, modules or
            files, in a sequence or by name; or a folder of .safetensors. A model or a set may be
            the name of one on the Hub, "user/repo".
        generate: (network or weights, N seeds, labels (N,)) -> features (N, D), or images
            where `extractor` names what makes features of them: uint8, or floating on 0..255, whose
            gradient goes on through the extractor. NumPy's do as well. Weights are float32,
            whatever the checkpoints are. Deterministic: a row follows from the weights, its seed
            and its label. `merge_rl.seeded_noise` draws noise.
        reference: features (M, D) of real data, their statistics, or a file of them.
        out: run directory; must not exist. What was in memory is kept in its folder `inputs`.
        heldout: the same of data that the search never sees: final scores are of these.
        model: what the merged weights are put in for `generate`; left as it is. Without one it
            gets the first of `checkpoints` where these are modules, else weights by name.
        searcher: as in `optimize`; "auto", the default, takes "pathwise" where features depend on
            the weights with a gradient.
        config: further settings, which may leave out what the call says.
        tracker: hears of progress; by default it is printed, unless `progress` is off.
        settings: any other setting by its name: `budget`, `seed`, `batch`, `device`, `reward`,
            `num_classes` (of the labels, which take turns), `pool_size`, ...

    The run directory is that of every search; `merge_rl.resume(out, generate=...)` goes on with
    it. Raises MergeRLError subclasses for input that cannot work, with nothing left behind.
    """
    run, name = Path(out), own_code.name_of(generate)
    _require_of_use(settings)
    config, tracker = or_defaults(OptimizeConfig, config), tracker_of(tracker, progress)
    settings |= {"generate": name} | ({} if searcher is None else {"searcher": searcher})
    base = with_settings(OptimizeConfig, config, **settings)
    checkpoints = _looked_up(checkpoints, tracker)
    with _gone_unless_begun(run), joined() as group:
        if group.leads and not goes_on(run, group.place):
            require_new(run)
            shutil.rmtree(run / INPUTS, ignore_errors=True)
        named = base.extractor or ""  # one's own is called as it says itself, once it is built
        maker = "" if own_code.is_own(named) and "," not in named else named
        places = _kept(group, run, checkpoints, reference, heldout, maker)
        base = dataclasses.replace(base, **places)
        opened = open_checkpoints(base.checkpoints, track=base.track, select=base.select or None)
        given = Given(generate, model if model is not None else _first_module(checkpoints))
        settled, note = _settled(group, base, given, opened)
        return begin(group, settled, opened, run, tracker, given, note)


_EXPECTED: Final = "expected checkpoints as state dicts, modules or files"
_OF_NETWORKS: Final = {
    "autoencoder", "autoencoder_dtype", "autoencoder_weights", "network",
    *(field.name for field in dataclasses.fields(SamplerConfig)),
}  # fmt: skip


def _require_of_use(settings: Mapping[str, Any]) -> None:
    """Refuse what says how a network is sampled, which is the function's own doing."""
    if odd := sorted(_OF_NETWORKS & settings.keys()):
        raise ConfigError(
            f"{', '.join(odd)}: expected no settings of networks and samplers, as generate is both"
        )


def _looked_up(checkpoints: Checkpoints, tracker: Tracker) -> Checkpoints:
    """The folder of a set, which may have its name on the Hub; any iterable as a list."""
    if isinstance(checkpoints, (str, os.PathLike)):
        return find_set(local_set(checkpoints, notes_of(tracker))).told(announcing(tracker))
    if isinstance(checkpoints, Mapping):
        return checkpoints
    if not isinstance(checkpoints, Iterable):
        raise CheckpointError(f"{_EXPECTED}, got {type(checkpoints).__name__}")
    return list(checkpoints)


@contextmanager
def _gone_unless_begun(run: Path) -> Iterator[None]:
    """Around the group: that rank 0 has failed is told before what others read is removed."""
    try:
        yield
    except BaseException:
        inside = {file.name for file in run.iterdir()} if run.is_dir() else set()
        if Place.here().rank == 0 and inside == {INPUTS}:
            shutil.rmtree(run, ignore_errors=True)
        raise


def _kept(
    group: Group,
    run: Path,
    checkpoints: Checkpoints,
    reference: Features,
    heldout: Features | None,
    extractor: str,
) -> dict[str, Any]:
    """Where the inputs lie; rank 0 writes those that are no files."""
    folder = run / INPUTS
    places: dict[str, Any] = {}
    if isinstance(checkpoints, (str, os.PathLike)):
        places["checkpoints"] = os.fspath(checkpoints)
    else:
        places["checkpoints"] = str(folder / "checkpoints")
        if group.leads and not (folder / "checkpoints").exists():
            keep_states(folder / "checkpoints", _states(checkpoints))
    for name, given in (("reference", reference), ("heldout", heldout)):
        if given is None or isinstance(given, (str, os.PathLike)):
            places[name] = None if given is None else os.fspath(given)
            continue
        places[name] = str(folder / f"{name}.safetensors")
        if group.leads and not (folder / f"{name}.safetensors").exists():
            _keep_statistics(folder / f"{name}.safetensors", given, extractor)
    group.broadcast(phase="keeping what was handed over")
    return places


def _keep_statistics(path: Path, given: Any, extractor: str) -> None:
    given = as_tensor(given)
    if not isinstance(given, (Tensor, FeatureStats, Reference)):
        found = type(given).__name__
        expected = "features (M, D), statistics or a file"
        raise ConfigError(f"expected {path.stem} as {expected}, got {found}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(given, Tensor):
        features = given.detach().float().cpu()
        given = Reference(stats=feature_stats(features), extractor=extractor, features=features)
    if isinstance(given, FeatureStats):
        given = Reference(stats=given, extractor=extractor)
    save_reference(
        path, given.stats, extractor=given.extractor, extractor_sha256=given.extractor_sha256,
        resolution=given.resolution, source=given.source or "handed over",
        features=given.features, labels=given.labels,
    )  # fmt: skip


def _states(checkpoints: Sequence[Checkpoint] | Mapping[str, Checkpoint]) -> dict[str, Any]:
    """State dicts by name; those without a name are counted."""
    if not isinstance(checkpoints, Mapping):
        width = len(str(len(checkpoints) - 1))
        checkpoints = {f"checkpoint-{i:0{width}}": item for i, item in enumerate(checkpoints)}
    if not checkpoints:
        raise CheckpointError("expected checkpoints, got none")
    return {name: _state(item) for name, item in checkpoints.items()}


def _state(item: Any) -> Mapping[str, Tensor]:
    if isinstance(item, nn.Module):
        return item.state_dict()
    if isinstance(item, Mapping):
        return item
    if not isinstance(item, (str, os.PathLike)):
        found = type(item).__name__
        raise CheckpointError(f"{_EXPECTED}, got {found}")
    return load_weights(str(find_model(item).path)).tensors


def _first_module(checkpoints: Checkpoints) -> nn.Module | None:
    if isinstance(checkpoints, (str, os.PathLike)):
        return None
    items = list(checkpoints.values() if isinstance(checkpoints, Mapping) else checkpoints)
    return items[0] if items and isinstance(items[0], nn.Module) else None


def _settled(
    group: Group, base: OptimizeConfig, given: Given, opened: CheckpointSet
) -> tuple[OptimizeConfig, str | None]:
    """The settings with a searcher for "auto", and the note that says which.

    Rank 0 tries the function, and chooses for all.
    """
    why = _why_no_gradient(base, given, opened) if group.leads else None
    why = group.broadcast(why, phase="trying the function")
    if base.search.name != AUTO_SEARCHER:
        return base, None
    name = "policy-gradient" if why else "pathwise"
    search = dataclasses.replace(base.search, name=name)
    return dataclasses.replace(base, search=search), auto_note(name, why)


def _why_no_gradient(base: OptimizeConfig, given: Given, opened: CheckpointSet) -> str | None:
    """Why what the function makes of the newest checkpoint's weights has no gradient by them.

    Raises ConfigError for a function that makes something else of a seed each time, or beside
    another one.
    """
    network = given.network(opened, base.device)
    plan_merge(opened, model=network)  # refuses weights that do not fit it
    network.load_state_dict(opened.read(opened.newest))
    network.requires_grad_(True)
    labels = torch.zeros(2, dtype=torch.int64, device=base.device)
    with torch.enable_grad():
        made, other = (
            as_tensor(given.generate(given.subject(network), seeds, labels))
            for seeds in ([0, 1], [1, 2])
        )
    _require_same(made, other)
    if base.search.name != AUTO_SEARCHER:
        return None
    if (why := why_not_as_set(base)) is not None or not isinstance(made, Tensor):
        return why or "what generate returns does not depend on one"
    extractor = None
    if own_extractors(base) and made.ndim == 4:
        extractor, _ = build_extractor(base.extractor or "", own_weights(base), base.device)
    return made_without_gradient(made, extractor)


def _require_same(made: object, other: object) -> None:
    """Of seeds 0 and 1, and of 1 and 2: seed 1 stands elsewhere, beside another neighbour.

    Kernels of some devices add in any order, which is far less than other noise makes.
    """
    if not (isinstance(made, Tensor) and isinstance(other, Tensor) and made.numel()):
        return  # refused for what it is
    first, second = made.detach().double(), other.detach().double()
    alike = first.shape == second.shape
    if alike and first.shape[:1] != (2,):
        return  # refused for that, later
    if not alike or bool((first[1] - second[0]).abs().max() > ROUNDING * first.abs().max()):
        raise ConfigError(
            "generate returned something else for the same weights, seed and label beside other "
            "seeds; expected that each row follows from its own seed, as merge_rl.seeded_noise "
            "draws it, and from no neighbour in the batch"
        )
