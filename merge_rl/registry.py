"""Names to factories: "module:factory" strings, imported on use.

To extend the package, write one file and add one line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Final

from merge_rl.errors import ConfigError, UnknownNameError
from merge_rl.interfaces import Autoencoder

MODELS: Final[Mapping[str, str]] = {
    "edm2": "merge_rl.models.edm2:EDM2",
}
AUTOENCODERS: Final[Mapping[str, str]] = {
    "pixel": "merge_rl.models.autoencoder:PixelEncoder",
}
EXTRACTORS: Final[Mapping[str, str]] = {
    "digits": "merge_rl.features.digits:load_digits_extractor",
}
SEARCHERS: Final[Mapping[str, str]] = {
    "policy-gradient": "merge_rl.search.policy_gradient:PolicyGradient",
}
REWARDS: Final[Mapping[str, str]] = {
    "fid-subset": "merge_rl.workflows.reward:SubsetReplaceFID",
}


def resolve(kind: str, table: Mapping[str, str], name: str) -> Callable[..., Any]:
    """The factory registered as `name`; UnknownNameError suggests the nearest name."""
    if name not in table:
        raise UnknownNameError(kind, name, table)
    module, _, factory = table[name].partition(":")
    found: Callable[..., Any] = getattr(import_module(module), factory)
    return found


def build_model(config: Mapping[str, Any]) -> Any:
    """A network in evaluation mode with random weights.

    `config` has "model" ("edm2") and the network's constructor options. Raises UnknownNameError
    for another model, ConfigError for options the network does not take.
    """
    options = dict(config)
    name = options.pop("model", None)
    if name is None:
        raise ConfigError(f'expected "model" in the model config, found keys {sorted(options)}')
    factory = resolve("model", MODELS, str(name))
    try:
        model = factory(**options)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ConfigError(f"the {name} network does not take this config: {error}") from None
    return model.eval()


def build_autoencoder(name: str = "pixel") -> Autoencoder:
    """What turns samples into images: "pixel" for networks that work on pixels."""
    built: Autoencoder = resolve("autoencoder", AUTOENCODERS, name)()
    return built
