"""The `mergerl` command. Heavy imports happen inside commands, so that --help is quick."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import FrameType
from typing import Annotated, Final, NoReturn

import typer

from merge_rl.cli import ranks
from merge_rl.cli.output import complain
from merge_rl.errors import MergeRLError, SilentLeaderError
from merge_rl.version import __version__

# In the order of the help: what registers commands, and which.
COMMANDS: Final[Mapping[str, tuple[str, ...]]] = {
    "optimize:register": ("demo", "optimize", "resume"),
    "compare:register": ("compare", "report"),
    "optimize:register_plan": ("plan",),
    "convert:register": ("convert",),
    "merge:register": ("merge",),
    "finetune:register": ("finetune",),
    "sample:register": ("sample",),
    "evaluate:register": ("evaluate", "reference"),
    "inspect:register": ("inspect",),
    "options.settings:register": ("settings",),
    "hub:register": ("fetch", "push"),
}


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"merge_rl {__version__}")
        raise typer.Exit


def options(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
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


def _described(command: Callable[..., None]) -> Callable[[], None]:
    """A command that takes nothing and does nothing, of the same name and description."""

    def described() -> None:
        """Nothing: it is not called."""

    described.__name__, described.__doc__ = command.__name__, command.__doc__
    return described


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
        module, _, register = home.partition(":")
        getattr(import_module(f"merge_rl.cli.{module}"), register)(made)
    for info in made.registered_commands if listed else ():
        if info.callback is not None:
            info.callback = _described(info.callback)
    return made


INTERRUPTED = 130  # what some versions of the parser return for KeyboardInterrupt


def _needed(arguments: Sequence[str]) -> list[str]:
    """The row of the command that stands first, if one does; `settings` is about all of them."""
    first = next(iter(arguments), "settings")
    return [home for home, names in COMMANDS.items() if first in names and first != "settings"]


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
    """Run the command line; exit 0, or 1 after one sentence on stderr."""
    stop = Stop()
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, stop)
    ranks.quiet_followers()
    try:
        listed = sys.argv[1:] in (["--help"], ["-h"])
        code = command_line(*_needed(sys.argv[1:]), listed=listed)(standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except MergeRLError as error:
        _fail(error, str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(error, f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        complain(ranks.told() or "interrupted")  # torchrun stops all when one has failed
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 (the one place where everything ends)
        if type(error).__name__ == "NoArgsIsHelpError":  # the help is printed by now
            sys.exit(0)
        if hasattr(error, "format_message"):  # a usage error of the command line parser
            hint = getattr(getattr(error, "ctx", None), "command_path", "mergerl")
            _fail(error, f"{error.format_message()} (see {hint} --help)")
        if type(error).__name__ == "Abort":  # what others raise for it
            complain("interrupted")
            sys.exit(1)
        if type(error).__name__ == "Exit":
            sys.exit(getattr(error, "exit_code", 1))
        _fail(error, f"unexpected {type(error).__name__}: {error} (run with --debug for more)")


def _fail(error: Exception, sentence: str) -> NoReturn:
    if os.environ.get("MERGERL_DEBUG"):
        raise error
    complain(" ".join(sentence.split()), anyone=isinstance(error, SilentLeaderError))
    ranks.tell(" ".join(sentence.split()))
    sys.exit(1)


if __name__ == "__main__":
    main()
