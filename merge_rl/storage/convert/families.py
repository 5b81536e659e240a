"""Which family of networks a state dict is of: by its tensors, what its file says, its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from merge_rl.errors import CheckpointError, ConfigError, UnknownNameError
from merge_rl.storage.convert.contents import Hints, Shapes
from merge_rl.storage.convert.edm2 import is_edm2
from merge_rl.storage.convert.metadata import Said
from merge_rl.storage.convert.sit import is_jit, is_sit, sit_config_from_shapes

FAMILIES: Final = ("edm2", "sit", "dit", "repa", "jit")
PROJECTORS: Final = "projectors."  # of REPA's loss: nothing that is sampled depends on them
_REPA_WORDS: Final = ("enc_type", "proj_coeff")
_SIT_WORDS: Final = ("path_type", "prediction")
_NAMED: Final = re.compile(r"(?:^|[^a-z])(sit|dit|repa|jit)(?![a-z])", re.IGNORECASE)
# What the programs of a family call the prediction that its network here makes.
_VELOCITIES: Final = ("velocity", "v")
_NO: Final = (("false", "no", "0", "none"), "one without")
_FLOW: Final = {"prediction": (_VELOCITIES, "a network of velocities")}
# What settings may say of the networks that are sampled here, and what is expected of others.
_TRAINED: Final[Mapping[str, Mapping[str, tuple[tuple[str, ...], str]]]] = {
    "sit": _FLOW,
    "repa": _FLOW,
    "dit": {
        "noise_schedule": (("linear", ""), "linear betas"),
        "diffusion_steps": (("1000",), "1000 steps"),
        "predict_xstart": _NO,
        "predict_v": _NO,
        "prediction": (("noise", "eps", "epsilon"), "a network of noise"),
        "prediction_type": (("noise", "eps", "epsilon"), "a network of noise"),
    },
}
_PATHS: Final = {"linear": "linear", "gvp": "gvp", "cosine": "gvp", "vp": "vp"}


def fitting(shapes: Shapes) -> tuple[str, ...]:
    """The families whose networks have tensors of these names; () if none has.

    SiT, DiT and REPA have the same tensors: SiT and DiT with twice as many outputs as inputs (DiT
    learns variances), all three with as many. REPA's training adds projectors. Their descendants
    have some more (norms, rotations, other MLPs), and are none of them.
    """
    if is_edm2(shapes):
        return ("edm2",)
    if strange(shapes):
        return ()
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
    return ("sit", "dit") if outputs == 2 * single else ("sit", "repa", "dit")


_MARKS: Final[Mapping[str, frozenset[str]]] = {
    family: frozenset(names)
    for family, names in (
        ("edm2", ("unet.out_conv.weight", "unet.emb_noise.weight", "logvar_linear.weight")),
        ("sit", ("pos_embed", "x_embedder.proj.weight", "final_layer.linear.weight")),
        ("jit", ("pos_embed", "x_embedder.proj1.weight", "final_layer.linear.weight")),
    )
}


# All names that a network of these families has.
_SHARED: Final = (
    r"pos_embed|t_embedder\.mlp\.[02]\.(weight|bias)|y_embedder\.embedding_table\.weight"
    r"|((decoder_)?blocks\.\d+|final_layer)\.adaLN_modulation\.1\.(weight|bias)"
    r"|(decoder_)?blocks\.\d+\.attn\.(qkv|proj)\.(weight|bias)|final_layer\.linear\.(weight|bias)"
)
_SIT_NAMES: Final = re.compile(
    rf"{_SHARED}|x_embedder\.proj\.(weight|bias)|(decoder_)?blocks\.\d+\.mlp\.fc[12]\.(weight|bias)"
    r"|projectors\..+"
)
_JIT_NAMES: Final = re.compile(
    rf"{_SHARED}|x_embedder\.proj(1\.weight|2\.(weight|bias))|in_context_posemb|feat_rope.*"
    r"|blocks\.\d+\.(norm[12]|attn\.[qk]_norm|mlp\.w(12|3))\.(weight|bias)"
    r"|final_layer\.norm_final\.weight"
)


def strange(shapes: Shapes) -> list[str]:
    """Names of parts that no SiT, or no JiT, has, where the tensors are one's in the main."""
    near = _nearest(shapes) if is_damaged(shapes) else ""
    known = {"sit": _SIT_NAMES, "jit": _JIT_NAMES}.get(near)
    width = shapes.get("pos_embed", ())[-1:]
    parts = [
        name for name, shape in shapes.items()
        # Of names without a part the tokens that go along with those of the image.
        if (all(name.split(".")) if "." in name else len(shape) > 1 and shape[-1:] == width)
    ]  # fmt: skip
    return [name for name in parts if known is not None and not known.fullmatch(name)]


def is_foreign(shapes: Shapes) -> bool:
    """Whether tensors are those of a module, and of no family here, not even of a damaged one."""
    modular = any("." in name or name in ("weight", "bias") for name in shapes)
    return modular and bool(strange(shapes) or not (is_damaged(shapes) or fitting(shapes)))


def is_damaged(shapes: Shapes) -> bool:
    """Whether some tensors are named as those of a family here."""
    return any(len(marks & shapes.keys()) > 1 for marks in _MARKS.values())


def _nearest(shapes: Shapes) -> str:
    """The family that most of the tensors by which one is told are of."""
    return max(_MARKS, key=lambda family: len(_MARKS[family] & shapes.keys()))


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
        if not able and is_damaged(shapes) and not strange(shapes):
            return _nearest(shapes)  # is refused for the tensor that it lacks
        if told not in able:
            odd = f": it has no {strange(shapes)[0]!r}" if strange(shapes) else ""
            raise CheckpointError(
                f"these are not the tensors of {told}, but of {' or '.join(able) or 'none known'}"
                f"{odd}"
            )
        return told
    stated = None if config is None else config.get("model")
    if not able and not is_damaged(shapes) and stated:
        raise CheckpointError(
            f"its config says the model {stated!s:.60}, and its tensors are of none of "
            f"{', '.join(FAMILIES)}; expected --network package.module:factory"
        )
    if not able and not is_damaged(shapes):
        raise CheckpointError(
            f"expected the tensors of a network, found {next(iter(shapes), 'none')!r}, no name of "
            "a module's part; if they are one's, say --network package.module:factory"
        )
    if len(able) < 2:  # what fits none is refused for the tensor that it lacks
        return able[0] if able else _nearest(shapes)
    named = _NAMED.search(stem)
    words = [_trained_as(said.settings), named and named[1].lower()]
    if "repa" in able and _everywhere(said.settings).keys().isdisjoint(_TRAINED["dit"]):
        words = [word for word in words if word != "dit"]  # which flows are called, too
    for word in (stated, *words):
        if word in able:
            return str(word)
    sit_config_from_shapes(shapes, num_heads=1)  # refuses what none of them can be
    also = " or which way time runs" if "repa" in able else ""
    raise CheckpointError(
        f"{', '.join(able[:-1])} and {able[-1]} have these tensors and differ in what they predict"
        f"{also}, and neither the file nor its name says which it is; say it with --family"
    )


def _trained_as(settings: Mapping[str, Any]) -> str | None:
    """The family whose training program writes such settings; None where many programs do."""
    settings = _everywhere(settings)
    if any(word in settings for word in _REPA_WORDS):
        return "repa"
    model = settings.get("model")
    named = _NAMED.match(model) if isinstance(model, str) else None
    # Programs of flows call their networks by the plan of DiT, too.
    flows = "path_type" in settings or str(settings.get("prediction")).lower() in _VELOCITIES
    if named and not (flows and named[1].lower() == "dit"):
        return named[1].lower()
    return "sit" if any(word in settings for word in _SIT_WORDS) else None


def _everywhere(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings and those of the sections within by their last names; the outer ones count more."""
    found: dict[str, Any] = {}
    for value in settings.values():
        found |= _everywhere(value) if isinstance(value, dict) else {}
    return found | {key: value for key, value in settings.items() if not isinstance(value, dict)}


def plain_latents(said: Said) -> bool:
    """Whether a network's latents are scaled as SiT's and DiT's are, as far as settings tell."""
    settings = _everywhere(said.settings)
    normed = str(settings.get("latent_norm", "")).lower() not in ("", *_NO[0])
    return not normed and said.number("latent_multiplier") in (None, 0.18215)


def path_of(family: str, settings: Mapping[str, Any]) -> str | None:
    """The path that a velocity network was trained on, where its settings say one.

    Raises ConfigError for a path that is not known, and for settings that no network of the family
    here has: SiT can be trained to predict the score or the noise, DiT the data, or by other betas.
    """
    settings = _everywhere(settings)
    for name, (known, expected) in _TRAINED.get(family, {}).items():
        said = settings.get(name)
        if said is not None and str(said).lower() not in known:
            raise ConfigError(f"trained with {name} {said!s:.40}; expected {expected}")
    if family not in ("sit", "repa"):
        return None
    path = settings.get("path_type")
    if not isinstance(path, str):
        return None
    if path.lower() not in _PATHS:
        raise ConfigError(f"trained on the path {path!r}; expected one of {', '.join(_PATHS)}")
    return _PATHS[path.lower()]
