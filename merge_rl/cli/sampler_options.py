"""Options of the sampler, the same for every command that generates images with one network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from merge_rl.config.sampler import DIFFUSIONS, LAST_STEPS, SOLVERS
from merge_rl.errors import ConfigError

if TYPE_CHECKING:
    from merge_rl.config import SamplerConfig

PANEL: Final = "Sampler"
SOLVER_HELP: Final = f"{', '.join(SOLVERS)} (dopri5 depends on the batch)."
STEPS_HELP: Final = "Solver intervals; those of an SDE include the last one, without noise."
FAST_HELP: Final = "On an accelerator: a compiled network in bfloat16."

Autoencoder = Annotated[
    str | None,
    typer.Option(
        "--autoencoder",
        help="What makes images of latents: sd-vae-edm2 or sd-vae-sit. \\[default: of the set]",
    ),
]
AutoencoderWeights = Annotated[
    str | None,
    typer.Option("--autoencoder-weights", help="Its weights: file, folder, or public name."),
]
Solver = Annotated[str | None, typer.Option("--solver", help=SOLVER_HELP, rich_help_panel=PANEL)]
Steps = Annotated[int | None, typer.Option("--steps", help=STEPS_HELP, rich_help_panel=PANEL)]
Guidance = Annotated[
    float | None, typer.Option("--guidance", help="Strength; 1 is off.", rich_help_panel=PANEL)
]
Guide = Annotated[
    Path | None,
    typer.Option(
        "--guide",
        help="The weaker network. \\[default: that of the run or set, or the null class]",
        rich_help_panel=PANEL,
    ),
]
Diffusion = Annotated[
    str | None,
    typer.Option(
        "--diffusion", help=f"Noise of an SDE: {', '.join(DIFFUSIONS)}.", rich_help_panel=PANEL
    ),
]
LastStep = Annotated[
    str | None,
    typer.Option(
        "--last-step",
        help=f"End of a path's SDE: {', '.join(LAST_STEPS)}.",
        rich_help_panel=PANEL,
    ),
]
LowMemory = Annotated[
    bool,
    typer.Option(
        "--low-memory",
        help="Guidance by the null class in two forward passes instead of a doubled batch.",
        rich_help_panel=PANEL,
    ),
]
Fast = Annotated[bool, typer.Option("--fast", help=FAST_HELP, rich_help_panel=PANEL)]
Other = Annotated[
    list[str] | None,
    typer.Option(
        "--sampler",
        metavar="KEY=VALUE",
        help="Any other setting, such as path=gvp or guidance_channels=null (all).",
        rich_help_panel=PANEL,
    ),
]


def choose_sampler(
    near: SamplerConfig | None,
    given: Mapping[str, Any],
    *,
    fast: bool = False,
    other: Sequence[str] = (),
) -> SamplerConfig:
    """The settings near a model with those of the command line on top; None was not given."""
    import yaml

    from merge_rl.cli.settings import split_pair
    from merge_rl.config import SamplerConfig, from_mapping, to_mapping
    from merge_rl.core.compatibility import require_solver

    values = to_mapping(near or SamplerConfig())
    if fast:
        values |= fast_settings()
    values |= {key: value for key, value in given.items() if value is not None}
    for pair in other:
        key, text = split_pair(pair)
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--sampler {pair}: the value is not valid YAML") from None
    chosen = from_mapping(SamplerConfig, values, "sampler")
    require_solver(chosen.solver)
    return chosen


def fast_settings() -> dict[str, Any]:
    """What `--fast` means."""
    return {"precision": "bfloat16", "compile": True}
