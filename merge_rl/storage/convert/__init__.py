"""Published EDM2 and SiT files made into safetensors with a manifest."""

from merge_rl.storage.convert.run import ConvertResult, convert
from merge_rl.storage.convert.sit import FREQUENCIES, is_sit, sit_config_from_shapes, sit_size_name

__all__ = [
    "FREQUENCIES",
    "ConvertResult",
    "convert",
    "is_sit",
    "sit_config_from_shapes",
    "sit_size_name",
]
