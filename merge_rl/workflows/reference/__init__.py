"""Statistics and features of real images: made, stored, read in every known format."""

from merge_rl.workflows.reference.build import build_reference, source_notes
from merge_rl.workflows.reference.features import (
    FeatureStore,
    SavedFeatures,
    load_features,
    weights_digest,
)
from merge_rl.workflows.reference.file import (
    kind_of,
    kind_to_score,
    load_all_references,
    load_reference,
    save_reference,
)
from merge_rl.workflows.reference.formats import Reference, few_images
from merge_rl.workflows.reference.moments import CollectPlan, collect, kept_features

__all__ = [
    "CollectPlan",
    "FeatureStore",
    "Reference",
    "SavedFeatures",
    "build_reference",
    "collect",
    "few_images",
    "kept_features",
    "kind_of",
    "kind_to_score",
    "load_all_references",
    "load_features",
    "load_reference",
    "save_reference",
    "source_notes",
    "weights_digest",
]
