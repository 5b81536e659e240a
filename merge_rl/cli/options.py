"""Options that every command that searches has: checkpoints, data, model and sampling, scores."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from merge_rl.config import (
    AUTO_BATCH,
    DIFFUSIONS,
    LAST_STEPS,
    SOLVERS,
    OptimizeConfig,
    from_mapping,
    load_mapping,
    overlaid,
    override,
    set_dotted,
    split_pair,
)
from merge_rl.errors import ConfigError

if TYPE_CHECKING:
    from merge_rl.config import SamplerConfig


SEARCH: Final = "Search"
MODEL: Final = "Model and sampling"
DATA: Final = "Real data"
FINAL: Final = "Final scores"

Checkpoints = Annotated[
    Path, typer.Argument(metavar="CKPTS", help="Folder of .safetensors, with or without manifest.")
]
Config = Annotated[
    Path | None, typer.Option(help="YAML file of settings; other options override it.")
]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting, such as search.decay=0.9."),
]
Track = Annotated[str | None, typer.Option(help="Series of the manifest to use. \\[default: all]")]
Budget = Annotated[
    int | None,
    typer.Option(
        help="Images a search may generate, everything included. \\[default: 50000]",
        rich_help_panel=SEARCH,
    ),
]
Extractor = Annotated[str | None, typer.Option(help="Feature extractor.", rich_help_panel=DATA)]
ExtractorWeights = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]PATH",
        help="Its weights; with NAME those of another extractor of the reward.",
        rich_help_panel=DATA,
    ),
]
Reference = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]PATH",
        help="Statistics of real data to optimise against; with NAME for another extractor of the "
        "reward.",
        rich_help_panel=DATA,
    ),
]
Heldout = Annotated[
    Path | None,
    typer.Option(help="Statistics of real data that the search never sees.", rich_help_panel=DATA),
]
Autoencoder = Annotated[
    str | None,
    typer.Option(
        help="What makes images of latents: sd-vae-edm2 or sd-vae-sit.", rich_help_panel=MODEL
    ),
]
AutoencoderWeights = Annotated[
    str | None,
    typer.Option(help="Its weights: file, folder, or public name.", rich_help_panel=MODEL),
]
Solver = Annotated[
    str | None, typer.Option(help="Any but the adaptive, such as heun.", rich_help_panel=MODEL)
]
Steps = Annotated[int | None, typer.Option(help="Solver intervals.", rich_help_panel=MODEL)]
Guidance = Annotated[float | None, typer.Option(help="Strength; 1 is off.", rich_help_panel=MODEL)]
Guide = Annotated[Path | None, typer.Option(help="The weaker network.", rich_help_panel=MODEL)]
FAST_HELP: Final = "On an accelerator: a compiled network in bfloat16."
Fast = Annotated[bool, typer.Option("--fast", help=FAST_HELP, rich_help_panel=MODEL)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...", rich_help_panel=MODEL)]
FinalImages = Annotated[
    int | None, typer.Option(help="N of one repeat. \\[default: 5000]", rich_help_panel=FINAL)
]
Repeats = Annotated[
    int | None, typer.Option(help="At least 3. \\[default: 4]", rich_help_panel=FINAL)
]


def shared_settings(
    *,
    extractor_weights: list[str] | None,
    reference: list[str] | None,
    solver: str | None,
    steps: int | None,
    guidance: float | None,
    guide: Path | None,
    fast: bool,
    final_images: int | None,
    repeats: int | None,
    **named: Any,
) -> dict[str, Any]:
    """What these options set, by key; `named` are those whose key is their name."""
    own_reference, references = split_named("--reference", reference or [])
    own_weights, weights = split_named("--extractor-weights", extractor_weights or [])
    found = {
        **named,
        "extractor_weights": own_weights, "reference": own_reference,
        "extra_references": references, "extra_weights": weights,
        "sampler.solver": solver, "sampler.num_steps": steps,
        "sampler.guidance": guidance, "sampler.guide": guide,
        "evaluation.num_images": final_images, "evaluation.repeats": repeats,
    }  # fmt: skip
    if fast:
        found |= {f"sampler.{key}": value for key, value in fast_settings().items()}
    return found


PANEL: Final = "Sampler"
SOLVER_HELP: Final = f"{', '.join(SOLVERS)} (dopri5 depends on the batch)."
STEPS_HELP: Final = "Solver intervals; those of an SDE include the last one, without noise."

SamplingAutoencoder = Annotated[
    str | None,
    typer.Option(
        "--autoencoder",
        help="What makes images of latents: sd-vae-edm2 or sd-vae-sit. \\[default: of the set]",
    ),
]
SamplingAutoencoderWeights = Annotated[
    str | None,
    typer.Option("--autoencoder-weights", help="Its weights: file, folder, or public name."),
]
SamplingSolver = Annotated[
    str | None, typer.Option("--solver", help=SOLVER_HELP, rich_help_panel=PANEL)
]
SamplingSteps = Annotated[
    int | None, typer.Option("--steps", help=STEPS_HELP, rich_help_panel=PANEL)
]
SamplingGuidance = Annotated[
    float | None, typer.Option("--guidance", help="Strength; 1 is off.", rich_help_panel=PANEL)
]
SamplingGuide = Annotated[
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
SamplingFast = Annotated[bool, typer.Option("--fast", help=FAST_HELP, rich_help_panel=PANEL)]
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
    from merge_rl.config import SamplerConfig, from_mapping, split_pair, to_mapping
    from merge_rl.core.sampling.compatibility import require_solver
    from merge_rl.untrusted import parse_yaml

    values = to_mapping(near or SamplerConfig())
    if fast:
        values |= fast_settings()
    values |= {key: value for key, value in given.items() if value is not None}
    for pair in other:
        key, text = split_pair(pair)
        values[key] = parse_yaml(text, f"--sampler {pair}", ConfigError)
    chosen = from_mapping(SamplerConfig, values, "sampler")
    require_solver(chosen.solver)
    return chosen


def fast_settings() -> dict[str, Any]:
    """What `--fast` means."""
    return {"precision": "bfloat16", "compile": True}


def build_config(
    checkpoints: Path,
    file: Path | None,
    given: Mapping[str, Any],
    *,
    groups: Sequence[str] = (),
    overrides: Sequence[str] = (),
    sampler: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
) -> OptimizeConfig:
    """Defaults, then a `base`, the YAML file, options, and KEY=VALUE overrides.

    `given` maps dotted keys to values; None means that the option was not used. `sampler` holds
    the checkpoint set's own sampler settings, which single options change one by one.
    """
    values = overlaid(base or {}, load_mapping(file) if file else {})
    values["checkpoints"] = str(checkpoints)
    for key, value in given.items():
        if value is not None:
            if isinstance(value, dict) and isinstance(values.get(key), Mapping):
                value = {**values[key], **value}  # an option adds to the file's
            set_dotted(values, key, str(value) if isinstance(value, Path) else value)
    if groups:
        set_dotted(values, "merge.groups", dict(split_pair(pair) for pair in groups))
    for pair in overrides:
        override(values, pair)
    if isinstance(values.get("sampler"), dict):
        values["sampler"] = {**(sampler or {}), **values["sampler"]}
    if values.get("batch") == "auto":
        values["batch"] = AUTO_BATCH
    return from_mapping(OptimizeConfig, values)


def split_named(option: str, given: Sequence[str]) -> tuple[str | None, dict[str, str] | None]:
    """Values of a repeatable option, PATH or NAME=PATH: the one path, and the paths by name.

    Nothing given is None. A path that exists is a path, whatever characters it has.
    """
    plain, named = [], {}
    for text in given:
        name, separator, path = text.partition("=")
        if separator and path and re.fullmatch(r"[\w.:-]+", name) and not Path(text).exists():
            named[name] = path
        else:
            plain.append(text)
    if len(plain) > 1:
        raise ConfigError(
            f"expected one {option} without NAME=, got {len(plain)}: {', '.join(plain)}"
        )
    return plain[0] if plain else None, named or None


SEARCHER_HELP = (
    "policy-gradient, nevergrad:NAME, scipy:METHOD, lcsc, lr-cma, ema-grid, uniform, greedy-soup, "
    "best-checkpoint, random. \\[default: policy-gradient]"
)
REWARD = "Reward"
COST = "Cost, before it starts (mergerl plan)"
