"""Which family of networks a state dict is of: by its tensors, what its file says, its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from merge_rl.errors import CheckpointError, ConfigError, UnknownNameError
from merge_rl.storage.convert.contents import Hints, Said, Shapes
from merge_rl.storage.convert.edm2 import is_edm2
from merge_rl.storage.convert.sit import is_jit, is_sit

FAMILIES: Final = ("edm2", "sit", "dit", "repa", "jit")
PROJECTORS: Final = "projectors."  # of REPA's loss: nothing that is sampled depends on them
_REPA_WORDS: Final = ("enc_type", "proj_coeff")
_SIT_WORDS: Final = ("path_type", "prediction")
_NAMED: Final = re.compile(r"(?:^|[^a-z])(sit|dit|repa|jit)(?![a-z])", re.IGNORECASE)
# What the programs of a family call the prediction that its network here makes.
_PREDICTIONS: Final = {"sit": ("velocity", "v"), "repa": ("v", "velocity")}
_PATHS: Final = {"linear": "linear", "gvp": "gvp", "cosine": "gvp", "vp": "vp"}


def fitting(shapes: Shapes) -> tuple[str, ...]:
    """The families whose networks have tensors of these names; () if none has.

    SiT, DiT and REPA have the same tensors: SiT and DiT with twice as many outputs as inputs (DiT
    learns variances), SiT and REPA with as many. REPA's training adds projectors.
    """
    if is_edm2(shapes):
        return ("edm2",)
    if is_jit(shapes):
        return ("jit",)
    if not is_sit(shapes):
        return ()
    if any(name.startswith((PROJECTORS, "decoder_blocks.")) for name in shapes):
        return ("repa",)
    _, *patch = shapes["x_embedder.proj.weight"]
    outputs, single = shapes["final_layer.linear.weight"][0], 1
    for size in patch:
        single *= size
    return ("sit", "dit") if outputs == 2 * single else ("sit", "repa")


_MARKS: Final = (
    {"unet.out_conv.weight", "unet.emb_noise.weight", "logvar_linear.weight"},
    {"pos_embed", "x_embedder.proj.weight", "final_layer.linear.weight"},
    {"pos_embed", "x_embedder.proj1.weight", "final_layer.linear.weight"},
)


def is_foreign(shapes: Shapes) -> bool:
    """Whether tensors are those of a module, and of no family here, not even of a damaged one."""
    modular = any("." in name or name in ("weight", "bias") for name in shapes)
    return modular and not is_damaged(shapes) and not fitting(shapes)


def is_damaged(shapes: Shapes) -> bool:
    """Whether some tensors are named as those of a family here."""
    return any(len(marks & shapes.keys()) > 1 for marks in _MARKS)


def find_family(
    shapes: Shapes, said: Said, config: Mapping[str, Any] | None, stem: str, hints: Hints
) -> str:
    """The family of a file called `stem`.

    The file says of itself `said` and perhaps a `config`. The user's word counts first, then the
    config's, then the tensors, the settings of the training, the name. Raises CheckpointError where
    none of these decides, or for a family that the tensors do not fit; UnknownNameError for another
    word of the user.
    """
    able = fitting(shapes)
    told = hints.family
    if told is not None:
        if told not in FAMILIES:
            raise UnknownNameError("family of networks", told, FAMILIES)
        if told not in able:
            raise CheckpointError(
                f"these are not the tensors of {told}, but of {' or '.join(able) or 'none known'}"
            )
        return told
    if not able and not is_damaged(shapes):
        raise CheckpointError(
            f"expected the tensors of a network, found {next(iter(shapes), 'none')!r}, no name of "
            "a module's part; if they are one's, say --network package.module:factory"
        )
    if len(able) < 2:  # what fits none is refused for the tensor that it lacks
        return able[0] if able else "sit"
    stated = None if config is None else config.get("model")
    named = _NAMED.search(stem)
    for word in (stated, _trained_as(said.settings), named and named[1].lower()):
        if word in able:
            return str(word)
    apart = "which way time runs" if "repa" in able else "what they predict"
    raise CheckpointError(
        f"{' and '.join(able)} have these tensors and differ in {apart}, and neither the "
        "file nor its name says which it is; say it with --family"
    )


def _trained_as(settings: Mapping[str, Any]) -> str | None:
    """The family whose training program writes such settings; None where many programs do."""
    settings = _everywhere(settings)
    if any(word in settings for word in _REPA_WORDS):
        return "repa"
    model = settings.get("model")
    named = _NAMED.match(model) if isinstance(model, str) else None
    if named:
        return named[1].lower()
    return "sit" if any(word in settings for word in _SIT_WORDS) else None


def _everywhere(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings and those of the sections within by their last names; the outer ones count more."""
    found: dict[str, Any] = {}
    for value in settings.values():
        found |= _everywhere(value) if isinstance(value, dict) else {}
    return found | {key: value for key, value in settings.items() if not isinstance(value, dict)}


def path_of(family: str, settings: Mapping[str, Any]) -> str | None:
    """The path that a velocity network was trained on, where its settings say one.

    Raises ConfigError for a path that is not known, and for a network that predicts anything but
    a velocity (SiT can be trained to predict the score or the noise).
    """
    if family not in _PREDICTIONS:
        return None
    settings = _everywhere(settings)
    prediction = settings.get("prediction")
    if isinstance(prediction, str) and prediction.lower() not in _PREDICTIONS[family]:
        raise ConfigError(f"trained to predict the {prediction}; expected a network of velocities")
    path = settings.get("path_type")
    if not isinstance(path, str):
        return None
    if path.lower() not in _PATHS:
        raise ConfigError(f"trained on the path {path!r}; expected one of {', '.join(_PATHS)}")
    return _PATHS[path.lower()]
