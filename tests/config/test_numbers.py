"""Numbers mean the same in manifests, settings and options."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from merge_rl.cli.main import command_line
from merge_rl.cli.options.layers import window
from merge_rl.cli.options.signature import decimal, integer, positive
from merge_rl.config import (
    OptimizeConfig,
    SamplerConfig,
    SearchConfig,
    dump_config,
    finite,
    from_mapping,
    nimg_from_kimg,
    numbers_in,
    real_number,
    to_mapping,
    whole_number,
)
from merge_rl.errors import ConfigError
from merge_rl.storage.checkpoints import MANIFEST_NAME, read_manifest
from merge_rl.storage.hub import parse_count
from merge_rl.untrusted import parse_yaml

WHOLE = [
    ("50000", 50_000), (50_000, 50_000), (5e4, 50_000), ("5e4", 50_000), ("50k", 50_000),
    ("50K", 50_000), ("1e6", 1_000_000), ("1.5M", 1_500_000), ("1,024", 1024), ("8_388_608", 2**23),
    ("192Mi", 192 * 2**20), ("3 ki", 3072), ("2Gi", 2**31), ("2G", 2 * 10**9), ("0", 0),
    ("0.5k", 500), ("12345678901234567890", 12345678901234567890),
]  # fmt: skip
NOT_WHOLE = ["", "Mi", "k", "1.5", 1.5, "5e-2", "1e9999999", "192MB", "50m", "1,5", "x", True, None,
             "0x10", "1:30", "٣", "1e400", 2**64, 10**400,
             "1 2", "--3", "1e", math.inf, math.nan, [1], "9" * 500]  # fmt: skip


@pytest.mark.parametrize(("written", "number"), WHOLE)
def test_whole_numbers(written: object, number: int) -> None:
    found = whole_number(written)
    assert found == number
    assert type(found) is int
    assert real_number(written) == float(number)
    assert integer(written) == number


@pytest.mark.parametrize("written", NOT_WHOLE)
def test_what_is_no_whole_number(written: object) -> None:
    assert whole_number(written) is None


@pytest.mark.parametrize("written", ["1e400", 10**400, -(10**309)])
def test_a_finite_number_that_would_be_infinite_is_none(written: object) -> None:
    assert real_number(written) is None


def test_settings_take_no_number_beyond_64_bits() -> None:
    # Of the field's own type, and yet none that can be computed with.
    with pytest.raises(ConfigError, match=r"c\.num_steps: .* within 64 bits, found 1000"):
        from_mapping(SamplerConfig, {"num_steps": 10**400}, "c")
    with pytest.raises(ConfigError, match=r"c\.guidance: expected float, found int 1000"):
        from_mapping(SamplerConfig, {"guidance": 10**400}, "c")


def test_infinite_settings_pass_through_json() -> None:
    settings = SearchConfig(clip=math.inf)
    text = json.dumps(finite(to_mapping(settings)), allow_nan=False)
    assert from_mapping(SearchConfig, json.loads(text)) == settings


@pytest.mark.parametrize(
    ("written", "number"),
    [("5e-2", 0.05), ("0.05", 0.05), (".5", 0.5), ("-1E-3", -0.001), ("1.", 1.0), (2, 2.0),
     ("inf", math.inf), ("-inf", -math.inf), (math.inf, math.inf), ("0.05k", 50.0)],
)  # fmt: skip
def test_real_numbers(written: object, number: float) -> None:
    assert real_number(written) == number
    assert type(real_number(written)) is float
    assert decimal(written) == number


@pytest.mark.parametrize("written", ["", "x7", "5e", True, None, ".", "e5", "k", "1..2"])
def test_what_is_no_number(written: object) -> None:
    assert real_number(written) is None


def _numeric_options() -> dict[str, object]:
    """(command, parameter) of every option or argument that is a number -> what reads it."""
    found = {}
    for command in command_line().registered_commands:
        assert command.callback is not None
        signature = inspect.signature(command.callback, eval_str=True)
        for name, parameter in signature.parameters.items():
            kind, *about = get_args(parameter.annotation) or [parameter.annotation]
            if {int, float} & {kind, *get_args(kind)}:
                found[f"{command.callback.__name__} {name}"] = about[0].parser
    return found


def test_every_option_reads_numbers_by_the_one_parser() -> None:
    parsers = _numeric_options()
    by_hand = ("plan memory", "sample columns", "compare curve_images")
    assert {parsers[where] for where in by_hand} == {decimal, integer, positive}
    assert [where for where, read in parsers.items() if read is None] == []


@pytest.mark.parametrize("written", ["010", "1_0", "+10", "1e1", "10.0", "0.01k"])
def test_files_read_numbers_as_options_do(written: str) -> None:
    for said in (f"budget: {written}", f'budget: "{written}"'):
        found = parse_yaml(said, "a")
        assert from_mapping(OptimizeConfig, found).budget == 10 == integer(written)


@pytest.mark.parametrize("written", ["0x10", "0b1", "0o7", "1:30", "1:30.5", "!!int 0x10", ".inf"])
def test_files_read_no_number_that_options_do_not(written: str) -> None:
    with pytest.raises(ConfigError, match="config.budget: expected int, found"):
        from_mapping(OptimizeConfig, parse_yaml(f"budget: {written}", "a"))


def test_lists_of_numbers() -> None:
    assert numbers_in("0.2,-0.1 5e-2", real_number) == [0.2, -0.1, 0.05]
    assert numbers_in("1,1k, 2Ki", whole_number) == [1, 1000, 2048]
    for text in ("", " , ", "1,x", "1.5"):
        assert numbers_in(text, whole_number) is None


def test_options_by_hand_take_numbers_as_settings_do(
    tiny: Path, tmp_path: Path, mergerl: Callable[..., Any]
) -> None:
    weights = "5e-1,.25,0.1k,-1e2,0,0,0,0"
    merged = mergerl("merge", tiny, tmp_path / "m", "--coefficients", weights, "--json")
    assert [rows[0] for rows in json.loads(merged.out)["coefficients"].values()] == [
        0.5, 0.25, 100, -100, 0, 0, 0, 0,
    ]  # fmt: skip
    refused = mergerl("sample", tiny, "--columns", "0")
    assert "'0' is not a whole number of 1 or more" in refused.err
    plan = mergerl("plan", tiny, "--devices", "1e3,0")
    assert "expected --devices as numbers >= 1, such as 1,8,64, got '1e3,0'" in plan.err
    assert window("1e1+2e0", "cpu") == {"rollout.window_size": 2, "rollout.window_start": 10}
    for text in ("", "1.5", "x+2", "+2", "2+"):
        with pytest.raises(ConfigError, match="expected --window N or S"):
            window(text, "cpu")


@pytest.mark.parametrize("text", ["50k", "5e4", "50000", "50_000"])
def test_one_number_everywhere(
    text: str, tmp_path: Path, tiny: Path, mergerl: Callable[..., Any]
) -> None:
    (tmp_path / MANIFEST_NAME).write_text(
        "version: 1\nmodel: {model: edm2}\n"
        f"checkpoints: [{{file: a.safetensors, nimg: {text}, ema_std: 5e-2}}]\n"
    )
    (entry,) = read_manifest(tmp_path).checkpoints
    assert (entry.nimg, entry.ema_std) == (50_000, 0.05)
    assert from_mapping(OptimizeConfig, {"checkpoints": "x", "budget": text}).budget == 50_000
    assert parse_count(text) == 50_000
    plan = mergerl("optimize", tiny, "--budget", text, "--set", "budget=x")
    assert "config.budget: expected int, found str 'x'" in plan.err  # the option itself was read
    refused = mergerl("optimize", tiny, "--budget", "many")
    assert refused.code == 2  # wrong usage
    assert "'many' is not a valid integer, such as 50000, 5e4, 50k or 192Mi" in refused.err


@pytest.mark.parametrize(("kimg", "nimg"), [(0, 0), (1, 1024), (41, 41 * 1024), (43, 42 * 1024)])
def test_images_of_a_kimg(kimg: int, nimg: int) -> None:
    assert nimg_from_kimg(kimg) == nimg


@pytest.mark.parametrize(("kimg", "following"), [(42, 43), (-1, 0)])
def test_a_kimg_that_no_multiple_has(kimg: int, following: int) -> None:
    # 41 x 1024 is 41,984 and 42 x 1024 is 43,008.
    told = f"expected kimg of a multiple of 1024 images, got {kimg} (the next is {following})"
    with pytest.raises(ConfigError, match=f"^{re.escape(told)}$"):
        nimg_from_kimg(kimg)


def test_settings_are_written_as_people_read_them() -> None:
    assert "checkpoints: données\n" in dump_config(OptimizeConfig(checkpoints="données"))
