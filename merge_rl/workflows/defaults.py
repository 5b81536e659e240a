"""What a model is evaluated with when nothing is said: the settings of its run or of its set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from merge_rl.config import OptimizeConfig, SamplerConfig, from_mapping, load_config
from merge_rl.storage.manifest import has_manifest, read_manifest

_PARENTS = 3  # how far above a model its set or run is looked for


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Settings found near a model; None where nothing was found."""

    extractor: str | None = None
    extractor_weights: str | None = None
    reference: str | None = None
    heldout: str | None = None
    autoencoder: str | None = None
    autoencoder_weights: str | None = None
    autoencoder_dtype: str = "float32"
    sampler: SamplerConfig | None = None


def find_surroundings(model: str | Path) -> Surroundings:
    """Settings of the run directory or checkpoint set that the model lies in."""
    path = Path(model).resolve()
    for folder in [path, *path.parents][: _PARENTS + 1]:
        if (folder / "config.yaml").is_file() and (folder / "inputs.json").is_file():
            return _from_run(load_config(OptimizeConfig, folder / "config.yaml"))
        if folder.is_dir() and has_manifest(folder):
            return _from_set(folder)
    return Surroundings()


def _from_run(config: OptimizeConfig) -> Surroundings:
    return Surroundings(
        extractor=config.extractor,
        extractor_weights=config.extractor_weights,
        reference=config.reference,
        heldout=config.heldout,
        autoencoder=config.autoencoder,
        autoencoder_weights=config.autoencoder_weights,
        autoencoder_dtype=config.autoencoder_dtype,
        sampler=config.sampler,
    )


def _from_set(folder: Path) -> Surroundings:
    found = read_manifest(folder).defaults.resolved(folder)

    def text(path: Path | None) -> str | None:
        return str(path) if path else None

    sampler = None
    if found.sampler:
        sampler = from_mapping(SamplerConfig, dict(found.sampler), f"{folder.name} manifest")
    return Surroundings(
        extractor=found.extractor,
        extractor_weights=text(found.extractor_weights),
        reference=text(found.reference),
        heldout=text(found.heldout),
        autoencoder=found.autoencoder,
        autoencoder_weights=text(found.autoencoder_weights),
        sampler=sampler,
    )
