"""The `mergerl` command. Heavy imports happen inside commands, so that --help is quick."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Annotated, Final, NoReturn

import typer

from merge_rl import own_code
from merge_rl.cli import ranks
from merge_rl.errors import ConfigError, MergeRLError, SilentLeaderError
from merge_rl.version import __version__

# In the order of the help: what registers commands, which, and what each does. It is said here
# too, so that the list of them loads none.
COMMANDS: Final[Mapping[str, Mapping[str, str]]] = {
    "optimize:register": {
        "demo": "Write the embedded digits runs: an EDM2 and a SiT with reference statistics.",
        "optimize": "Search the merging coefficients of a checkpoint set: the main job.",
        "resume": "Go on with an interrupted run; it ends as if it had never been interrupted.",
    },
    "compare:register": {
        "compare": "Compare searchers: all with the same budget, scored on the same fresh seeds.",
        "report": "Write the page of a run, a fine-tuning run or a comparison: RUN/report.html.",
    },
    "optimize:register_plan": {
        "plan": "What a search will cost; takes the options of optimize, runs nothing.",
    },
    "convert:register": {
        "convert": "Turn checkpoints of any network into safetensors, not running them.",
    },
    "merge:register": {
        "merge": "Merge once: with coefficients, a recipe, an EMA profile or the plain average.",
    },
    "finetune:register": {
        "finetune": "Fine-tune a network, its weights instead of a merge, with the same reward.",
    },
    "sample:register": {
        "sample": "Generate a grid of images. The same seed is the same image, whatever the batch.",
    },
    "evaluate:register": {
        "evaluate": "Score a model: FID and others, the mean of repeats with its 95 % interval.",
        "reference": "Reference statistics of real images, to optimise against and to report.",
    },
    "inspect:register": {
        "inspect": "Say what a checkpoint set, run, reference or model is, and check it.",
    },
    "options.settings:register": {
        "settings": "List every setting of a command with its option, default and meaning.",
    },
    "hub:register": {
        "fetch": "Download published checkpoints and convert them to safetensors on the way.",
        "push": "Upload a model to the Hub: a finished run's, a set's, a folder's, a file's.",
    },
}


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"merge_rl {__version__}")
        raise typer.Exit


def options(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Find the best way to merge the checkpoints of a diffusion training run.

    Try it: [bold]mergerl demo digits[/bold], then
    [bold]mergerl optimize digits/edm2[/bold].
    """
    ranks.require_parallel(context.invoked_subcommand)
    if debug:
        os.environ["MERGERL_DEBUG"] = "1"


def _listed() -> None:
    """Stands for a command in the list of them."""


@functools.cache
def command_line(*homes: str, listed: bool = False) -> typer.Typer:
    """The commands of these rows of `COMMANDS`; of all, if none is named.

    `listed`: to say what they do, without their hundreds of options.
    """
    made = typer.Typer(
        name="mergerl",
        no_args_is_help=True,
        add_completion=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback()(options)
    for home in homes or COMMANDS:
        if listed:
            for name, summary in COMMANDS[home].items():
                made.command(name, help=summary)(_listed)
            continue
        module, _, register = home.partition(":")
        getattr(import_module(f"merge_rl.cli.{module}"), register)(made)
    for command in made.registered_commands:
        # The help breaks lines where the terminal ends, not where those of the source do.
        text = command.help or inspect.getdoc(command.callback) or ""
        command.help = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
    return made


INTERRUPTED = 130  # what some versions of the parser return for KeyboardInterrupt


def _needed(arguments: Sequence[str]) -> list[str]:
    """The row of the command that stands first, if one does; `settings` is about all of them."""
    first = next(iter(arguments), "settings")
    return [home for home, names in COMMANDS.items() if first in names and first != "settings"]


def _complain(sentence: str, *, anyone: bool = False) -> None:
    from merge_rl.cli.output import complain

    complain(sentence, anyone=anyone)


def _find_home() -> None:
    """Put the user's folder for `~/` where the shell has not."""
    if any("~/" in word for word in sys.argv[1:]):
        from merge_rl.config import at_home  # all settings: the help would wait for them

        sys.argv[1:] = at_home(sys.argv[1:])


def _require_place() -> None:
    """Refuse to work where the current folder was removed: libraries end the process there."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the current folder is there no more; change to one that is") from None


def _require_said(arguments: Sequence[str]) -> None:
    """Refuse an argument of no characters, which as a path would mean the current folder."""
    for before, argument in zip(("", *arguments), arguments, strict=False):
        if not argument or re.fullmatch("--[a-z][a-z0-9-]*=", argument):
            after = f" after {before}" if before and not argument else ""
            raise ConfigError(
                f"expected a value, got the empty argument {argument!r}{after}: is a variable of "
                "the shell not set?"
            )


# Threads of an operation wait for one another busily this often, some tens of microseconds, before
# they give their core away. Left alone they would wait for milliseconds, and where other programs
# use the cores, stand in each other's way for most of the time.
SPINS: Final = "5000"


def _share_cores() -> None:
    """For the OpenMP that comes with torch, which asks once, when it is loaded."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def _write_anything() -> None:
    """What an encoding of the terminal or the pipe lacks is written as Python writes it.

    Where there is no stdout or stderr at all (`>&-`), what would go there is dropped.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # of one that is no longer what it was opened as
                stream.reconfigure(errors="backslashreplace")


class Stop:
    """What Ctrl-C and SIGTERM do: the first raises KeyboardInterrupt, others nothing.

    Schedulers send SIGTERM before they kill: treated as Ctrl-C, which keeps what is saved. While
    the command ends it is not interrupted again: Python takes a thread for ended when the wait for
    it is broken off, and what that thread still computes would abort the process.
    """

    ending = False

    def __call__(self, _signal: int, _frame: FrameType | None) -> None:
        if not self.ending:
            self.ending = True
            raise KeyboardInterrupt


def main() -> None:
    """Run the command line; exit 0, or 1 after one sentence on stderr (2 for wrong usage)."""
    _share_cores()
    _write_anything()
    stop = Stop()
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, stop)
    ranks.quiet_followers()
    try:
        _require_place()
        _find_home()
        _require_said(sys.argv[1:])
        listed = sys.argv[1:] in ([], ["--help"], ["-h"])
        command = command_line(*_needed(sys.argv[1:]), listed=listed)
        # What a command remembers in its context (listings of the Hub) ends with it.
        code = copy_context().run(command, standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except MergeRLError as error:
        _fail(error, str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(error, f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        _complain(ranks.told() or "interrupted")  # torchrun stops all when one has failed
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 (the one place where everything ends)
        if type(error).__name__ == "NoArgsIsHelpError":  # the help is printed by now
            sys.exit(0)
        if hasattr(error, "format_message"):  # a usage error of the command line parser
            hint = getattr(getattr(error, "ctx", None), "command_path", "mergerl")
            _fail(error, f"{error.format_message()} (see {hint} --help)", USAGE)
        if type(error).__name__ == "Abort":  # what others raise for it
            _complain("interrupted")
            sys.exit(1)
        if type(error).__name__ == "Exit":
            sys.exit(getattr(error, "exit_code", 1))
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            size = re.search("allocate ([0-9]+) bytes", str(error))
            more = f": {int(size[1]):,} bytes were asked for at once" if size else ""
            _fail(error, f"out of memory{more}; smaller numbers need less")
        place, problem = own_code.place_of(error), f"{type(error).__name__}: {error}"
        said = f"{place}: {problem}" if place else f"unexpected {problem}"
        _fail(error, f"{said} (run with --debug for more)")


USAGE: Final = 2  # wrong usage of the command line, as its library says it


def _fail(error: Exception, sentence: str, code: int = 1) -> NoReturn:
    if os.environ.get("MERGERL_DEBUG"):
        raise error
    _complain(" ".join(sentence.split()), anyone=isinstance(error, SilentLeaderError))
    ranks.tell(" ".join(sentence.split()))
    sys.exit(code)


if __name__ == "__main__":
    main()
