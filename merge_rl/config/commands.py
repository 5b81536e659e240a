"""Settings of commands that begin no run: convert, reference, fetch, merge, sample, evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from merge_rl.config.sampler import SamplerConfig, require, require_images
from merge_rl.config.setting import DATA, MODEL, SCORES, require_choices, setting
from merge_rl.errors import ConfigError

WEIGHTS: Final = ("auto", "model", "ema", "both")
FORMATS: Final = (
    *("auto", "weights", "posthoc-ema", "lightning", "accelerate", "diffusers", "distcp", "peft"),
    *("deepspeed", "composer"),
)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What `mergerl convert` takes of its sources, and what they do not say of themselves."""

    weights: str = setting(
        "auto", "What to take of raw weights and averages: model, ema or both. auto: the (first) "
        "average, and everything of an EDM2 training state.",
        flag="--weights", choices=WEIGHTS,
    )  # fmt: skip
    workers: int | None = setting(
        None, "Files at once.", flag="--workers", unset="one a core, at most 4"
    )
    delete_source: bool = setting(
        False, "Remove each source once what was made from it is read back and compared. What was "
        "not asked for (--weights, optimizers) is lost with it.",
        flag="--delete-source",
    )  # fmt: skip
    name: str | None = setting(None, "Name of the set, for the manifest.", flag="--name")
    licence: str | None = setting(
        None, "Licence of the weights.", flag="--license", unset="that of published files is known"
    )
    family: str | None = setting(
        None, "Which network, where several have the same tensors: sit, dit, repa; edm2 and jit.",
        flag="--family", unset="what the files say",
    )  # fmt: skip
    num_heads: int | None = setting(
        None, "Attention heads of a transformer of no published size.", flag="--num-heads"
    )
    num_classes: int | None = setting(
        None, "Classes of a transformer, the null class not counted.", flag="--num-classes"
    )
    null_class: bool | None = setting(
        None, "Whether a transformer's last label row is a null class.",
        flag="--null-class/--no-null-class",
    )  # fmt: skip

    format: str = setting(
        "auto", "Refuse what is of another format than this.", flag="--format", choices=FORMATS
    )
    network: str | None = setting(
        None, "Your own, package.module:factory; its name goes into the manifest.",
        flag="--network", unset="a known family, else none",
    )  # fmt: skip
    part: str | None = setting(
        None, "Which network of a model with several: the one whose names begin so.", flag="--part",
        metavar="NAME", unset="all, or the one that is known",
    )  # fmt: skip
    images_per_step: int | None = setting(
        None, "Training images in one step, for nimg.", flag="--images-per-step",
        unset="what the files say, else 256",
    )  # fmt: skip
    ema_std: str | None = setting(
        None, "Widths that the averages of a post-hoc EMA folder were given, by index: 0.05,0.28.",
        flag="--ema-std", unset="what the files say",
    )  # fmt: skip
    update_every: int | None = setting(
        None, "Steps from one update of those averages to the next.", flag="--update-every"
    )
    adapters: str = setting(
        "factors", "LoRA: factors, whose merge is an adapter of the same rank, or products, which "
        "are merged exactly and are as large as the layers.",
        flag="--adapters", choices=("factors", "products"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        require_choices(self)
        for name in ("images_per_step", "update_every"):
            value = getattr(self, name)
            if value is not None:
                require(value >= 1, name, ">= 1", value)
        if self.workers is not None:
            require(self.workers >= 1, "workers", ">= 1", self.workers)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """How `mergerl reference` makes statistics of images."""

    keep_features: bool = setting(
        False, "Store features too: KID, MMD, precision.", flag="--keep-features"
    )
    max_features: int = setting(
        50_000, "Rows of features to store at most, spread evenly.", flag="--max-features"
    )
    split: bool = setting(
        False, "Two halves, OUT-a and OUT-b: optimise by one, report both.", flag="--split"
    )
    skip_broken: bool = setting(
        False, "Leave out unreadable images, and count them.", flag="--skip-broken"
    )
    limit: int | None = setting(
        None, "A subset of this many images.", flag="--limit", unset="all of them"
    )
    balanced: bool = setting(
        False, "The same number of each class; needs labels.", flag="--balanced"
    )
    seed: int = setting(0, "Fixes what the subset and the halves hold.", flag="--seed")
    batch: int = setting(64, "Images in one forward pass.", flag="--batch")
    device: str = setting("cpu", "cpu, cuda, ...", flag="--device")

    def __post_init__(self) -> None:
        require(self.max_features >= 2, "max_features", ">= 2", self.max_features)
        require(self.batch >= 1, "batch", ">= 1", self.batch)


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Which files `mergerl fetch` takes, and what becomes of them."""

    last: int | None = setting(
        None, "The newest so many training times.", flag="--last", unset="all"
    )
    every: str | None = setting(
        None, "Training images between two times, counted back from the newest: 192Mi.",
        flag="--every", metavar="IMAGES", unset="all",
    )  # fmt: skip
    track: str | None = setting(None, "One series: raw, ema-0.050.", flag="--track", unset="all")
    ema_std: tuple[float, ...] = setting(
        (), "An EMA width; repeatable.", flag="--ema-std", metavar="WIDTH", unset="all"
    )
    files: tuple[str, ...] = setting(
        (), "A file by name; repeatable.", flag="--file", metavar="NAME", unset="all"
    )
    revision: str | None = setting(
        None, "Branch, tag or commit of a repository.", flag="--revision", unset="the newest"
    )
    sha256: str | None = setting(
        None, "Hash of the file at an address.", flag="--sha256", metavar="HEX"
    )
    delete_original: bool = setting(
        False, "Remove each .pkl or .pt once converted.", flag="--delete-original"
    )


@dataclass(frozen=True, kw_only=True)
class SingleMergeConfig:
    """What `mergerl merge` makes: by coefficients, a recipe, an EMA profile, or the average."""

    coefficients: str | None = setting(
        None, 'One number a checkpoint, in the set\'s order: "0.2,-0.1,0.9".', flag="--coefficients"
    )
    recipe: str | None = setting(
        None,
        "A merge.yaml, or the merge that it lies with; hashes of the sources are checked.",
        flag="--recipe",
        path=True,
    )
    ema_std: str | None = setting(
        None,
        "Rebuild the power-function EMA of this relative width; several, such as "
        '"0.05,0.10" or "0.010,0.015,...,0.250", become a new set of checkpoints in OUT, made in '
        "one pass over the files.",
        flag="--ema-std",
    )  # fmt: skip
    uniform: bool = setting(False, "The plain average.", flag="--uniform")
    track: str | None = setting(None, "Series of the manifest to use.", flag="--track", unset="all")
    network: str | None = setting(
        None, "Your own, package.module:factory, for which tensors are buffers.", flag="--network",
        unset="that of the set",
    )  # fmt: skip
    base: str = setting("newest", "Checkpoint whose buffers are carried; by name.", flag="--base")
    freeze: tuple[str, ...] = setting(
        (), "Tensors whose names match stay as in the base; repeatable.", flag="--freeze",
        metavar="REGEX", unset="none, or the recipe's",
    )  # fmt: skip
    dtype: str | None = setting(
        None, "float32, float16 or bfloat16.", flag="--dtype", unset="float32, or the recipe's"
    )
    max_shard_size: str | None = setting(
        None, "Above it the weights are split, such as 500MB.", flag="--max-shard-size",
        unset="5GB, or the recipe's",
    )  # fmt: skip
    licence: str | None = setting(
        None, "Licence of the merge.", flag="--license", unset="that of the checkpoints"
    )

    def __post_init__(self) -> None:
        named = (self.coefficients, self.recipe, self.ema_std)
        ways = sum(value is not None for value in named) + self.uniform
        if ways != 1:
            raise ConfigError(
                "expected exactly one of --coefficients, --recipe, --ema-std and --uniform, "
                f"got {ways}"
            )


NEAR: Final = "that of the run or set"
MODEL_IMAGES: Final = 5000


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How a model's images are made; None, and no sampler: as its run or set says."""

    network: str | None = setting(
        None, "Your own network: package.module:factory that returns merge_rl.describe(...).",
        MODEL, "--network", unset="that of the model",
    )  # fmt: skip
    autoencoder: str | None = setting(
        None, "What makes images of latents: sd-vae-edm2, sd-vae-sit, package.module:factory.",
        MODEL, "--autoencoder", unset=NEAR,
    )  # fmt: skip
    autoencoder_weights: str | None = setting(
        None, "The autoencoder's weights: file, folder, or public name.",
        MODEL, "--autoencoder-weights", unset=NEAR,
    )  # fmt: skip
    batch: int = setting(250, "Images in one forward pass.", MODEL, "--batch")
    device: str = setting("cpu", "cpu, cuda, ...", MODEL, "--device")
    sampler: SamplerConfig | None = None

    def __post_init__(self) -> None:
        require(self.batch >= 1, "batch", ">= 1", self.batch)


@dataclass(frozen=True, kw_only=True)
class SampleConfig(GenerationConfig):
    """Which images `mergerl sample` makes."""

    num_images: int = setting(64, "Images of the grid.", flag="--num-images")
    seed: int = setting(0, "First image seed; one seed an image.", flag="--seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_images("num_images", self.num_images, least=1)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(GenerationConfig):
    """How `mergerl evaluate` scores a model, images or features."""

    num_images: int | None = setting(
        None, "N of one repeat; papers use 50000.", flag="--num-images",
        unset=f"{MODEL_IMAGES}; of images and features, all there are",
    )  # fmt: skip
    repeats: int = setting(3, "Disjoint blocks of seeds, or of images.", flag="--repeats")
    seed: int = setting(0, "Fixes the images; no two seeds share one.", flag="--seed")
    metrics: str = setting(
        "fid", "Comma-separated: fid, fid-infinity, fd-mean; with a reference that keeps features "
        "kid, mmd, prdc.", flag="--metrics",
    )  # fmt: skip
    extractor: str | None = setting(
        None, "Feature extractor, or package.module:factory.", DATA, "--extractor",
        unset=f"{NEAR}, or of the reference",
    )  # fmt: skip
    extractor_weights: str | None = setting(
        None, "The extractor's weights: file, folder, or public name.",
        DATA, "--extractor-weights", unset=NEAR,
    )  # fmt: skip
    reference: str | None = setting(
        None, "Statistics of real data, of any known format.",
        DATA, "--reference", path=True, unset=NEAR,
    )  # fmt: skip
    heldout: str | None = setting(
        None, "Statistics of held-out data.",
        DATA, "--heldout", path=True, unset=f"{NEAR}, unless --reference is given",
    )  # fmt: skip
    under: str | None = setting(
        None, "Make a model's images by the ODE, the SDE or both.", MODEL, "--under",
        metavar="ode|sde|both",
        unset="both for SiT, ode for EDM2; with --solver what that one solves",
    )  # fmt: skip
    max_rows: int = setting(
        10_000, "Rows of either set that kid, mmd and prdc compare.", SCORES, "--max-rows"
    )
    save_features: str | None = setting(
        None, "Folder to keep features in, and to go on from.", SCORES, "--save-features",
        path=True,
    )  # fmt: skip
    skip_broken: bool = setting(
        False, "Leave out unreadable images, and count them.", SCORES, "--skip-broken"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_rows >= 2, "max_rows", ">= 2", self.max_rows)
        require_images("repeats times num_images", self.repeats * (self.num_images or 1))

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics one by one."""
        return tuple(name.strip() for name in self.metrics.split(","))
