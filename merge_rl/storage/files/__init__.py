"""Files of every kind, read within bounds and written whole or not at all."""

from merge_rl.storage.files.archives import Archive
from merge_rl.storage.files.atomic import (
    State,
    WorkFolder,
    atomic_path,
    below,
    new_folder,
    read_state,
    require_new,
    save_tensors,
    write_json,
    write_state,
    write_text,
    write_yaml,
)
from merge_rl.storage.files.documents import Fields, nearest
from merge_rl.storage.files.hashing import Progress, require_hash, sha256_file
from merge_rl.storage.files.image_source import (
    ImageKind,
    ImageSource,
    ImageStream,
    image_key,
    open_images,
)
from merge_rl.storage.files.images import decode_image, enlarge, image_grid, write_png
from merge_rl.storage.files.labels import parse_labels
from merge_rl.storage.files.naming import absolute, natural_key, spellings, without_numbers
from merge_rl.storage.files.npz import ArrayInfo, npz_arrays, npz_labels, read_array, read_npy
from merge_rl.storage.files.safetensors_file import (
    TensorReader,
    map_file,
    read_file,
    read_one,
    require_finite,
    tensor_bytes,
    write_header,
)
from merge_rl.storage.files.safetensors_header import Header, TensorInfo, read_header
from merge_rl.storage.files.shards import (
    INDEX_NAME,
    MAX_SHARD_BYTES,
    MODEL_NAME,
    SHARD_PATTERN,
    WeightStream,
    read_index,
    tensor_file,
    write_weights,
)

__all__ = [
    "INDEX_NAME",
    "MAX_SHARD_BYTES",
    "MODEL_NAME",
    "SHARD_PATTERN",
    "Archive",
    "ArrayInfo",
    "Fields",
    "Header",
    "ImageKind",
    "ImageSource",
    "ImageStream",
    "Progress",
    "State",
    "TensorInfo",
    "TensorReader",
    "WeightStream",
    "WorkFolder",
    "absolute",
    "atomic_path",
    "below",
    "decode_image",
    "enlarge",
    "image_grid",
    "image_key",
    "map_file",
    "natural_key",
    "nearest",
    "new_folder",
    "npz_arrays",
    "npz_labels",
    "open_images",
    "parse_labels",
    "read_array",
    "read_file",
    "read_header",
    "read_index",
    "read_npy",
    "read_one",
    "read_state",
    "require_finite",
    "require_hash",
    "require_new",
    "save_tensors",
    "sha256_file",
    "spellings",
    "tensor_bytes",
    "tensor_file",
    "without_numbers",
    "write_header",
    "write_json",
    "write_png",
    "write_state",
    "write_text",
    "write_weights",
    "write_yaml",
]
