"""Searchers compared: what each costs and finds, on seeds that no search has seen."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import merge_rl as mrl
from merge_rl.config.optimize import OptimizeConfig
from merge_rl.errors import BudgetError, ConfigError, RunError, StatisticsError, UnknownNameError
from merge_rl.features.digits import DigitsNet
from merge_rl.interfaces import NullTracker
from merge_rl.progress import NoteTracker
from merge_rl.storage.runs import SETTINGS
from merge_rl.storage.runs.run_dir import RunDir
from merge_rl.workflows.assembly.job import Job, build_job
from merge_rl.workflows.assembly.resolve import resolve_config
from merge_rl.workflows.compare.run import compare_searchers
from merge_rl.workflows.compare.trials import (
    Jobs,
    Trial,
    check_seeds,
    parse_spec,
    parse_specs,
)
from merge_rl.workflows.evaluate.score_store import ScoreStore
from merge_rl.workflows.optimize.search import run_search
from merge_rl.workflows.report.compare_page import markdown, write_comparison
from merge_rl.workflows.report.plots import window

pytestmark = pytest.mark.usefixtures("no_network_here")

TinyConfig = Callable[..., OptimizeConfig]
SEARCHERS = ["policy-gradient", "policy-gradient label=adam search.update=adam", "best-checkpoint"]


class Compared(NamedTuple):
    """A finished comparison, to read only."""

    config: OptimizeConfig
    out: Path
    document: Mapping[str, Any]


@pytest.fixture(scope="module")
def compared(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path_factory: pytest.TempPathFactory
) -> Compared:
    config = tiny_config(shared_tiny)
    out = tmp_path_factory.mktemp("compare") / "out"
    return Compared(
        config, out, compare_searchers(config, out=out, searchers=SEARCHERS, seeds=(3, 4))
    )


def line(document: Mapping[str, Any], label: str) -> dict[str, Any]:
    (found,) = [row for row in document["searchers"] if row["searcher"] == label]
    return dict(found)


def scored_images(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of scores that are generated from now on."""
    made: list[str] = []
    original = RunDir.write

    def noted(self: RunDir, name: str, value: Any) -> None:
        if name == "scores.json":
            made.append(next(reversed(value)))
        original(self, name, value)

    monkeypatch.setattr(RunDir, "write", noted)
    return made


# ------------------------------------------------------------------------------------ specs


def test_a_spec_has_settings_and_a_label() -> None:
    plain = parse_spec("nevergrad:TBPSA")
    assert (plain.label, plain.name, plain.slug) == ("nevergrad:TBPSA",) * 2 + ("nevergrad-TBPSA",)
    found = parse_spec("policy-gradient label='wide steps' search.std=2 merge.map=affine")
    assert (found.label, found.slug) == ("wide steps", "wide-steps")
    config = found.config(OptimizeConfig(checkpoints="x", budget=7), seed=9)
    assert (config.search.std, config.merge.map, config.seed, config.budget) == (
        2.0,
        "affine",
        9,
        7,
    )
    paper = parse_spec("policy-gradient preset=paper search.std=0.5")
    config = paper.config(OptimizeConfig(checkpoints="x"), seed=0)
    assert (config.search.policy, config.search.std, config.merge.map) == ("mlp", 0.5, "free")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected NAME"),
        ("search.std=1", "expected a searcher's name before"),
        (
            "lcsc std=1",
            "expected label=LABEL, preset=NAME or SECTION.KEY=VALUE, such as .*, got 'std=1'",
        ),
        ("lcsc search.std", "such as search.std=0.5, got 'search.std'"),
        ("lcsc 'search.std=1", "expected NAME"),
        ("lcsc search.std=[", "not readable YAML"),
        ("lcsc sampler.num_steps=9", r"sampler.num_steps cannot be .* expected search\.\*"),
        ("lcsc search.name=random", "search.name cannot be"),
        ("lcsc preset=none", "unknown preset 'none'"),
    ],
)
def test_what_is_no_spec_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_spec(text)


def test_specs_and_seeds_come_once() -> None:
    with pytest.raises(ConfigError, match="'a b' is there twice; .* label="):
        parse_specs(["x label=a-b", "y label='a b'"][::-1])
    assert check_seeds([2, 0]) == (2, 0)
    with pytest.raises(ConfigError, match="got 1 twice"):
        check_seeds([1, 0, 1])
    with pytest.raises(ConfigError, match="got none"):
        check_seeds([])


# -------------------------------------------------------------------------------------- the curve


def test_what_a_search_reports_on_the_way() -> None:
    found = {
        "coefficients": [[0.0, 1.0]], "search_images": 90,
        "start": {"images": 20, "coefficients": [[0.5, 0.5]]},
    }  # fmt: skip
    events = [
        {"images": 40, "coefficients": [[0.4, 0.6]]}, {"images": 60, "coefficients": [[0.3, 0.7]]}
    ]  # fmt: skip
    config = OptimizeConfig(checkpoints="x", budget=160)
    origin = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    trial = Trial(config, found, events, 1.0, 0.5)
    # 10 and 20 of 160 images: nothing, then the start; 40, 80: rounds; 120 and 160: the result.
    points = [(images, rows[0, 0].item()) for images, rows in trial.curve(origin)]
    assert points == [(10, 1.0), (20, 0.5), (40, 0.4), (80, 0.3), (120, 0.0), (160, 0.0)]


# ------------------------------------------------------------------------------------ the outcome


def test_a_search_is_that_of_a_run_of_its_own(compared: Compared, tmp_path: Path) -> None:
    # The second search after another with the same objects: nothing of the first is left in them.
    config = parse_spec("policy-gradient").config(compared.config, seed=4)
    opened = mrl.open_checkpoints(config.checkpoints, track="raw")
    resolved = resolve_config(config, opened)
    job = build_job(resolved, opened)
    run = RunDir.create(tmp_path / "alone", resolved, {})
    found = run_search(resolved, job, run, NullTracker(), ScoreStore(job, run, 4))
    of_compare = line(compared.document, "policy-gradient")["runs"][1]
    assert of_compare["seed"] == 4
    assert of_compare["coefficients"] == found.coefficients.tolist()
    assert of_compare["images"] == found.images


def test_all_are_scored_on_the_same_images(compared: Compared) -> None:
    document = compared.document
    best = line(document, "best-checkpoint")
    # Whatever the seed of its search, the same checkpoint has the same score.
    chosen = {str(run["coefficients"]): run["scores"] for run in best["runs"]}
    singles = document["fixed"]["best single"]["fid"]
    assert all(len(run["scores"]["heldout"]["values"]) == 3 for run in best["runs"])
    if len(chosen) == 1:
        assert best["fid"]["heldout"]["low"] == best["fid"]["heldout"]["high"]
    index = compared.document["checkpoints"].index(document["best_single"])
    for text, scores in chosen.items():
        if json.loads(text)[0][index] == 1.0:
            assert scores["heldout"]["values"] == singles["heldout"]["values"]
    newest = document["fixed"]["newest"]
    assert newest["curve"]["heldout"] == newest["fid"]["heldout"]["values"][0]  # equal N


def test_the_numbers_of_the_table(compared: Compared) -> None:
    document = compared.document
    assert [row["searcher"] for row in document["searchers"]] == [
        "policy-gradient", "adam", "best-checkpoint",
    ]  # fmt: skip
    for row in document["searchers"]:
        means = [run["scores"]["heldout"]["mean"] for run in row["runs"]]
        fid = row["fid"]["heldout"]
        assert fid["median"] == pytest.approx(sum(means) / 2)
        assert [fid["low"], fid["high"]] == pytest.approx(sorted(means))
        free = min(entry["fid"]["heldout"]["mean"] for entry in document["fixed"].values())
        assert row["ratio"] == pytest.approx(fid["median"] / free)
        rows = torch.tensor([run["coefficients"] for run in row["runs"]], dtype=torch.float64)
        spread = (rows[0] - rows[1]).abs() / math.sqrt(2)  # standard deviation of two
        assert row["coefficient_spread"] == pytest.approx(float(spread.quantile(0.5)))
        assert row["largest_coefficient"] == float(rows.abs().max())
        assert 0 < row["overhead"] < 1
        # Two steps of Heun with an open end, of every image.
        assert row["evaluations"] == 3 * row["images"]
        (name,) = row["others"]
        found = [run["scores"][name]["mean"] for run in row["runs"]]
        assert row["others"][name]["median"] == pytest.approx(sum(found) / 2)
        assert row["images"] <= compared.config.budget
        assert [point["images"] for point in row["curve"]] == [190 * f for f in (
            1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1,
        )]  # fmt: skip
    assert json.loads((compared.out / "compare.json").read_text()) == document


def test_what_searches_can_share_is_built_once(compared: Compared) -> None:
    opened = mrl.open_checkpoints(compared.config.checkpoints, track="raw")
    jobs = Jobs(opened, lambda _text: None)

    def job(text: str, seed: int) -> Job:
        return jobs.of(resolve_config(parse_spec(text).config(compared.config, seed), opened))

    first, second = job("policy-gradient", 0), job("random reward.name=fid-full", 1)
    assert second.flat is first.flat
    assert second.final_rollout is first.final_rollout
    assert second.reward is not first.reward
    assert second.rollout is not first.rollout  # each counts its own time
    other = job("policy-gradient merge.map=softmax merge.start=uniform", 0)
    assert other.flat is not first.flat
    assert other.map(torch.zeros(other.map.dim, dtype=torch.float64)).tolist() == [[0.25] * 4]


def test_done_is_not_done_again(
    compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared.out, out)
    made = scored_images(monkeypatch)
    again = compare_searchers(compared.config, out=out, searchers=SEARCHERS, seeds=(3, 4))
    assert dict(again) == dict(compared.document)
    assert made == []
    # One more searcher: it alone is searched for.
    more = compare_searchers(
        compared.config, out=out, searchers=[*SEARCHERS, "uniform"], seeds=(3, 4)
    )
    assert more["searchers"][:3] == compared.document["searchers"]
    uniform = line(more, "uniform")
    assert uniform["ratio"] >= 1
    assert (uniform["fid"]["heldout"]["median"]) == pytest.approx(
        more["fixed"]["uniform average"]["fid"]["heldout"]["mean"]
    )
    assert made == []  # the average is known already


def test_a_comparison_of_an_earlier_release_goes_on_by_its_rules(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    out, config = tmp_path / "out", tiny_config(shared_tiny)
    first = dataclasses.replace(config, rules=1)
    arguments: dict[str, Any] = {"out": out, "searchers": ["best-checkpoint"], "seeds": (3,)}
    begun = compare_searchers(first, **arguments)
    path = out / SETTINGS
    document = json.loads(path.read_text())
    assert document["settings"]["config"].pop("rules") == 1
    path.write_text(json.dumps(document))
    (trial,) = out.glob("*/config.yaml")
    trial.write_text(trial.read_text().replace("rules: 1\n", ""))
    assert compare_searchers(config, **arguments) == begun
    # One that begins now has other images.
    now = compare_searchers(config, **{**arguments, "out": tmp_path / "now"})
    assert now["searchers"][0]["fid"] != begun["searchers"][0]["fid"]


class Stop(NullTracker):
    """Ctrl-C in some phase."""

    def __init__(self, phase: str) -> None:
        self.wanted, self.images = phase, 0

    def phase(self, name: str, total: int) -> None:
        self.on = name == self.wanted

    def advance(self, count: int) -> None:
        self.images += count if self.on else 0
        if self.images > 100:
            raise KeyboardInterrupt


def test_cut_short_it_goes_on(compared: Compared, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"searchers": SEARCHERS, "seeds": (3, 4)}
    with pytest.raises(KeyboardInterrupt):
        compare_searchers(
            compared.config, out=tmp_path / "out", tracker=Stop("adam seed 3: search"), **arguments
        )
    assert not (tmp_path / "out/adam-seed3/result.json").exists()
    # A folder that was made when the power failed.
    (tmp_path / "out/adam-seed4").mkdir()
    (tmp_path / "out/adam-seed4/inputs.json").write_text("{}")
    found = compare_searchers(compared.config, out=tmp_path / "out", **arguments)
    for row, expected in zip(found["searchers"], compared.document["searchers"], strict=True):
        timed = ("seconds", "overhead")
        runs = [{k: v for k, v in run.items() if k not in timed} for run in row["runs"]]
        assert runs == [
            {k: v for k, v in run.items() if k not in timed} for run in expected["runs"]
        ]


def test_an_extractor_that_fails_is_named_and_goes_on_once_it_is_mended(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DigitsNet.forward

    def forward(self: DigitsNet, images: Tensor) -> Tensor:
        return real(self, images).index_fill(0, torch.tensor([len(images) - 1]), torch.inf)

    arguments: dict[str, Any] = {"out": tmp_path / "out", "searchers": ["uniform"], "seeds": (3,)}
    told = (
        "no score on fresh seeds: the extractor digits gives features that are not finite for 1 of"
    )
    with monkeypatch.context() as patch:
        patch.setattr(DigitsNet, "forward", forward)
        with pytest.raises(StatisticsError, match=f"{told} 10 images$"):
            compare_searchers(tiny_config(shared_tiny), **arguments)
    assert not (tmp_path / "out/compare.json").exists()
    found = compare_searchers(tiny_config(shared_tiny), **arguments)
    assert line(found, "uniform")["fid"]["heldout"]["median"] > 0


# ------------------------------------------------------------------------------------- refusals


def test_other_settings_are_refused(compared: Compared, tiny_config: TinyConfig) -> None:
    other = tiny_config(Path(compared.config.checkpoints), budget=250, reward={"max_gap": 2.0})
    with pytest.raises(
        RunError, match=r"config\.budget was 190, is 250; .*max_gap was 1000000000\.0, is 2\.0"
    ):
        compare_searchers(other, out=compared.out, searchers=SEARCHERS)
    with pytest.raises(RunError, match="curve_images was 20, is 10"):
        compare_searchers(compared.config, out=compared.out, curve_images=10)
    renamed = ["policy-gradient label=adam search.std=0.5"]
    with pytest.raises(
        RunError, match=r"adam-seed3 was begun .*search\.update was 'adam', is None"
    ):
        compare_searchers(compared.config, out=compared.out, searchers=renamed, seeds=(3,))


def test_a_folder_of_something_else_is_left_alone(
    tiny: Path, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("keep")
    with pytest.raises(RunError, match="holds no comparison"):
        compare_searchers(tiny_config(tiny), out=out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("searchers", "changes", "error", "message"),
    [
        (["policy-gradiant"], {}, ConfigError, "did you mean 'policy-gradient'"),
        (["uniform", "ema-grid"], {}, ConfigError, "searcher ema-grid: .*ema_std"),
        (["uniform", "policy-gradient"], {"budget": 89}, BudgetError,
         "searcher policy-gradient: a budget of 89 images.* at least 90"),
        (["uniform", "best-checkpoint"], {"budget": 25}, BudgetError,
         "searcher best-checkpoint: 25 images.* begins with 4 .* at least 40"),
        (["lcsc search.nonsense=1"], {}, ConfigError, "searcher lcsc.*nonsense"),
        ([], {}, ConfigError, "at least one searcher"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_runs(
    searchers: list[str], changes: dict[str, Any], error: type[Exception], message: str,
    tiny: Path, tiny_config: TinyConfig, tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        compare_searchers(tiny_config(tiny, **changes), out=tmp_path / "out", searchers=searchers)
    assert not (tmp_path / "out").exists()
    assert issubclass(UnknownNameError, ConfigError)


class Notes(NullTracker):
    """Ends everything before the first search, and keeps what was noted."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def event(self, event: Mapping[str, Any]) -> None:
        self.texts.append(str(event.get("text")))

    def phase(self, name: str, total: int) -> None:
        raise KeyboardInterrupt


def test_what_comes_from_the_default_list_is_left_out(
    tiny: Path, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    notes = Notes()
    with pytest.raises(KeyboardInterrupt):
        compare_searchers(tiny_config(tiny), out=tmp_path / "out", tracker=notes)
    assert any(text.startswith("left out: searcher ema-grid") for text in notes.texts)


# ----------------------------------------------------------------------------------- what is seen


def test_table_and_plot(compared: Compared, figures: None, tmp_path: Path) -> None:
    assert write_comparison(compared.document, tmp_path) is None
    text = (tmp_path / "compare.md").read_text()
    assert "budget 190 images, median [range] of 2 seeds; FID at N = 20" in text
    heads = "| searcher | held-out FID | reference FID | quadratic MMD | ratio | optimism |"
    assert heads in text
    assert f"- floor: both halves of the real images are {compared.document['floor']:.3f}" in text
    assert "| searcher | images | network calls | seconds |" in text
    old = {key: value for key, value in compared.document.items() if key != "floor"}
    drop = {"others", "evaluations"}
    old["searchers"] = [{k: v for k, v in o.items() if k not in drop} for o in old["searchers"]]
    assert "| searcher | held-out FID | reference FID | ratio |" in markdown(old)
    assert f"best single ({compared.document['best_single']})" in text
    assert text.count("| adam |") == 2
    assert (tmp_path / "compare.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_without_the_library_there_is_a_table(compared: Compared, tmp_path: Path) -> None:
    note = write_comparison(compared.document, tmp_path)
    assert note is not None
    assert "pip install 'merge_rl[report]'" in note
    assert "compare.png" not in (tmp_path / "compare.md").read_text()
    assert not (tmp_path / "compare.png").exists()


def test_the_plot_shows_the_results_and_not_what_is_far_worse() -> None:
    # Results from 0.6 to 0.8: 0.3 of their range below, 1.5 of it above.
    assert window([1.0, 6.0])[0] == 0.5  # above 0, as a logarithm needs it
    low, high = window([0.7, 0.6, 0.8])
    assert (low, high) == pytest.approx((0.54, 1.1))
    # Equal ones: a twentieth of their size stands for the range.
    assert window([2.0, 2.0]) == pytest.approx((1.97, 2.15))


def test_the_first_line_says_what_is_generated_at_most(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    unsaid = {"num_images": None, "selection_images": None, "repeats": 3}
    config, said = tiny_config(shared_tiny, budget=300, evaluation=unsaid), list[str]()
    tracker = NoteTracker(said.append)
    asked: dict[str, Any] = {"searchers": ["uniform"], "seeds": (3,), "tracker": tracker}
    compare_searchers(config, out=tmp_path / "out", **asked)
    # 0.4 of 300 are 3 repeats of 40 images, which 4 checkpoints of 30 images cost together; the
    # search and three fixed merges are scored, and along it 6 points and these.
    assert said[0].startswith("1,260 images in all at most, about ")
    listed = "(searches 300, fresh scores 480, along the searches 360, best single 120)"
    assert said[0].endswith(listed)
