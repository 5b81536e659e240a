"""`mergerl settings`, and the page that it writes."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

import merge_rl.config
from merge_rl.cli.main import command_line
from merge_rl.cli.options import COMMANDS
from merge_rl.config import FinetuneConfig, OptimizeConfig, from_mapping, set_dotted, to_mapping
from merge_rl.config.setting import ABOUT, PANELS, About

Mergerl = Callable[..., Any]
# What the command's argument says.
ARGUMENTS = {"checkpoints", "model"}


def test_the_page_of_the_documentation_has_every_setting(mergerl: Mergerl) -> None:
    ended = mergerl("settings", "--markdown")
    assert (ended.code, ended.err) == (0, "")
    for settings in json.loads(mergerl("settings", "--json").out).values():
        for item in settings:
            assert f"| `{item['setting']}` |" in ended.out
            assert item["meaning"].replace("|", "\\|") in ended.out


def test_a_table_a_command(mergerl: Mergerl) -> None:
    everything, one = mergerl("settings").out, mergerl("settings", "sample").out
    for name in ("mergerl optimize, mergerl plan", "mergerl finetune", "mergerl evaluate"):
        assert name in everything
        assert name not in one
    assert "sampler.num_steps" in one
    assert "--num-steps" in one
    assert "(that of the set," in one
    refused = mergerl("settings", "sampel")
    assert refused.code == 1
    assert "unknown command with settings 'sampel'; did you mean 'sample'" in refused.err


def test_json_has_what_a_program_needs(mergerl: Mergerl) -> None:
    document = json.loads(mergerl("settings", "finetune", "--json").out)["finetune"]
    found = {item["setting"]: item for item in document}
    assert found["reward.pool_size"] == {
        "setting": "reward.pool_size", "option": "--pool", "type": "int", "default": 5000,
        "default_text": "5000", "choices": [],
        "meaning": "N, images in the pool; in a search pathwise takes 1/20 of the budget at most.",
    }  # fmt: skip
    assert found["reward.subset_size"]["default"] == 50  # the paper's, not that of a search
    assert found["algorithm"]["choices"] == ["pg", "rs", "pathwise"]
    assert found["sampler.solver"]["option"] is None  # training has its own
    assert found["track"]["type"] == "list of str"
    assert found["extra_weights"]["type"] == "mapping"


def test_listed_defaults_are_what_is_used(mergerl: Mergerl) -> None:
    documents = json.loads(mergerl("settings", "--json").out)
    cases: list[tuple[str, Any, str]] = [
        ("optimize", OptimizeConfig, "checkpoints"), ("finetune", FinetuneConfig, "model"),
    ]  # fmt: skip
    for name, cls, argument in cases:
        said: dict[str, Any] = {argument: "x"}
        for item in documents[name]:
            if not item["setting"].startswith("sampler."):  # of the set
                set_dotted(said, item["setting"], item["default"])
        assert from_mapping(cls, said) == cls(**{argument: "x"})
        assert yaml.safe_load(yaml.safe_dump(said)) == {
            key: value for key, value in to_mapping(cls(**{argument: "x"})).items()
            if key != "sampler"
        }  # fmt: skip


def fields() -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Every field of every dataclass of settings, and its type."""
    for cls in vars(merge_rl.config).values():
        if isinstance(cls, type) and dataclasses.is_dataclass(cls) and "Config" in cls.__name__:
            kinds = typing.get_type_hints(cls)
            for item in dataclasses.fields(cls):
                yield f"{cls.__name__}.{item.name}", item, kinds[item.name]


@pytest.mark.parametrize(("name", "item", "kind"), [pytest.param(*f, id=f[0]) for f in fields()])
def test_every_setting_says_what_it_is(name: str, item: dataclasses.Field[Any], kind: Any) -> None:
    nested = any(map(dataclasses.is_dataclass, (kind, *typing.get_args(kind))))
    if nested or item.name in ARGUMENTS:
        assert ABOUT not in item.metadata
        return
    about = item.metadata[ABOUT]
    assert isinstance(about, About)
    assert about.help.endswith(".") or about.help.endswith("...")
    assert about.panel in PANELS
    assert about.flag is None or about.flag.startswith("--")
    if about.choices and item.default is not None:
        several = item.default if isinstance(item.default, tuple) else (item.default,)
        assert set(several) <= set(about.choices)


def test_an_option_of_one_name_is_one_setting_everywhere() -> None:
    command_line()  # all commands, whatever ran before
    keys: dict[str, set[str]] = {}
    for offer in COMMANDS.values():
        for setting in offer.options():
            keys.setdefault(str(offer.flag(setting)), set()).add(setting.key)
    # Final scores of a search and of training have the same names in different parts, as has what
    # stays as it is in one merge and in those of a search.
    several = {flag: found for flag, found in keys.items() if len(found) > 1}
    assert several == {
        "--final-images": {"evaluation.num_images", "curves.final_images"},
        "--repeats": {"evaluation.repeats", "curves.repeats", "repeats"},
        "--freeze": {"freeze", "merge.freeze"},
        "--under": {"rollout.under", "under"},
    }
