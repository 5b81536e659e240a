"""Any model to the Hub: a run's, a set's newest, a folder or a file, as a folder with a card."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from merge_rl.storage.checkpoints import Origin, find_origin, open_model_file, require_network
from merge_rl.storage.files import INDEX_SUFFIX, WeightStream, stem_in
from merge_rl.storage.hub import CARD_NAME, Pushed, push_folder
from merge_rl.workflows.assembly import find_model
from merge_rl.workflows.export.card import TASK, hub_licence, hub_repositories
from merge_rl.workflows.export.folder import carried_metadata, dtype_of, save_model


def push(
    model: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    wait: Callable[[float], None] = time.sleep,
) -> Pushed:
    """Upload a model to a repository of the Hub.

    Args:
        model: finished run or fine-tuning run (its result), set (its newest checkpoint), model
            folder or file, or a name of the Hub. A checkpoint's file gets a config.json and a card
            of what is known.
        repo: "user/repo", or "user/repo@branch".
        private: make it private, and refuse to write to one that is public.
        revision: branch, which must exist; "main" by default.
        message: title of the commit.
        dry_run: check the files and list them; nothing is sent or asked.
        wait: how to pause between attempts.

    Weights, config.json, merge.yaml, README.md and pictures are sent, nothing else; what arrived
    before a connection broke is not sent again. The token comes from `hf auth login` or HF_TOKEN.
    Raises CheckpointError and RunError for what cannot be pushed, HubError for everything at the
    Hub.
    """
    with publishable(find_model(model).path) as folder:
        return push_folder(
            folder, repo, private=private, revision=revision, message=message, dry_run=dry_run,
            wait=wait,
        )  # fmt: skip


@contextmanager
def publishable(path: Path) -> Iterator[Path]:
    """The folder of a model as it is, or one made for a file that has no card beside it."""
    place = path if path.is_dir() else path.parent
    names = [f"{stem_in(place)}{ending}" for ending in (".safetensors", INDEX_SUFFIX)]
    folder = place if path.name in names else path
    whole = any((folder / name).is_file() for name in names)
    if whole and (path.is_dir() or (folder / CARD_NAME).is_file()):
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        origin, weights = find_origin(path), open_model_file(path).weights
        require_network(WeightStream.of(weights).infos, origin.config, str(path))
        yield save_model(
            Path(made) / "model", weights, origin.config, card=checkpoint_card(origin),
            dtype=dtype_of(weights), metadata=carried_metadata(origin.metadata),
        )  # fmt: skip


def checkpoint_card(origin: Origin) -> str:
    """Markdown with Hub metadata for one checkpoint: what it is, how to load it."""
    header = {"library_name": "merge_rl", **hub_licence(origin.licence)}
    front = {
        **header, "pipeline_tag": TASK, "tags": ["diffusion", str(origin.config.get("model"))]
    }  # fmt: skip
    bases = hub_repositories([origin.source or ""])
    front |= {"base_model": bases} if bases else {}
    seen = f", after {origin.nimg:,} training images" if origin.nimg is not None else ""
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}\n---",
            f"# {origin.name}",
            "",
            f"One checkpoint of a training run{seen}.",
            "",
            "```python",
            "import merge_rl as mrl",
            "",
            'model = mrl.load_model("path/to/this/folder")  # or "user/repo"',
            "```",
            "",
        ]
    )
