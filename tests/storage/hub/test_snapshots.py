"""Which snapshots a selection takes: answers found by hand."""

from __future__ import annotations

import pytest

from merge_rl.errors import ConfigError, UnknownNameError
from merge_rl.storage.checkpoints.catalogue import load_catalogue
from merge_rl.storage.hub.fetch_sources import (
    RemoteFile,
    Selection,
    choose_times,
    parse_count,
    remote_file,
    select_files,
)

MI = 2**20
TIMES = [0, 200, 400, 700, 800, 1000, 1150]
FILES = [
    remote_file(f"run/snap-{kimg:07d}-{std:.3f}.pkl", size=kimg)
    for kimg in TIMES
    for std in (0.05, 0.1)
]


def names(files: tuple[RemoteFile, ...]) -> list[str]:
    return [file.name.removeprefix("run/snap-").removesuffix(".pkl") for file in files]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("192Mi", 192 * MI), ("8388608", 8388608), ("8_388_608", 8388608), ("1,024", 1024),
        ("2Gi", 2**31), ("3 ki", 3072), ("0", 0), ("1.5Mi", 3 * 2**19), ("1e6", 1_000_000),
        ("192M", 192_000_000), ("50k", 50_000),
    ],
)  # fmt: skip
def test_counts_of_images_have_units(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "Mi", "1.5", "-3", "192MB", "192m", "x"])
def test_other_counts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a number of images such as 50000, 5e4"):
        parse_count(text)


def test_the_nearest_snapshot_stands_in() -> None:
    # Back from 1150 by 300: 1150, 850, 550, 250. Nearest: 1150, 800, 400 or 700 (both 150
    # away: the newer), 200.
    assert choose_times([200, 400, 700, 800, 1000, 1150], last=4, every=300) == [
        200, 700, 800, 1150,
    ]  # fmt: skip
    assert choose_times([10, 20, 30], last=2, every=None) == [20, 30]
    assert choose_times([10, 20, 30], last=9, every=None) == [10, 20, 30]
    assert choose_times([30, 10, 20, 20], last=None, every=None) == [10, 20, 30]
    # Targets 30, 25, 20, 15, 10, 5: each time once.
    assert choose_times([10, 20, 30], last=None, every=5) == [10, 20, 30]
    assert choose_times([10, 20, 30], last=3, every=1) == [30]
    assert choose_times([7], last=8, every=1000) == [7]


def test_a_selection_of_published_snapshots() -> None:
    known = load_catalogue().find("edm2-img512-xs-raw")
    files = [remote_file(name) for name in known.file_names()]
    chosen = select_files(
        files, Selection(last=8, every=parse_count("192Mi"), ema_std=(0.05,)), known.name
    )
    assert [file.nimg for file in chosen] == [(2048 - 192 * k) * MI for k in range(7, -1, -1)]
    assert {file.ema_std for file in chosen} == {0.05}


def test_names_say_progress_width_and_series() -> None:
    file = remote_file("a/network-snapshot-2147483-0.050.pkl", size=3)
    assert (file.nimg, file.ema_std, file.track, file.size) == (2**31, 0.05, "ema-0.050", 3)
    assert remote_file("x-0008388.safetensors").track == "raw"
    assert remote_file("SiT-XL-2-256x256.pt").nimg is None


def test_series_widths_and_names_are_chosen() -> None:
    assert len(select_files(FILES, Selection(), "here")) == 12  # without the untrained two
    chosen = select_files(FILES, Selection(track="ema-0.100", last=2), "here")
    assert names(chosen) == ["0001000-0.100", "0001150-0.100"]
    chosen = select_files(FILES, Selection(ema_std=(0.1, 0.05), last=1), "here")
    assert names(chosen) == ["0001150-0.050", "0001150-0.100"]
    for name in ("run/snap-0000000-0.050.pkl", "snap-0000000-0.050", "snap-0000000-0.050.pkl"):
        assert names(select_files(FILES, Selection(files=(name,)), "here")) == ["0000000-0.050"]


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown track 'ema-0\.07'; did you mean 'ema-0"):
        select_files(FILES, Selection(track="ema-0.07"), "here")
    with pytest.raises(ConfigError, match=r"no file has ema_std 0\.07 \(there are: 0\.050, 0\.100"):
        select_files(FILES, Selection(ema_std=(0.05, 0.07)), "here")
    with pytest.raises(UnknownNameError, match="unknown file 'snap'"):
        select_files(FILES, Selection(files=("snap",)), "here")
    with pytest.raises(ConfigError, match="no file name tells its training time"):
        select_files([remote_file("a.pt")], Selection(last=1), "here")
    with pytest.raises(ConfigError, match="here: the selection of files is empty"):
        select_files([], Selection(), "here")
    with pytest.raises(ConfigError, match="expected last of at least 1, got 0"):
        Selection(last=0)
    with pytest.raises(ConfigError, match="expected every of at least 1, got 0"):
        Selection(every=0)
