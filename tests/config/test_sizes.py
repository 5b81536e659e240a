"""What a network's config may say, checked before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merge_rl.errors import ConfigError, ManifestError
from merge_rl.registry import build_model
from merge_rl.storage.checkpoints.manifest import relative_name
from tests.finetuning import SIT
from tests.fixtures import TINY_MODEL


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("num_blocks", 10**8, "expected num_blocks as a whole number from 0 to 200, got 100000000"),
        ("num_blocks", True, "expected num_blocks as a whole number from 0 to 200, got True"),
        ("num_blocks", 1.0, "expected num_blocks as a whole number"),
        ("model_channels", -8, "expected model_channels as a whole number from 1 to 16777216, got"),
        ("img_resolution", 2**40, "expected img_resolution as a whole number"),
        ("channel_mult", [], "expected channel_mult of 1 to 32 items, got 0 items"),
        ("channel_mult", [1] * 33, "expected channel_mult of 1 to 32 items, got 33 items"),
        ("channel_mult", [1, "2"], "expected channel_mult as a whole number"),
        ("label_balance", float("nan"), "expected label_balance as a finite number, got nan"),
        ("concat_balance", float("inf"), "expected concat_balance as a finite number, got inf"),
        ("sigma_data", 0, "expected sigma_data > 0, got 0"),
        ("sigma_data", "1", "expected sigma_data as a finite number, got '1'"),
        ("sigma_data", True, "expected sigma_data as a finite number, got True"),
        ("sigma_data", 10**400, "expected sigma_data as a finite number, got 1000"),
        ("clip_act", -1, "expected clip_act > 0, got -1"),
        ("res_balance", 2, "expected res_balance from 0 to 1, got 2"),
        ("use_fp16", 1, "expected use_fp16 as true or false, got 1"),
        ("model_channels", None, "expected model_channels as a whole number"),
        ("channels_per_head", 0, "expected channels_per_head as a whole number from 1 to"),
        ("channel_mult", 2, "expected channel_mult as a list, got 2"),
        ("img_resolution", [8], r"expected img_resolution as one value, got \[8\]"),
        ("attn_resolutions", [[4]], r"expected attn_resolutions as a whole number.*got \[4\]"),
        ("resample_filter", [1, 2, 1], "expected a resample_filter of even length, sum not 0, got"),
        ("resample_filter", [1, -1], "expected a resample_filter of even length, sum not 0, got"),
    ],
)
def test_what_no_network_can_have_is_refused(option: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        build_model({**TINY_MODEL, option: value})
    assert "\n" not in str(refused.value)


def test_other_families_are_held_to_the_same() -> None:
    with pytest.raises(
        ConfigError, match="the sit network does not take this config: expected depth as a"
    ):
        build_model({**SIT, "depth": 10**6})
    for option, value, said in (
        ("class_dropout_prob", -1, "from 0 to 1, got -1"),
        ("mlp_ratio", 1e300, r"above 0, at most 1000, got 1e\+300"),
        ("mlp_ratio", "x", "as a finite number, got 'x'"),
        ("learn_sigma", "no", "as true or false, got 'no'"),
    ):
        with pytest.raises(ConfigError, match=f"expected {option} {said}"):
            build_model({**SIT, option: value})
    build_model(SIT)


def test_names_that_no_file_system_takes_are_refused() -> None:
    assert relative_name("a" * 255, "here") == "a" * 255
    with pytest.raises(ManifestError, match="here: expected a path of names of at most 255 bytes"):
        relative_name(f"raw/{'é' * 128}", str(Path("here")))
