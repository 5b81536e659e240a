"""Names to factories, and networks from configs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import pytest
import torch

from merge_rl import registry
from merge_rl.config.optimize import SearchConfig
from merge_rl.errors import ConfigError, UnknownNameError
from merge_rl.models.edm2 import EDM2
from merge_rl.registry import build_autoencoder, build_model, resolve

TABLES: dict[str, Mapping[str, str]] = {
    name: table
    for name, table in vars(registry).items()
    if name.isupper() and isinstance(table, Mapping) and name != "EXTRAS"
}
CONFIG: dict[str, Any] = {
    "model": "edm2",
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 10,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "channels_per_head": 8,
}


def test_libraries_are_known_of_registered_names() -> None:
    known = registry.EXTRACTORS.keys() | registry.AUTOENCODERS.keys() | registry.MODELS.keys()
    assert registry.EXTRAS.keys() <= known


def test_all_tables_are_seen() -> None:
    assert set(TABLES) >= {"MODELS", "AUTOENCODERS", "EXTRACTORS", "SEARCHERS", "REWARDS"}


@pytest.mark.parametrize(
    ("table", "name"), [(table, name) for table, names in TABLES.items() for name in names]
)
def test_every_registered_name_resolves(table: str, name: str) -> None:
    target = TABLES[table][name]
    module, _, factory = target.partition(":")
    found = resolve("thing", TABLES[table], name)
    assert callable(found)
    assert found is getattr(import_module(module), factory)
    assert found.__module__ == module  # where it is made, not where it happens to be imported
    # Names are typed on the command line and written to files.
    assert name == name.lower()
    # A colon ends the name of a family, whose members are named after it.
    assert name.removesuffix(":").replace("-", "").replace("_", "").isalnum()
    assert not name.endswith(":") or table == "SEARCHERS"
    assert module.startswith("merge_rl.")
    assert factory.isidentifier()


def test_unknown_names_are_answered_with_the_nearest() -> None:
    message = r"unknown searcher 'policy-gradiant'; did you mean 'policy-gradient'\? \(known: "
    with pytest.raises(UnknownNameError, match=message) as raised:
        resolve("searcher", registry.SEARCHERS, "policy-gradiant")
    assert (raised.value.kind, raised.value.name) == ("searcher", "policy-gradiant")
    assert raised.value.known == tuple(sorted(registry.SEARCHERS))
    with pytest.raises(UnknownNameError, match=r"unknown reward '' \(known: "):
        resolve("reward", registry.REWARDS, "")
    with pytest.raises(UnknownNameError, match=r"unknown model 'x' \(known: none\)"):
        resolve("model", {}, "x")


def test_members_of_a_family_resolve_to_it() -> None:
    family = resolve("searcher", registry.SEARCHERS, "nevergrad:")
    assert registry.resolve_searcher("nevergrad:CMA") is family
    assert registry.resolve_searcher("nevergrad:") is family  # refuses its empty name itself
    with pytest.raises(UnknownNameError, match=r"unknown searcher 'nevergrad'; .* 'nevergrad:'\?"):
        registry.resolve_searcher("nevergrad")
    with pytest.raises(UnknownNameError, match=r"unknown searcher 'lcsc:x'; did you mean 'lcsc'"):
        registry.resolve_searcher("lcsc:x")
    for name, home in (
        ("CMA", "nevergrad:CMA"), ("tbpsa", "nevergrad:TBPSA"), ("powell", "scipy:powell"),
    ):  # fmt: skip
        with pytest.raises(UnknownNameError, match=f"searcher '{name}'; did you mean '{home}'"):
            registry.resolve_searcher(name)


@pytest.mark.parametrize(
    ("name", "population", "expected"),
    [
        ("policy-gradient", None, 16),
        ("policy-gradient", 5, 5),
        ("scipy:differential-evolution", None, 16),
        ("scipy:cobyla", None, 1),
        ("scipy:cobyla", 1, 1),
        ("lcsc", None, 16),
        ("nevergrad:TBPSA", 7, 7),
        ("nevergrad:NelderMead", None, 1),
        ("uniform", None, 0),  # nothing is asked
    ],
)
def test_population_of(name: str, population: int | None, expected: int) -> None:
    assert registry.population_of(SearchConfig(name=name, population=population)) == expected


@pytest.mark.parametrize(
    ("name", "population", "message"),
    [
        ("policy-gradient", 1, "expected population >= 2, got 1 for policy-gradient"),
        ("scipy:powell", 4, "scipy:powell evaluates one .*: expected no population or 1, got 4"),
        (
            "nevergrad:NelderMead",
            4,
            "nevergrad:NelderMead evaluates one candidate after the other: .* 4",
        ),
        ("scipy:differential-evolution", 4, "expected population >= 5, got 4 for scipy:diff"),
        ("lr-cma", 3, "expected population >= 4, got 3 for lr-cma"),
        ("ema-grid", 4, "ema-grid knows its candidates .*: expected no population, got 4"),
        ("scipy:nelder", None, r"unknown searcher 'scipy:nelder'; did you mean 'scipy:nelder-mead"),
        ("scipy:", None, r"unknown searcher 'scipy:'.*known: scipy:cobyla, scipy:differential-ev"),
        ("nevergrad:TBSPA", None, r"unknown searcher 'nevergrad:TBSPA'; did you mean .*:TBPSA'\?"),
        ("nevergrad:cma", None, r"unknown searcher 'nevergrad:cma'; did you mean 'nevergrad:CMA'"),
        ("nevergrad:", None, r"unknown searcher 'nevergrad:' \(known: nevergrad:CMA, "),
    ],
)
def test_searchers_refused(name: str, population: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.population_of(SearchConfig(name=name, population=population))


def test_default_rewards() -> None:
    assert registry.default_reward("policy-gradient") == "fid-subset"
    assert registry.default_reward("nevergrad:OnePlusOne") == "fid-full"
    names = {registry.default_reward(name) for name in registry.SEARCHERS}
    assert names <= registry.REWARDS.keys()


def test_build_model() -> None:
    model = build_model(CONFIG)
    assert isinstance(model, EDM2)
    assert not model.training
    assert "model" in CONFIG  # the mapping is not altered
    with torch.no_grad():
        out = model(torch.ones(2, 1, 8, 8), torch.tensor(1.0), torch.tensor([3, 4]))
    assert out.shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, r'expected "model" in the model config, found keys \[\'attn_resolutions'),
        ({"depth": 28}, "the edm2 network does not take this config: unknown option 'depth'$"),
        ({"img_resolution": "8"}, "the edm2 network does not take this config: "),
        (
            {"channel_mult": 2},
            "edm2 network does not take .*channel_mult as a list",
        ),
        (
            {"channels_per_head": 0},
            "edm2 network does not take .*channels_per_head as a whole number from 1",
        ),
        (
            {"model_channels": -8},
            "edm2 network does not take .*model_channels as a whole number from 1",
        ),
    ],
)
def test_configs_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model({**CONFIG, **changes})


def test_required_options_and_names() -> None:
    with pytest.raises(ConfigError, match="does not take this config: missing options 'img_res"):
        build_model({"model": "edm2"})
    with pytest.raises(UnknownNameError, match=r"unknown model 'edm'; did you mean 'edm2'\?"):
        build_model({**CONFIG, "model": "edm"})
    with pytest.raises(UnknownNameError, match="unknown model '2'"):
        build_model({**CONFIG, "model": 2})


def test_build_autoencoder() -> None:
    # The pixel encoder's identity: byte -> [-1, 1] -> the same byte.
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(build_autoencoder().decode(images.float() / 127.5 - 1), images)
    with pytest.raises(UnknownNameError, match=r"unknown autoencoder 'pixels'; .* 'pixel'"):
        build_autoencoder("pixels")
