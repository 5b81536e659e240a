"""The licence of a merge, and the models it was made from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from merge_rl.errors import ConfigError
from merge_rl.storage.checkpoints import CheckpointSet

_HUB_REPO: Final = re.compile(r"^(?:https://huggingface\.co/|hf://)([\w.-]+/[\w.-]+?)(?:[@/].*)?$")
# Names that the Hub knows, among those that checkpoints of images models carry; others go into
# `license_name`.
_KNOWN: Final = frozenset(
    [
        "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0",
        "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0",
        "openrail", "creativeml-openrail-m", "openrail++", "gpl-3.0", "agpl-3.0", "lgpl-3.0",
    ]
)  # fmt: skip


def merged_licence(checkpoints: CheckpointSet, given: str | None = None) -> str | None:
    """Licence of a merge of a set: `given` if there is one, else the one all sources share.

    Sources that state different licences are refused (ConfigError): whether and how they combine
    is for a person to decide. None if no source states any.
    """
    if given is not None:
        if not given.strip():
            raise ConfigError("expected the name of a licence, got an empty text")
        return given.strip()
    stated: dict[str, str] = {}
    for licence in checkpoints.licences:
        stated.setdefault(licence.lower(), licence)
    if len(stated) > 1:
        raise ConfigError(
            f"{checkpoints.folder}: the checkpoints are under {len(stated)} licences, "
            f"{' and '.join(stated.values())}; pass --license NAME if they allow a merge under one"
        )
    return next(iter(stated.values()), None)


def hub_licence(licence: str | None) -> dict[str, str]:
    """Entries of a model card's header for a licence."""
    if licence is None:
        return {}
    name = licence.lower()
    if name in _KNOWN:
        return {"license": name}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.+-]+", "-", name).strip("-")}


def base_models(checkpoints: CheckpointSet) -> list[str]:
    """Hub repositories that the sources say they come from, each once."""
    return hub_repositories([entry.source or "" for entry in checkpoints.entries])


def hub_repositories(sources: Sequence[str]) -> list[str]:
    """user/repo of every address on the Hub among `sources`, each once, in order."""
    found = (_HUB_REPO.match(source) for source in sources)
    return list(dict.fromkeys(match.group(1) for match in found if match))
