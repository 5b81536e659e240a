"""Downloads and uploads: the Hub, the catalogue, plain addresses."""

from merge_rl.storage.hub.by_name import convert, open_checkpoints
from merge_rl.storage.hub.cached import (
    is_set_of_hub,
    local_model,
    local_place,
    local_recipe,
    local_set,
    user_cache,
)
from merge_rl.storage.hub.download import Downloaded, fetch_url
from merge_rl.storage.hub.fetch import FetchResult, run_fetch
from merge_rl.storage.hub.fetch_plan import FetchPlan, plan_fetch
from merge_rl.storage.hub.fetch_sources import Selection, parse_count
from merge_rl.storage.hub.repository import list_once, pinned_file
from merge_rl.storage.hub.upload import (
    CARD_NAME,
    GUIDE_FOLDER,
    RECIPE_NAME,
    Pushed,
    push_folder,
)

__all__ = [
    "CARD_NAME",
    "GUIDE_FOLDER",
    "RECIPE_NAME",
    "Downloaded",
    "FetchPlan",
    "FetchResult",
    "Pushed",
    "Selection",
    "convert",
    "fetch_url",
    "is_set_of_hub",
    "list_once",
    "local_model",
    "local_place",
    "local_recipe",
    "local_set",
    "open_checkpoints",
    "parse_count",
    "pinned_file",
    "plan_fetch",
    "push_folder",
    "run_fetch",
    "user_cache",
]
