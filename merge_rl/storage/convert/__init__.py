"""Published files of all families made into safetensors with a manifest."""

from merge_rl.storage.convert.families import fitting as families_of
from merge_rl.storage.convert.run import ConvertResult, convert
from merge_rl.storage.convert.sit import sit_config_from_shapes, sit_size_name

__all__ = [
    "ConvertResult",
    "convert",
    "families_of",
    "sit_config_from_shapes",
    "sit_size_name",
]
