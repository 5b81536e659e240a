"""Options that every command that searches has: checkpoints, data, model and sampling, scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from merge_rl.cli.sampler_options import FAST_HELP, fast_settings

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
    from merge_rl.cli.settings import split_named

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
