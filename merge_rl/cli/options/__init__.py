"""Options that follow from the settings of `merge_rl.config`, and what was said by them."""

from merge_rl.cli.options.layers import (
    FORMER,
    SHORTHANDS,
    Former,
    build,
    build_for_set,
    layered,
    split_named,
    split_tracks,
)
from merge_rl.cli.options.signature import (
    COMMANDS,
    Offer,
    decimal,
    integer,
    positive,
    with_settings,
)

__all__ = [
    "COMMANDS",
    "FORMER",
    "SHORTHANDS",
    "Former",
    "Offer",
    "build",
    "build_for_set",
    "decimal",
    "integer",
    "layered",
    "positive",
    "split_named",
    "split_tracks",
    "with_settings",
]
