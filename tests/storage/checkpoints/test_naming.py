"""What file names say of a checkpoint."""

from __future__ import annotations

import pytest

from merge_rl.storage.checkpoints.manifest import parse_stem


@pytest.mark.parametrize(
    ("stem", "nimg", "ema_std"),
    [
        ("network-snapshot-0008388-0.050", 8_388_608, 0.05),
        ("edm2-img512-xs-2147483-0.135", 2_147_483_648, 0.135),
        ("training-state-0033554", 33_554_432, None),
        ("network-snapshot-0000000-0.100", 0, 0.1),
        # 42 is the kimg of no multiple of 1024: training that advances by other counts.
        ("run-0000042", 42_000, None),
        ("SiT-XL-2-256x256", None, None),
        ("a-0008388-0.500", None, None),  # no EMA is that wide
        ("a-123", None, None),
        ("0050000", None, None),
    ],
)
def test_names_say_progress_and_width(stem: str, nimg: int | None, ema_std: float | None) -> None:
    assert parse_stem(stem) == (nimg, ema_std)
