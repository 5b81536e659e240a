"""A model with what it was merged from, under the verbs that the Hub's libraries have."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_rl import own_code
from merge_rl.config import SamplerConfig, to_mapping
from merge_rl.core.network import Network
from merge_rl.core.sampling.sampler import FOR_RUNS, sample
from merge_rl.core.state_dicts import names_for
from merge_rl.errors import ConfigError
from merge_rl.storage.checkpoints import open_model_file
from merge_rl.storage.hub import CARD_NAME, GUIDE_FOLDER, RECIPE_NAME, Pushed
from merge_rl.untrusted import load_yaml, read_bounded
from merge_rl.workflows.assembly import find_model, load_network, own_sampler
from merge_rl.workflows.export.folder import carried_metadata, dtype_of, save_model
from merge_rl.workflows.export.publish import push

_CHANGED = "# A diffusion model\n\nIts weights were changed after they had been merged.\n"


@dataclass(frozen=True, eq=False)
class MergedModel:
    """A network, its config and its recipe, in the manner of huggingface_hub's ModelHubMixin.

        >>> import merge_rl as mrl
        >>> model = mrl.MergedModel.from_pretrained("runs/a")          # doctest: +SKIP
        >>> model.sample(noise, labels, num_steps=32)                  # doctest: +SKIP
        >>> model.push_to_hub("user/repo")                             # doctest: +SKIP

    Attributes:
        network: float32, in evaluation mode.
        config: what builds it.
        recipe: the merge.yaml; None of a model that came without.
    """

    network: Network
    config: Mapping[str, Any]
    recipe: Mapping[str, Any] | None = None
    dtype: str = "float32"
    _card: str | None = field(default=None, repr=False)
    _metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    _loaded: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    _sampler: SamplerConfig | None = field(default=None, repr=False)
    _guide: MergedModel | None = field(default=None, repr=False)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        network: str | Callable[..., Any] | None = None,
        guide_network: str | Callable[..., Any] | None = None,
    ) -> MergedModel:
        """The model of a folder, a file, a run, a set, or of "user/repo" on the Hub.

        Args:
            name: see `merge_rl.load_model`.
            revision: branch, tag or commit of a repository.
            network, guide_network: code of one's own that builds it, and the guide in its folder.

        Raises CheckpointError, RunError, HubError as `load_model` does.
        """
        named = None if network is None else own_code.allow_network(network)
        place = find_model(f"{name}@{revision}" if revision else name).path
        built = load_network(place, named)
        file = open_model_file(place)
        names = names_for(file.weights, built.state_dict())
        folder = place if place.is_dir() else place.parent
        sampler = own_sampler(place, None) if "merge" in file.metadata else None
        guide = folder / GUIDE_FOLDER
        guided = sampler is not None and sampler.guide == str(guide)
        return cls(
            network=built,
            config=file.config if named is None and file.config else {"model": named},
            recipe=_beside(folder, file.metadata),
            dtype=dtype_of(file.weights),
            _card=_card(folder) if "merge" in file.metadata else None,
            _metadata=carried_metadata(file.metadata),
            _loaded={name: file.weights[known] for name, known in names.items()},
            _sampler=sampler,
            _guide=cls.from_pretrained(guide, network=guide_network) if guided else None,
        )

    def sample(self, noise: Tensor, labels: Tensor | None = None, **settings: Any) -> Tensor:
        """`merge_rl.sample` of the network, by default as its recipe says.

        Where guidance was searched with the merge the recipe says it. Raises ConfigError for a
        guide that was not merged, and is not handed over as `guide`.
        """
        if self._sampler is not None:
            said = to_mapping(self._sampler)
            name = said.pop("guide")
            settings = {k: v for k, v in said.items() if k not in FOR_RUNS} | settings
            if self._guide is not None:
                settings = {"guide": self._guide.network} | settings
            elif name is not None and "guide" not in settings:
                raise ConfigError(f"the recipe names the guide {name}, expected guide=its network")
        return sample(self.network, noise, labels, **settings)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        overwrite: bool = False,
        **push_options: Any,
    ) -> Path:
        """Write the folder as `merge_rl.save_model` does, and push it too if asked to.

        Recipe and card go along while the weights are those that were loaded: a recipe does not
        make weights that were trained on. `repo_id` is the folder's name by default. Raises
        ConfigError for a folder that exists, unless `overwrite`.
        """
        weights = {name: t.detach().cpu() for name, t in self.network.state_dict().items()}
        same = self._loaded.keys() == weights.keys() and all(
            torch.equal(weights[name], t.float() if t.is_floating_point() else t)
            for name, t in self._loaded.items()
        )
        target = Path(save_directory)
        if target.exists() and not overwrite:
            raise ConfigError(f"{target}: exists already; pass overwrite=True, or another folder")
        saved = save_model(
            target, weights, self.config, recipe=self.recipe if same else None,
            card=self._card if same else _CHANGED, dtype=self.dtype if same else "float32",
            metadata=self._metadata, replace=overwrite,
        )  # fmt: skip
        if same and self._guide is not None:
            self._guide.save_pretrained(saved / GUIDE_FOLDER)
        if push_to_hub:
            push(saved, repo_id or target.name, **push_options)
        return saved

    def push_to_hub(self, repo_id: str, **options: Any) -> Pushed:
        """Upload it to "user/repo"; options are those of `merge_rl.push`, private by default."""
        with tempfile.TemporaryDirectory() as place:
            saved = self.save_pretrained(Path(place) / "model")
            return push(saved, repo_id, **options)


def _beside(folder: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The recipe that lies with a merge; a file of a set has none, whatever lies beside it."""
    file = folder / RECIPE_NAME
    if "merge" not in metadata or not file.is_file():
        return None
    found = load_yaml(file)
    return found if isinstance(found, dict) else None


def _card(folder: Path) -> str | None:
    file = folder / CARD_NAME
    return read_bounded(file) if file.is_file() else None
