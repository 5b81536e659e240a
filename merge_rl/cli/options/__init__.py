"""Options that follow from the settings of `merge_rl.config`, and what was said by them."""

from merge_rl.cli.options.layers import (
    FORMER,
    MODEL_HELP,
    SHORTHANDS,
    Former,
    build,
    build_for_set,
    layered,
    meant,
    meant_set,
    named,
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
    "MODEL_HELP",
    "SHORTHANDS",
    "Former",
    "Offer",
    "build",
    "build_for_set",
    "decimal",
    "integer",
    "layered",
    "meant",
    "meant_set",
    "named",
    "positive",
    "split_named",
    "split_tracks",
    "with_settings",
]
