"""Searches by a function of the user's: a flow of points, statistics by hand, refusals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import merge_rl as mrl
from merge_rl.config import EvaluationConfig, OptimizeConfig, RewardConfig, SearchConfig
from merge_rl.errors import CheckpointError, ConfigError, IncompatibleCheckpointError, RunError
from merge_rl.workflows.optimize import OptimizeResult
from merge_rl.workflows.rollout import Subject
from merge_rl.workflows.rollout.functions import GivenImages

Generated = Callable[[Subject, Sequence[int], Tensor], Tensor]
SMALL = OptimizeConfig(
    evaluation=EvaluationConfig(num_images=50, repeats=3, selection_images=20),
    search=SearchConfig(name="policy-gradient", population=4),
    reward=RewardConfig(pool_size=100, subset_size=20, refresh_size=20),
)

# ----------------------------------------------------------------------------- a flow of points


class Flow(nn.Module):
    """v(x, t) of points in the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU())
        self.out = nn.Linear(48, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        made: Tensor = self.out(self.layers(torch.cat([x, t.expand(len(x), 1)], 1)))
        return made


def ring(count: int, generator: torch.Generator) -> Tensor:
    angle = 2 * torch.pi * torch.rand(count, generator=generator)
    radius = 1 + 0.1 * torch.randn(count, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def moments(x: Tensor) -> Tensor:
    """Features whose means and covariances know a ring from a blob."""
    return torch.stack([x[:, 0], x[:, 1], x.square().sum(1), x.prod(1), x[:, 0].square()], 1)


@pytest.fixture(scope="module")
def snapshots() -> list[dict[str, Tensor]]:
    """A short training at a rate that leaves every snapshot somewhere around the optimum."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    flow, kept = Flow(), []
    optimiser = torch.optim.Adam(flow.parameters(), lr=4e-3)
    for step in range(1, 801):
        data, noise = ring(64, generator), torch.randn(64, 2, generator=generator)
        t = torch.rand(64, 1, generator=generator)
        loss = (flow(t * data + (1 - t) * noise, t) - (data - noise)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step >= 400 and step % 66 == 4:
            kept.append({name: value.clone() for name, value in flow.state_dict().items()})
    return kept


def flown(weights: Subject, seeds: Sequence[int], _labels: Tensor) -> Tensor:
    """Eight steps of Euler from the noise of each seed, and the features of where they lead."""
    assert isinstance(weights, Mapping)
    x, flow = mrl.seeded_noise(seeds, [2]), Flow()
    for step in range(8):
        t = torch.full((1, 1), step / 8)
        x = x + torch.func.functional_call(flow, dict(weights), (x, t)) / 8
    return moments(x)


def real(seed: int) -> Tensor:
    return moments(ring(4000, torch.Generator().manual_seed(seed)))


def test_a_merge_of_points_beats_the_best_checkpoint(
    snapshots: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    config = OptimizeConfig(
        evaluation=EvaluationConfig(num_images=2000, repeats=4, selection_images=500)
    )
    result = mrl.search(
        snapshots, generate=flown, reference=real(1), heldout=real(2), out=tmp_path / "run",
        config=config, budget=12_000, batch=1000, progress=False,
    )  # fmt: skip
    run = (tmp_path / "run" / "config.yaml").read_text()
    assert "name: pathwise" in run  # torch alone: there is a gradient
    gain = result.comparison.gain("best single")
    assert gain.low > 0
    best, merged = (
        result.comparison.summary(entry)["heldout"] for entry in ("best single", "result")
    )
    assert merged["high"] < best["low"]


# ------------------------------------------------------------------- one number, known by hand


def states(values: Sequence[float]) -> list[dict[str, Tensor]]:
    return [{"shift": torch.tensor([value])} for value in values]


def shifted(weights: Subject, seeds: Sequence[int], _labels: Tensor) -> Tensor:
    """Normal numbers about the one weight there is."""
    assert isinstance(weights, Mapping)
    return mrl.seeded_noise(seeds, [1]) + weights["shift"]


def normal(count: int = 4000) -> Tensor:
    return torch.randn(count, 1, generator=torch.Generator().manual_seed(3))


def search(out: Path, **changes: Any) -> OptimizeResult:
    given = {
        "generate": shifted, "reference": normal(), "config": SMALL, "progress": False,
        "budget": 8000, "seed": 3, "searcher": "policy-gradient", "map": "free", "scale": 0.5,
    }  # fmt: skip
    return mrl.search(
        changes.pop("checkpoints", states([2.0, 3.0])), out=out, **{**given, **changes}
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> OptimizeResult:
    return search(tmp_path_factory.mktemp("function") / "run")


def test_the_best_merge_is_that_of_the_real_mean(found: OptimizeResult) -> None:
    # c . (2, 3) is the mean of what is generated, 0 that of real data: distance (2 c0 + 3 c1)^2.
    at_result = float(found.coefficients[0] @ torch.tensor([2.0, 3.0], dtype=torch.float64))
    assert abs(at_result) < 1.0 < 2.5
    assert found.final["reference"]["mean"] == pytest.approx(at_result**2, abs=0.3)
    # Of the start, checkpoint 0: 2^2, give or take what 3 x 50 draws are off by.
    assert found.baseline["reference"]["mean"] == pytest.approx(4.0, abs=1.2)


def test_the_run_is_that_of_every_search(found: OptimizeResult) -> None:
    run = found.run_dir
    assert json.loads((run / "result.json").read_text())["checkpoints"] == [
        "checkpoint-0", "checkpoint-1",
    ]  # fmt: skip
    kept = mrl.open_checkpoints(run / "inputs" / "checkpoints")
    torch.testing.assert_close(kept.read(1)["shift"], torch.tensor([3.0]))
    merged = mrl.open_checkpoints(run / "merged").read(0)["shift"]
    expected = found.coefficients[0] @ torch.tensor([2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(merged, expected[None].float())
    card = (run / "merged" / "README.md").read_text()
    assert "load_file" in card
    assert "mrl.load_model" not in card
    assert "test_function:shifted" in (run / "config.yaml").read_text()


def test_a_run_goes_on_with_the_function_and_ends_the_same(
    found: OptimizeResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    def failing(weights: Subject, seeds: Sequence[int], labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise KeyboardInterrupt
        return shifted(weights, seeds, labels)

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "run", generate=failing)
    with pytest.raises(ConfigError, match=r"hand it over to go on: merge_rl.resume\("):
        mrl.resume(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"generate returned float32 \(3,\), expected floating"):
        mrl.resume(tmp_path / "run", generate=lambda *_: torch.zeros(3))
    with pytest.raises(
        ConfigError, match="'dict' object is not callable; a module .* is handed over as model$"
    ):
        mrl.resume(tmp_path / "run", generate=lambda model, *_: model())
    again = mrl.resume(tmp_path / "run", generate=shifted)
    assert "failing, goes on with tests.workflows.optimize.test_function:shifted" in (
        capsys.readouterr().err
    )
    assert isinstance(again, OptimizeResult)
    assert torch.equal(again.coefficients, found.coefficients)
    assert again.comparison == found.comparison


def test_modules_files_and_a_folder_are_checkpoints_as_well(tmp_path: Path) -> None:
    class Shift(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.tensor([value]))
            self.register_buffer("steps", torch.tensor(3))

        def forward(self, noise: Tensor) -> Tensor:
            return noise + self.shift

    def by_module(model: Subject, seeds: Sequence[int], _labels: Tensor) -> Tensor:
        assert isinstance(model, nn.Module)
        made: Tensor = model(mrl.seeded_noise(seeds, [1]))
        return made

    own, found = Shift(2.0), search(tmp_path / "states", budget=600)
    modules = search(
        tmp_path / "modules", checkpoints={"a": own, "b": Shift(3.0)}, generate=by_module,
        budget=600,
    )  # fmt: skip
    assert torch.equal(modules.coefficients, found.coefficients)
    assert not torch.equal(found.coefficients, found.found.start)
    assert own.shift.tolist() == [2.0]  # left as it was
    torch.save({"shift": torch.tensor([2.0])}, tmp_path / "a.pt")
    folder = found.run_dir / "inputs" / "checkpoints"
    files = [tmp_path / "a.pt", folder / "checkpoint-1.safetensors"]
    numbers = {
        "reference": normal().numpy(),
        "generate": lambda *said: shifted(*said).detach().numpy(),
    }
    for name, given in (("files", files), ("folder", folder)):
        again = search(tmp_path / name, checkpoints=given, budget=600, **numbers)
        assert torch.equal(again.coefficients, found.coefficients)


def test_checkpoints_are_numpys_or_a_wrappers_and_the_model_keeps_what_it_made(
    tmp_path: Path,
) -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(1))
            self.kept = 2 * self.shift  # with a history, as weight_norm's weights

        def forward(self, noise: Tensor) -> Tensor:
            self.kept = 1 * self.shift
            return noise + self.kept

    model = Shift()

    def by_module(subject: Subject, seeds: Sequence[int], _labels: Tensor) -> Tensor:
        assert isinstance(subject, Shift)
        assert subject is not model
        made: Tensor = subject(mrl.seeded_noise(seeds, [1]))
        return made

    given = [{"_orig_mod.shift": state["shift"].numpy()} for state in states([2.0, 3.0])]
    found = search(
        tmp_path / "run", checkpoints=given, model=model, generate=by_module, budget=2000
    )
    plain = search(tmp_path / "plain", budget=2000, device=torch.device("cpu"))
    assert torch.equal(found.coefficients, plain.coefficients)
    assert float(model.kept.detach()) == 2.0


def test_labels_take_turns_and_images_go_through_an_extractor(tiny: Path, tmp_path: Path) -> None:
    seen = list[int]()

    def images(weights: Subject, seeds: Sequence[int], labels: Tensor) -> Tensor:
        assert isinstance(weights, Mapping)
        seen.extend(labels.tolist())
        level = (
            100 + 10 * float(weights["shift"].detach()) + 20 * mrl.seeded_noise(seeds, [1, 8, 8])
        )
        return level.clamp(0, 255).to(torch.uint8)

    evaluation = tiny / "evaluation"
    made = search(
        tmp_path / "run", generate=images, num_classes=3, extractor="digits",
        extractor_weights=evaluation / "extractor.safetensors",
        reference=evaluation / "reference.safetensors", budget=400,
    )  # fmt: skip
    assert made.final["reference"]["mean"] > 0
    assert seen[4:10] == [0, 1, 2, 0, 1, 2]  # before, two times two images were made: a trial
    with pytest.raises(ConfigError, match="expected images uint8"):
        search(
            tmp_path / "other", extractor="digits", reference=evaluation / "reference.safetensors",
            extractor_weights=evaluation / "extractor.safetensors",
        )  # fmt: skip


def test_floating_images_are_rounded_straight_through() -> None:
    images = torch.tensor([-3.0, 0.4, 0.5, 100.7, 254.6, 255.0, 300.0]).requires_grad_(True)
    levels = GivenImages().levels(images)
    assert levels.tolist() == [0, 0, 1, 101, 255, 255, 255]
    assert GivenImages().decode(images.detach()).tolist() == levels.tolist()
    (pulled,) = torch.autograd.grad(levels.sum(), images)
    assert pulled.tolist() == [0, 1, 1, 1, 1, 1, 0]  # that of the clipping


class Halves:
    """Mean levels of the left and the right half of an image."""

    name, dim = "halves", 2

    def __call__(self, images: Tensor) -> Tensor:
        return torch.stack([half.float().mean((1, 2, 3)) for half in images.chunk(2, -1)], 1)


def test_a_search_follows_floating_images_through_the_extractor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def images(weights: Subject, seeds: Sequence[int], _labels: Tensor) -> Tensor:
        assert isinstance(weights, Mapping)
        light = mrl.seeded_noise(seeds, [1, 1, 2]).repeat_interleave(4, -1).expand(-1, 1, 8, 8)
        return 20 + 100 * weights["shift"] + 10 * light

    # Levels about 50 are those of a shift of 0.3; the search begins at the newest, 1.
    given: dict[str, Any] = {
        "checkpoints": states([0.0, 1.0]), "extractor": Halves(), "searcher": "auto",
        "reference": 50 + 10 * torch.randn(500, 2, generator=torch.Generator().manual_seed(0)),
        "scale": 0.5, "start": "newest", "budget": 3000, "config": dataclasses.replace(
            SMALL, search=SearchConfig(incumbents=1), reward=RewardConfig(pool_size=100)
        ),
    }  # fmt: skip
    found = search(tmp_path / "run", generate=images, progress=True, **given)
    assert "searcher auto: pathwise\n" in capsys.readouterr().err
    # Of a shift s the distance is about 2 (100 s - 30)^2: 9800 at the start.
    assert found.baseline["reference"]["mean"] == pytest.approx(9800, rel=0.1)
    assert found.final["reference"]["mean"] < 1500
    for change, match in (
        (lambda *asked: images(*asked).to(torch.uint8), "makes images of bytes.*searcher auto"),
        (lambda *asked: images(*asked) / 1000, r"float32 within -1..1, expected images uint8, or"),
        (lambda *asked: images(*asked).detach(), "does not depend on one"),
        (lambda *asked: images(*asked).expand(-1, 2, -1, -1), r"float32 \(2, 2, 8, 8\), expected"),
    ):
        refused(given | {"generate": change, "searcher": "pathwise"}, ConfigError, match, tmp_path)


class Lost(mrl.Searcher):
    """Asks for what is no number."""

    def ask(self) -> Tensor:
        return torch.full((2, len(self.mean)), torch.nan)

    def tell(self, thetas: Tensor, rewards: Tensor) -> None: ...


def refused(change: dict[str, Any], error: type[Exception], match: str, folder: Path) -> None:
    with pytest.raises(error, match=match):
        search(folder / "refused", **change)
    assert not (folder / "refused").exists()


def unfit_modules() -> list[tuple[nn.Module, str]]:
    """Modules that hold no merged weights, and why."""
    return [
        (nn.LazyLinear(1), "LazyLinear has no shape of 'weight' yet"),
        (nn.Linear(1, 1, device="meta"), "Linear is on the meta device"),
        (torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)), "is scripted; expected the module it"),  # type: ignore[no-untyped-call]
    ]


def narrow(weights: Subject, seeds: Sequence[int], _labels: Tensor) -> Tensor:
    """Refuses weights that are not of the type that the user knows."""
    assert isinstance(weights, Mapping)
    return mrl.seeded_noise(seeds, [1]).double() @ weights["shift"].reshape(1, 1)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_bad_input_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    def wide(_weights: Subject, seeds: Sequence[int], _labels: Tensor) -> Tensor:
        return torch.zeros(len(seeds), 2)

    def loose(weights: Subject, seeds: Sequence[int], labels: Tensor) -> Tensor:
        return shifted(weights, seeds, labels) + torch.randn(len(seeds), 1)

    def loose_numbers(*said: Any) -> Any:
        return loose(*said).detach().numpy()

    def by_row(weights: Subject, seeds: Sequence[int], labels: Tensor) -> Tensor:
        return shifted(weights, range(len(seeds)), labels)  # the seeds are not looked at

    def normed(weights: Subject, seeds: Sequence[int], labels: Tensor) -> Tensor:
        made = shifted(weights, seeds, labels)
        return made - made.mean(0)  # as batch norm does while it is trained

    def halved(weights: Subject, seeds: Sequence[int], labels: Tensor) -> Tensor:
        assert isinstance(weights, dict)
        weights["shift"] = weights["shift"].half()  # no later merge would be seen
        return shifted(weights, seeds, labels)

    def drifting(weights: Subject, seeds: Sequence[int], labels: Tensor) -> Tensor:
        made = shifted(weights, seeds, labels)
        assert isinstance(weights, Mapping)
        with torch.no_grad():
            weights["shift"].add_(1e-3)
        return made

    plain = dataclasses.replace(SMALL, search=SearchConfig())
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"checkpoints": []}, CheckpointError, "expected checkpoints, got none"),
        ({"checkpoints": 3}, CheckpointError, "state dicts, modules or files, got int"),
        ({"checkpoints": {1: states([1.0])[0]}}, CheckpointError, "got name 1"),
        ({"checkpoints": [nn.Linear(1, 1, device="meta")]}, CheckpointError,
         "found a tensor without numbers at 'weight'"),
        ({"checkpoints": states([1.0, 1.0]), "map": "whitened"}, ConfigError,
         "checkpoint-1 and checkpoint-0 are the same weights and count once, as checkpoint-0; "
         "expected 2 checkpoints, at least, that differ"),
        ({"checkpoints": [{"shift": torch.ones(1, dtype=torch.int64)}]}, ConfigError,
         "no tensor is averaged; expected some to merge"),
        ({"guidance": 2.0, "network": "a:b"}, ConfigError,
         "guidance, network: expected no settings of networks and samplers"),
        ({"checkpoints": [{"shift": 3}]}, CheckpointError, "expected tensors by name, found int"),
        ({"checkpoints": [*states([1.0]), {"other": torch.ones(1)}]}, IncompatibleCheckpointError,
         "'shift' is missing"),
        ({"reference": [1.0]}, ConfigError, "expected reference as features .*, got list"),
        ({"checkpoints": [3, 4]}, CheckpointError, "state dicts, modules or files, got int"),
        *(({"generate": made}, ConfigError, "seed and label beside other seeds; expected that each")
          for made in (loose_numbers, by_row, normed)),
        ({"searcher": Lost, "config": plain}, ConfigError, r"Lost': expected ask\(\) finite"),
        ({"checkpoints": {"a/b": states([1.0])[0]}}, CheckpointError, "got name 'a/b'"),
        ({"generate": wide}, ConfigError, r"generate returned float32 \(\d+, 2\), expected "
         r"floating features \(\d+, 1\)"),
        ({"generate": lambda *_: torch.tensor(1.0)}, ConfigError,
         r"generate returned float32 \(\), expected floating features"),
        ({"heldout": normal().expand(-1, 2)}, mrl.MergeRLError, "dimension"),
        ({"budgte": 3}, ConfigError, "unknown setting 'budgte'; did you mean 'budget'"),
        ({"pool_size": 50}, ConfigError, "pool_size is 50 in the call and 100 in its config"),
        ({"model": nn.Linear(1, 1)}, CheckpointError, "not the tensors of the network: 3 differ"),
        ({"model": "net"}, ConfigError, "expected model as a torch module, got str"),
        ({"reference": normal().to_sparse()}, ConfigError, r"got sparse_coo \(4000, 1\)"),
        ({"reference": normal() + 1j}, ConfigError, r"got complex64 \(4000, 1\)"),
        ({"generate": lambda *said: shifted(*said).to_sparse()}, ConfigError,
         r"generate returned sparse_coo \(\d+, 1\), expected floating features"),
        *(({"generate": made}, ConfigError, "generate changed the weights, or their type or place")
          for made in (halved, drifting)),
        *(({"model": model}, ConfigError, told) for model, told in unfit_modules()),
        ({"checkpoints": [{"shift": torch.ones(1).double()}] * 2, "generate": narrow}, ConfigError,
         r"with weights by name in float32 \(stored as float64\), .* failed: RuntimeError: "),
        ({"checkpoints": [{"shift": torch.ones(1) * (1 + 1j * k)} for k in range(2)]},
         IncompatibleCheckpointError, "the complex 'shift' differs .*; averages are of real numb"),
    ]  # fmt: skip
    for change, error, match in cases:
        refused(change, error, match, tmp_path)


def test_pathwise_needs_features_with_a_gradient(found: OptimizeResult, tmp_path: Path) -> None:
    def blind(weights: Subject, seeds: Sequence[int], labels: Tensor) -> Tensor:
        return shifted(weights, seeds, labels).detach()

    plain = dataclasses.replace(SMALL, search=SearchConfig(incumbents=1), reward=RewardConfig())
    change = {"generate": blind, "searcher": "pathwise", "config": plain, "budget": 6000}
    refused(change, ConfigError, "what generate returns does not depend on one", tmp_path)
    with pytest.raises(RunError, match="exists already"):
        search(found.run_dir)
