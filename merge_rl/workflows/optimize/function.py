"""A search with a function of the user's: any weights, and any way to generate from them."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

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
from merge_rl.core.state_dicts import names_for
from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.interfaces import Tracker
from merge_rl.parallel import Place, joined
from merge_rl.parallel.group import Group
from merge_rl.progress import announcing, notes_of, tracker_of
from merge_rl.storage.checkpoints import keep_states, open_checkpoints
from merge_rl.storage.files import as_path, require_new
from merge_rl.storage.hub import local_set
from merge_rl.storage.runs import INPUTS, find_set, goes_on
from merge_rl.workflows.assembly import (
    Given,
    Statistics,
    find_model,
    load_weights,
)
from merge_rl.workflows.optimize.result import OptimizeResult
from merge_rl.workflows.optimize.run import begin
from merge_rl.workflows.optimize.trial import settled_searcher
from merge_rl.workflows.reference import Reference, save_reference
from merge_rl.workflows.rollout import Generate, as_tensor, is_plain, written

Features = Statistics | Tensor | NDArray[Any]
Checkpoint = Mapping[str, Tensor | NDArray[Any]] | nn.Module | str | os.PathLike[str]
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
        checkpoints: state dicts of equal names and shapes, oldest first: mappings (of torch's or
            NumPy's numbers), modules or files, in a sequence or by name; or a folder of
            .safetensors. A model or a set may be the name of one on the Hub, "user/repo".
        generate: (network or weights, list of N seeds, labels (N,)) -> features (N, D), or images
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

    `merge_rl.resume(out, generate=...)` goes on, with `model=` where `generate` takes a
    module. Raises MergeRLError subclasses for input that cannot work, with nothing left behind.
    """
    run, name = as_path(out, "out"), own_code.name_of(generate)
    _require_of_use(settings, model)
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
        holder = model if model is not None else _first_module(checkpoints)
        places = _kept(group, run, checkpoints, holder, reference, heldout, maker)
        base = dataclasses.replace(base, **places)
        opened = open_checkpoints(base.checkpoints, track=base.track, select=base.select or None)
        settled, note = settled_searcher(group, base, given := Given(generate, holder), opened)
        return begin(group, settled, opened, run, tracker, given, note)


_EXPECTED: Final = "expected checkpoints as state dicts, modules or files"
_OF_NETWORKS: Final = {
    "autoencoder", "autoencoder_dtype", "autoencoder_weights", "network",
    *(field.name for field in dataclasses.fields(SamplerConfig)),
}  # fmt: skip


def _require_of_use(settings: Mapping[str, Any], model: object) -> None:
    """Refuse what is no module, and how a network is sampled, which is the function's own doing."""
    if not isinstance(model, (nn.Module, type(None))):
        raise ConfigError(f"expected model as a torch module, got {type(model).__name__}")
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
    """Remove the kept inputs of a run that fails before it begins, once the group has told it."""
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
    model: nn.Module | None,
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
            keep_states(folder / "checkpoints", _states(checkpoints, model))
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
    tensor = isinstance(given, Tensor) and is_plain(given)
    if not (tensor or isinstance(given, (FeatureStats, Reference))):
        found = written(given)
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


def _states(
    checkpoints: Sequence[Checkpoint] | Mapping[str, Checkpoint], model: nn.Module | None
) -> dict[str, Any]:
    """State dicts by name, with the tensor names of the model; those without a name are counted."""
    if not isinstance(checkpoints, Mapping):
        width = len(str(len(checkpoints) - 1))
        checkpoints = {f"checkpoint-{i:0{width}}": item for i, item in enumerate(checkpoints)}
    if not checkpoints:
        raise CheckpointError("expected checkpoints, got none")
    states = {name: _state(item) for name, item in checkpoints.items()}
    wanted = None if model is None else model.state_dict().keys()
    return states if wanted is None else {k: _under(v, wanted) for k, v in states.items()}


def _under(state: Mapping[str, Any], wanted: Collection[str]) -> Mapping[str, Any]:
    """A state dict under the wanted names, where it has them but for what wrappers add."""
    if not all(isinstance(name, str) for name in state):
        return state
    return {own: state[name] for own, name in names_for(state, wanted).items()}


def _state(item: Any) -> Mapping[str, Tensor]:
    if isinstance(item, nn.Module):
        return item.state_dict()
    if isinstance(item, Mapping):
        return {name: as_tensor(value) for name, value in item.items()}
    if not isinstance(item, (str, os.PathLike)):
        found = type(item).__name__
        raise CheckpointError(f"{_EXPECTED}, got {found}")
    return load_weights(str(find_model(item).path)).tensors


def _first_module(checkpoints: Checkpoints) -> nn.Module | None:
    if isinstance(checkpoints, (str, os.PathLike)):
        return None
    items = list(checkpoints.values() if isinstance(checkpoints, Mapping) else checkpoints)
    return items[0] if items and isinstance(items[0], nn.Module) else None
