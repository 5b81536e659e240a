"""Merged weights as folders with recipe, model card and licence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from merge_rl.late import offered

if TYPE_CHECKING:
    from merge_rl.workflows.export.card import (
        hub_header,
        hub_repositories,
        load_call,
        loading_section,
        model_card,
    )
    from merge_rl.workflows.export.folder import carried_metadata, save_merge, save_model, set_facts
    from merge_rl.workflows.export.merged_model import MergedModel
    from merge_rl.workflows.export.profiles import ema_coefficients, merge, save_profiles
    from merge_rl.workflows.export.publish import push
    from merge_rl.workflows.export.recipe import TOOL, Recipe, merge_recipe, sampled, without_places

__all__ = [
    "TOOL",
    "MergedModel",
    "Recipe",
    "carried_metadata",
    "ema_coefficients",
    "hub_header",
    "hub_repositories",
    "load_call",
    "loading_section",
    "merge",
    "merge_recipe",
    "model_card",
    "push",
    "sampled",
    "save_merge",
    "save_model",
    "save_profiles",
    "set_facts",
    "without_places",
]

# Each is loaded when it is asked for: some need torch, others do without.
_HOMES: Final = {
    "card": "hub_header hub_repositories load_call loading_section model_card",
    "folder": "carried_metadata save_merge save_model set_facts",
    "merged_model": "MergedModel",
    "profiles": "ema_coefficients merge save_profiles",
    "publish": "push",
    "recipe": "Recipe TOOL merge_recipe sampled without_places",
}


def __getattr__(name: str) -> Any:
    return offered(__name__, name, _HOMES)
