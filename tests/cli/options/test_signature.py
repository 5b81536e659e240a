"""Commands made from settings: their options, and the mapping that comes of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

import merge_rl.cli.main as command_line
from merge_rl.cli.options import (
    COMMANDS,
    FORMER,
    Former,
    layers,
    signature,
    split_tracks,
    with_settings,
)
from merge_rl.config import OptimizeConfig, SampleConfig
from merge_rl.config.setting import DATA, REWARD, about, setting
from merge_rl.errors import ConfigError, UnknownNameError


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A part."""

    size: int = setting(4, "How many.", REWARD, "--size")
    rate: float | None = setting(None, "How fast.", REWARD, "--rate", unset="as fast as it goes")
    quiet: bool = setting(False, "No noise.", REWARD, "--quiet")
    deep: int = setting(1, "Reached by its key alone.")


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A whole."""

    name: str = setting("sum", "What.", flag="--name", choices=("sum", "product"))
    batch: int = setting(9, "A number or auto.", flag="--batch", words={"auto": -1})
    source: str | None = setting(None, "From.", DATA, "--source", named="sources")
    sources: Mapping[str, str] = field(default_factory=dict, metadata=about(help="By name."))
    weights: str | None = setting(None, "A file.", DATA, "--weights", path=True)
    pairs: Mapping[str, str] = field(
        default_factory=dict, metadata=about(help="Pairs.", flag="--pair", metavar="A=B")
    )
    inner: Inner = Inner(size=7)
    other: Inner | None = None


Said = dict[str, Any]
Run = Callable[..., Said]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command with settings of its own; the mapping that it gets, and its argument."""
    former = (
        Former(commands=("act",), old="--length", new="--size"),
        Former(commands=("act",), old="--inner", new="--set", prefix="inner."),
        Former(commands=("another",), old="--magnitude", new="--size"),
    )
    monkeypatch.setattr(layers, "FORMER", former)
    monkeypatch.setattr(signature, "COMMANDS", {})
    seen: list[Said] = []

    @with_settings(Outer, without=["other"])
    def act(
        what: Annotated[str, typer.Argument()],
        settings: Mapping[str, Any],
        count: Annotated[int, typer.Option(help="Its own.")] = 3,
    ) -> None:
        """Act."""
        seen.append({"what": what, "count": count, **settings})

    app = typer.Typer()
    app.command()(act)

    def invoke(*arguments: object) -> Said:
        seen.clear()
        ended = CliRunner().invoke(app, ["it", *map(str, arguments)])
        if isinstance(ended.exception, (ConfigError, UnknownNameError)):
            raise ended.exception
        assert ended.exit_code == 0, ended.output
        return seen[0] if seen else {"output": ended.output}

    return invoke


def test_what_was_not_said_is_not_there(run: Run) -> None:
    assert run() == {"what": "it", "count": 3}
    # A default that is typed was said.
    assert run("--size", 7, "--name", "sum") == {
        "what": "it", "count": 3, "name": "sum", "inner": {"size": 7},
    }  # fmt: skip


def test_options_become_nested_settings(run: Run) -> None:
    said = run(
        "--count", 5, "--rate", 0.5, "--quiet", "--batch", "auto", "--weights", "./w",
        "--source", "s", "--source", "a.b=t", "--pair", "c=d=e", "--pair", "f=g",
    )  # fmt: skip
    assert said == {
        "what": "it", "count": 5, "inner": {"rate": 0.5, "quiet": True}, "batch": "auto",
        "weights": "w", "source": "s", "sources": {"a.b": "t"}, "pairs": {"c": "d=e", "f": "g"},
    }  # fmt: skip


def test_file_options_and_pairs_lie_over_each_other(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("inner: {size: 1, rate: 2, deep: 3}\nname: product\npairs: {x: y}\n")
    said = run("--config", file, "--size", 4, "--rate", 5, "--pair", "a=b", "--set", "inner.rate=6")
    assert said["inner"] == {"size": 4, "rate": 6, "deep": 3}
    assert (said["name"], said["pairs"]) == ("product", {"x": "y", "a": "b"})


def test_help_has_real_defaults(run: Run) -> None:
    text = " ".join(run("--help")["output"].replace("│", " ").split())
    # That of the whole, not of the part; Typer has called numbers INTEGER before.
    assert re.search(r"--size (<int>|INTEGER) How many\. \[default: 7\]", text)
    assert "[default: (as fast as it goes)]" in text
    assert "--name sum|product What. [default: sum]" in text
    assert "A number or auto. [default: 9]" in text
    for hidden in ("--deep", "--length", "--inner", "--magnitude", "--other"):
        assert hidden not in text


def test_former_names_work_and_are_told(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[str, str]] = []
    layers.note_former, kept = lambda *names: told.append(names), layers.note_former
    try:
        assert run("--length", 5, "--inner", "rate=2", "--set", "inner.rate=3") == {
            "what": "it", "count": 3, "inner": {"size": 5, "rate": 3},
        }  # fmt: skip
        with pytest.raises(ConfigError, match="--length is --size now; expected one of the two"):
            run("--length", 5, "--size", 6)
    finally:
        layers.note_former = kept
    assert told[:2] == [("--length", "--size"), ("--inner", "--set inner....")]
    kept("--length", "--size")
    note = "note: --length is --size now; the next release does not know the old name\n"
    assert capsys.readouterr() == ("", note)


def test_trackers_that_a_track_named_formerly(capsys: pytest.CaptureFixture[str]) -> None:
    assert split_tracks(["wandb", "raw", "tensorboard"]) == ("raw", ["wandb", "tensorboard"])
    err = capsys.readouterr().err
    assert "note: --track wandb is --log-to wandb now" in err
    assert "note: --track tensorboard is --log-to tensorboard now" in err
    assert split_tracks([]) == (None, [])
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ConfigError, match="expected one --track, got 2: raw, ema"):
        split_tracks(["raw", "ema"])


def test_the_table_of_former_names_fits_the_commands() -> None:
    assert command_line.command_line()  # all commands are there
    assert len({(name, former.old) for former in FORMER for name in former.commands}) == sum(
        len(former.commands) for former in FORMER
    )
    for former in FORMER:
        for name in former.commands:
            offer = COMMANDS[name]
            flags = {offer.flag(setting) for setting in offer.settings()}
            assert former.old not in flags
            assert former.new in flags | {"--set", "--track"}


def test_no_two_options_have_one_name() -> None:
    assert command_line.command_line()  # all commands are there
    assert len(COMMANDS) > 5
    for name, offer in COMMANDS.items():
        flags = [offer.flag(setting) for setting in offer.options()]
        flags += [short.flag for short in offer.shorthands()]
        flags += [former.old for former in layers.former_names(name)]
        assert len(flags) == len(set(flags)), name


def test_fast_is_what_a_command_has_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    """The decoder's dtype is a search's setting; a sample's is that of the model's run."""
    network = {"precision": "bfloat16", "compile": True}
    typed = {"said_fast": True, "said_device": "cuda"}
    said = {
        cls: signature.what_was_said(signature.Offer(command="x", cls=cls), typed)
        for cls in (OptimizeConfig, SampleConfig)
    }
    sampled = {"device": "cuda", "sampler": network}
    assert said[OptimizeConfig] == {**sampled, "autoencoder_dtype": "bfloat16"}
    assert said[SampleConfig] == sampled
    assert "--fast" not in capsys.readouterr().err
    offer = signature.Offer(command="x", cls=OptimizeConfig)
    assert signature.what_was_said(offer, {"said_fast": True}) == {}
    assert "--fast is for accelerators" in capsys.readouterr().err
