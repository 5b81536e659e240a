"""Model cards in the Hub's vocabulary, licences of merges, and where sources came from."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from torch import Tensor

import merge_rl as mrl
from merge_rl.errors import ConfigError
from merge_rl.storage.checkpoints import merged_licence
from merge_rl.storage.checkpoints.checkpoint_set import open_checkpoints
from merge_rl.storage.checkpoints.manifest import MANIFEST_NAME
from merge_rl.workflows.evaluate.final_scores import Comparison
from merge_rl.workflows.export.card import (
    CardFacts,
    base_models,
    card_header,
    hub_licence,
    hub_repositories,
    model_card,
)

pytestmark = pytest.mark.usefixtures("no_network_here")


def comparison() -> Comparison:
    def rows(*values: float) -> list[dict[str, float]]:
        return [{"reference": value, "heldout": value + 1} for value in values]

    # Mean 2 and half-width t(0.975, 2) * 1 / sqrt(3) = 4.302653 / 1.732051 = 2.484138.
    return Comparison(
        1000, "second",
        {
            "start": rows(4.0, 5.0, 6.0), "uniform": rows(3.0, 3.0, 3.0),
            "best single": rows(3.5, 3.5, 3.5), "result": rows(1.0, 2.0, 3.0),
        },
    )  # fmt: skip


def facts(**changes: Any) -> CardFacts:
    given: dict[str, Any] = {
        "name": "digits", "family": "edm2", "checkpoints": ("first", "second"),
        "group_names": ("all",), "coefficients": torch.tensor([[0.25, 0.75]]),
        "dtype": "float32", "how": "Found by a test.", "licence": "CC-BY-NC-SA-4.0",
        "base_models": ("user/repo",), "comparison": comparison(), "extractor": "digits",
        "data": {"reference": "Digits, training half", "heldout": "Digits, other half"},
    }  # fmt: skip
    return CardFacts(**{**given, **changes})


def test_the_header_is_the_hubs() -> None:
    text = model_card(facts())
    data: Any = ModelCard(text).data
    assert data.license == "cc-by-nc-sa-4.0"
    assert data.base_model == ["user/repo"]
    assert data.tags == ["merge", "diffusion", "edm2", "merge_rl"]
    assert data.library_name == "merge_rl"
    assert data.pipeline_tag == "unconditional-image-generation"
    # The Hub's own client finds the scores: the result's, for each reference.
    assert data.eval_results is not None
    values = {item.dataset_name: item.metric_value for item in data.eval_results}
    assert values == {
        "Digits, training half (reference)": 2.0, "Digits, other half (heldout)": 3.0,
    }  # fmt: skip
    name = data.eval_results[1].metric_name
    assert name is not None
    assert "N = 1,000, mean of 3 repeats, 95 % interval 0.516 to 5.484" in name
    assert data.eval_results[1].metric_type == "fid"


def snippet(path: str) -> Tensor:
    """What a card tells its readers to write; checked by the type checker with these tests."""
    model = mrl.load_model(path)  # or "user/repo"
    noise = torch.randn(4, *model.sample_shape)
    samples = mrl.sample(model, noise, torch.arange(4))
    return samples


def test_the_snippet_of_a_card_is_typed_and_runs(tiny: Path) -> None:
    code = model_card(facts()).split("```python\n")[1].split("```")[0]
    lines = [line.strip().replace('"path/to/this/folder"', "path") for line in code.splitlines()]
    own = [line.strip() for line in inspect.getsource(snippet).splitlines()]
    assert [line for line in lines if line and not line.startswith("import")] == own[2:5]
    file = tiny / "raw" / "tiny-0000400.safetensors"
    assert snippet(str(file)).shape == (4, 1, 8, 8)


def test_the_text_has_scores_coefficients_and_a_snippet() -> None:
    text = model_card(facts())
    assert "| best single (second) | 3.500 [3.500, 3.500] | 4.500 [4.500, 4.500] |" in text
    assert "| second | +0.7500 |" in text
    assert "Found by a test." in text
    assert "mrl.sample(model, noise, torch.arange(4))" in text
    unlabelled = model_card(facts(conditional=False, comparison=None))
    assert "mrl.sample(model, noise)" in unlabelled
    assert "## Scores" not in unlabelled
    assert "model-index" not in yaml.safe_load(unlabelled.split("---")[1])


def test_many_groups_are_summed_up() -> None:
    rows = torch.tensor([[float(g), 1.0 - g] for g in range(13)])
    text = model_card(facts(group_names=tuple(map(str, range(13))), coefficients=rows))
    assert "| checkpoint | mean of 13 groups | lowest | highest |" in text
    assert "| first | +6.0000 | +0.0000 | +12.0000 |" in text
    assert "| second | -5.0000 | -11.0000 | +1.0000 |" in text
    assert "Those of each group are in `merge.yaml`." in text
    assert "`merge.yaml`" not in model_card(facts()).split("## Coefficients")[1].split("##")[0]


def test_scores_that_are_not_finite_are_not_published() -> None:
    scores = dict(comparison().scores)
    scores["result"] = [{**row, "heldout": math.nan} for row in scores["result"]]
    text = card_header(facts(comparison=Comparison(1000, "second", scores))).to_yaml()
    header = yaml.safe_load(text)
    results = header["model-index"][0]["results"]
    assert [r["dataset"]["name"] for r in results] == ["Digits, training half (reference)"]


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        (None, {}),
        ("MIT", {"license": "mit"}),
        ("CC-BY-NC-SA-4.0", {"license": "cc-by-nc-sa-4.0"}),
        ("Our own, v2", {"license": "other", "license_name": "our-own-v2"}),
    ],
)
def test_licences_as_the_hub_names_them(licence: str | None, expected: dict[str, str]) -> None:
    assert hub_licence(licence) == expected


def relicense(folder: Path, *licences: str | None) -> None:
    path = folder / MANIFEST_NAME
    document = yaml.safe_load(path.read_text())
    document.pop("licence", None)
    for entry, licence in zip(document["checkpoints"], licences, strict=False):
        if licence:
            entry["licence"] = licence
    path.write_text(yaml.safe_dump(document))


def test_equal_licences_are_inherited(tiny: Path) -> None:
    assert merged_licence(open_checkpoints(tiny)) == "MIT"
    relicense(tiny, "CC-BY-4.0", "cc-by-4.0", None, "CC-BY-4.0")
    assert merged_licence(open_checkpoints(tiny, track="raw")) == "CC-BY-4.0"
    relicense(tiny)
    for entry in (document := yaml.safe_load((tiny / MANIFEST_NAME).read_text()))["checkpoints"]:
        entry.pop("licence", None)
    (tiny / MANIFEST_NAME).write_text(yaml.safe_dump(document))
    assert merged_licence(open_checkpoints(tiny)) is None
    assert merged_licence(open_checkpoints(tiny), "mit") == "mit"
    with pytest.raises(ConfigError, match="name of a licence, got an empty text"):
        merged_licence(open_checkpoints(tiny), " ")


def test_different_licences_need_a_decision(
    tiny: Path, mergerl: Any, tiny_config: Any, tmp_path: Path
) -> None:
    relicense(tiny, "CC-BY-NC-SA-4.0", "MIT", "MIT", "MIT")
    message = "under 2 licences, CC-BY-NC-SA-4.0 and MIT; pass --license NAME"
    with pytest.raises(ConfigError, match=message):
        merged_licence(open_checkpoints(tiny, track="raw"))
    ended = mergerl("merge", tiny, tmp_path / "out", "--uniform", "--track", "raw")
    assert (ended.code, (tmp_path / "out").exists()) == (1, False)
    assert "under 2 licences" in ended.err
    # A search is refused before it begins.
    with pytest.raises(ConfigError, match=message):
        mrl.optimize(tiny, out=tmp_path / "run", config=tiny_config(tiny))
    assert not (tmp_path / "run").exists()
    ended = mergerl(
        "merge", tiny, tmp_path / "out", "--uniform", "--track", "raw", "--license", "cc-by-nc-4.0"
    )
    assert ended.code == 0, ended.err
    header = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---")[1])
    assert header["license"] == "cc-by-nc-4.0"


def test_sources_on_the_hub_become_base_models(tiny: Path) -> None:
    assert hub_repositories(
        [
            "https://huggingface.co/user/repo/resolve/main/a.safetensors",
            "hf://user/repo@v1/b.safetensors", "hf://user/other-1.0", "https://example.org/a/b", "",
            "https://huggingface.co/user/repo",
        ]
    ) == ["user/repo", "user/other-1.0"]  # fmt: skip
    assert base_models(open_checkpoints(tiny)) == []
