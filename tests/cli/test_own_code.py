"""Networks, decoders, extractors, searchers and rewards of the user's, from the command line on."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import merge_rl as mrl
from merge_rl import own_code, registry
from merge_rl.core.sampling.compatibility import require_call
from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.storage.checkpoints import save_checkpoint
from merge_rl.workflows.assembly.networks import load_guide, open_guide
from tests.finetuning import small_config
from tests.fixtures import Ended
from tests.hub_server import HubServer

MODULE = '''
import torch
import merge_rl as mrl

class Shift(torch.nn.Module):
    """Velocities that carry noise (0, 1) to points about the one weight that there is."""

    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x, t):
        # x_t = t d + (1 - t) e with d = e + shift: d - e is the shift, wherever x is.
        return self.shift.expand_as(x)

def network():
    return mrl.describe(
        Shift(), prediction="velocity", time="up", path="gvp", sample_shape=[2]
    )

def unstated(): return Shift()
def wide():
    made = network()
    made.register_parameter("other", torch.nn.Parameter(torch.zeros(3)))
    return made
def nothing(): return {}

BETAS = torch.linspace(0.1, 0.5, 4)  # made where the module is imported

def stepped():
    made = mrl.describe(
        Shift(), prediction="noise", time="down", betas=BETAS * torch.ones(4), sample_shape=[2]
    )
    made.last = float(BETAS[-1])
    return made

one = Shift()
def ends(): raise SystemExit(3)

class Raising:
    name, dim = "raising", 2

    def __call__(self, points): raise ValueError("no such point")

class First:
    def decode(self, samples): return samples[:1]

class Wrapping(torch.nn.Module):
    """Holds all that it has under a name that wrappers have too."""

    def __init__(self):
        super().__init__()
        self.model = Shift()

    def forward(self, x, t): return self.model(x, t)

def wrapping():
    return mrl.describe(
        Wrapping(), prediction="velocity", time="up", path="linear", sample_shape=[2]
    )

class Points:
    """Features of points: themselves."""

    name, dim = "points", 2

    def __call__(self, points): return points

class Twice:
    def decode(self, samples): return 2 * samples

class Steps(mrl.Searcher):
    """Goes to the better of two candidates along one axis after the other."""

    def ask(self):
        step = torch.zeros_like(self.mean)
        step[self.rounds % len(step)] = 0.3
        return torch.stack([self.mean + step, self.mean - step])

    def tell(self, thetas, rewards):
        self.mean, self.rounds = thetas[rewards.nan_to_num(-1e9).argmax()], self.rounds + 1

class Lazy:
    def __init__(self, config, space, seed): pass

class Nearest:
    """Minus the distance of means."""

    def __init__(self, source): self.mean = source.stats().mean

    def pool_distance(self, pool): return float((pool.stats.mean - self.mean).norm())

    def rewards(self, pool, draws):
        means = torch.stack([features.double().mean(1) for _, features in draws]).mean(0)
        return -(means - self.mean).norm(dim=1)

class Short(Nearest):
    def rewards(self, pool, draws): return torch.zeros(1)

class Far(Nearest):
    def pool_distance(self, pool): return None
'''
SMALL = (
    "--budget", "600", "--pool", "60", "--subset", "20", "--final-images", "40",
    "--num-steps", "2", "--set", "evaluation.selection_images=20", "--batch", "100",
)  # fmt: skip


@pytest.fixture
def own(_own_folder: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module in the current folder; nothing of it is allowed yet."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(own_code, "_allowed", {})
    return name


@pytest.fixture
def shifts(tmp_path: Path) -> Path:
    """Two checkpoints, and statistics of normal points about (1, 0)."""
    for index, value in enumerate(([2.0, 1.0], [4.0, 3.0])):
        (tmp_path / "set").mkdir(exist_ok=True)
        save_checkpoint(tmp_path / f"set/step_{index}.safetensors", {"shift": torch.tensor(value)})
    points = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    torch.save({"features": points + torch.tensor([1.0, 0.0])}, tmp_path / "real.pt")
    return tmp_path / "set"


def begin(mergerl: Callable[..., Ended], shifts: Path, own: str, *more: str) -> Ended:
    return mergerl(
        "optimize", shifts, "--out", "run", "--network", f"{own}:network", "--extractor",
        f"{own}:Points", "--reference", "real.pt", "--map", "free", "--scale", "0.5", *SMALL, *more,
    )  # fmt: skip


def forget() -> None:
    """What a new process would know."""
    own_code._allowed.clear()


def test_an_own_network_goes_through_all_commands(
    mergerl: Callable[..., Ended], shifts: Path, own: str
) -> None:
    ended = begin(mergerl, shifts, own, "--json", "--searcher", "random")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    mean = torch.tensor(result["coefficients"][0]) @ torch.tensor([[2.0, 1.0], [4.0, 3.0]])
    distance = float((mean - torch.tensor([1.0, 0.0])).square().sum())
    found = result["comparison"]["entries"]
    assert found["result"]["reference"]["mean"] == pytest.approx(distance, abs=0.4)
    assert found["result"]["reference"]["mean"] < found["start"]["reference"]["mean"]
    assert yaml.safe_load(Path("run/config.yaml").read_text())["network"] == f"{own}:network"
    assert json.loads(Path("run/merged/config.json").read_text()) == {"model": f"{own}:network"}
    recipe = yaml.safe_load(Path("run/merged/merge.yaml").read_text())
    assert recipe["search"]["network"] == f"{own}:network"
    ended = mergerl("sample", "run", "--network", f"{own}:network", "--out", "points.png")
    assert "samples of shape [2] are no pictures" in ended.err
    for command, flags in (
        (("evaluate", "run", "--extractor", f"{own}:Points"), ("--num-images", "40")),
        (("inspect", "run/merged"), ()),
        (("merge", "set", "again", "--recipe", "run/merged"), ()),
        (("merge", "set", "out", "--uniform"), ()),
        (("convert", "set", "ckpts"), ()),
    ):
        forget()
        if "--uniform" in command:  # as a set says of itself
            Path("set/config.json").write_text(json.dumps({"model": f"{own}:network"}))
        refused = mergerl(*command, *flags)
        assert refused.code == 1
        assert f"pass --network {own}:network to import it" in refused.err
        ended = mergerl(*command, *flags, "--network", f"{own}:network")
        assert ended.code == 0, ended.err
    odd = mergerl("inspect", "run/merged", "--network", f"{own}:wide")
    assert odd.code == 1
    assert f"not the tensors of the {own}:wide network" in odd.err
    made = [Path(f"{folder}/model.safetensors").read_bytes() for folder in ("run/merged", "again")]
    assert made[0] == made[1]
    loading = f'mrl.load_model("path/to/this/folder", network="{own}:network")'
    assert loading in Path("run/merged/README.md").read_text()
    assert mrl.open_checkpoints("ckpts").config == {"model": f"{own}:network"}


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_push_says_what_loading_takes(
    mergerl: Callable[..., Ended], shifts: Path, own: str, hub: HubServer
) -> None:
    assert begin(mergerl, shifts, own, "--searcher", "uniform").code == 0
    ended = mergerl("push", "run", "me/flow")
    assert f'load it: merge_rl.load_model("me/flow", network="{own}:network")' in ended.out
    assert ended.code == 0
    model = mrl.load_model("me/flow", network=f"{own}:network")
    assert model.state_dict()["shift"].tolist() == [3.0, 2.0]


def test_python_hands_the_factory_over(
    mergerl: Callable[..., Ended], shifts: Path, own: str
) -> None:
    assert begin(mergerl, shifts, own, "--searcher", "uniform").code == 0
    forget()
    with pytest.raises(ConfigError, match=f"the network '{own}:network', a module; pass --network"):
        mrl.load_model("run")
    model = mrl.load_model("run", network=f"{own}:network")
    noise = torch.zeros(3, 2)
    expected = torch.tensor([3.0, 2.0]).expand(3, 2)  # the uniform average of both
    torch.testing.assert_close(mrl.sample(model, noise, num_steps=3), expected)
    forget()
    factory = sys.modules[own].network
    torch.testing.assert_close(
        mrl.sample(mrl.load_model("run", network=factory), noise, num_steps=3), expected
    )


def test_python_is_told_of_all_code_of_a_run_at_once(
    mergerl: Callable[..., Ended], shifts: Path, own: str
) -> None:
    decoder = ("--autoencoder", f"{own}:Twice")
    assert begin(mergerl, shifts, own, "--searcher", "uniform", *decoder).code == 0
    points, network = f"{own}:Points", f"{own}:network"
    flags = {"network": network, "autoencoder": f"{own}:Twice", "extractor": points}
    for given, missing in (
        ({}, list(flags)),
        ({"network": network}, ["autoencoder", "extractor"]),
        ({"reference": "real.pt", "extractor": points}, ["network", "autoencoder"]),
    ):
        forget()
        for name in given.values():
            own_code.allow(name)
        asked = " ".join(f"--{part} {flags[part]}" for part in missing)
        with pytest.raises(ConfigError, match=f"; pass {asked} to import them$"):
            mrl.evaluate("run", num_images=20, **given)  # type: ignore[arg-type]


def test_a_run_goes_on_where_its_code_is_named_again(
    mergerl: Callable[..., Ended], shifts: Path, own: str
) -> None:
    more = ("--searcher", f"{own}:Steps", "--reward", f"{own}:Nearest", "--json",
            "--autoencoder", f"{own}:Twice")  # fmt: skip
    whole = begin(mergerl, shifts, own, *more)
    assert whole.code == 0, whole.err
    lines = Path("run/events.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) > 3
    Path("run/result.json").unlink()
    forget()
    kinds = {"network": "network", "autoencoder": "Twice", "extractor": "Points",
             "searcher": "Steps", "reward": "Nearest"}  # fmt: skip
    named = [f"--{kind} {own}:{name}" for kind, name in kinds.items()]
    for count in (0, 4):  # all that is missing is asked for at once
        refused = mergerl("resume", "run", *" ".join(named[:count]).split())
        forget()
        assert refused.code == 1
        missing = [f"the {k} '{own}:{name}'" for k, name in list(kinds.items())[count:]]
        what, it = ("modules", "them") if count == 0 else ("a module", "it")
        assert (
            f"run names {' and '.join(missing)}, {what}; pass {' '.join(named[count:])} to import "
            f"{it}" in refused.err
        )
    given = " ".join(named).split()
    again = mergerl("resume", "run", "--json", *given)
    assert again.code == 0, again.err
    assert json.loads(again.out)["coefficients"] == json.loads(whole.out)["coefficients"]
    # Twice the points are nearest to (1, 0) where the points are about (0.5, 0).
    rows = torch.tensor(json.loads(whole.out)["coefficients"][0])
    mean = 2 * rows @ torch.tensor([[2.0, 1.0], [4.0, 3.0]])
    start = torch.tensor([8.0, 6.0])
    target = torch.tensor([1.0, 0.0])
    assert float((mean - target).norm()) < 0.5 * float((start - target).norm())


@pytest.mark.parametrize("saved", ["shift", "model.shift", "module.model.shift"])
def test_a_network_may_call_its_parts_as_wrappers_do(
    saved: str, mergerl: Callable[..., Ended], tmp_path: Path, own: str
) -> None:
    torch.save({"model": {saved: torch.ones(2)}}, "0.pt")
    named = ("--network", f"{own}:wrapping")
    kept = saved.removeprefix("module.")
    for out, options, name in (("made", named, "model.shift"), ("plain", (), kept)):
        if "." not in saved and not options:
            continue  # what is no part of a module is taken where it is known
        ended = mergerl("convert", "0.pt", out, *options)
        assert ended.code == 0, ended.err
        (file,) = Path(out).rglob("0.safetensors")
        assert list(load_file(file)) == [name]
        model = mrl.load_model(file, network=f"{own}:wrapping")
        assert model.state_dict()["model.shift"].tolist() == [1, 1]


def test_a_set_is_searched_under_the_names_of_a_network_that_wraps_it(
    mergerl: Callable[..., Ended], shifts: Path, own: str
) -> None:
    ended = begin(mergerl, shifts, own, "--searcher", "uniform", "--network", f"{own}:wrapping")
    assert ended.code == 0, ended.err
    model = mrl.load_model("run", network=f"{own}:wrapping")
    assert model.state_dict()["model.shift"].tolist() == [3.0, 2.0]


TUNING = (
    "--train-steps", "3", "--subsets", "4", "--pool", "40", "--subset", "5", "--refresh", "2",
    "--lr", "0.1", "--eval-steps", "3", "--eval-every", "2", "--eval-images", "20",
    "--final-images", "40", "--repeats", "2", "--set", "curves.ode_solver=euler", "--save-every",
    "1", "--reference", "real.pt", "--ema", "0",
)  # fmt: skip


def test_an_own_network_is_fine_tuned_and_goes_on(
    mergerl: Callable[..., Ended], shifts: Path, own: str
) -> None:
    named = {kind: f"{own}:{name}" for kind, name in (
        ("network", "network"), ("autoencoder", "Twice"), ("extractor", "Points"),
        ("reward", "Nearest"),
    )}  # fmt: skip
    flags = {kind: (f"--{kind}", name) for kind, name in named.items()}
    said = [part for pair in flags.values() for part in pair]
    whole = mergerl("finetune", shifts, *TUNING, *said, "--steps", "2", "--out", "whole", "--json")
    assert whole.code == 0, whole.err
    comparison = json.loads(whole.out)["comparison"]["curves"]["ode-eval"]
    assert comparison["gain"]["low"] > 0
    assert json.loads(Path("whole/final/config.json").read_text()) == {"model": named["network"]}
    assert mergerl("finetune", shifts, *TUNING, *said, "--steps", "1", "--out", "part").code == 0
    settings = Path("part/finetune.yaml")
    settings.write_text(settings.read_text().replace("steps: 1\n", "steps: 2\n", 1))
    commands = {
        ("resume", "part"): ("network", "autoencoder", "extractor", "reward"),
        ("evaluate", "part", "--num-images", "40"): ("extractor", "network", "autoencoder"),
        ("optimize", "part", *SMALL, "--searcher", "uniform", "--out", "merged"): (
            "extractor",
            "autoencoder",
            "network",
        ),
    }
    for command, kinds in commands.items():
        given: list[str] = []
        for kind in kinds:
            forget()
            refused = mergerl(*command, *given)
            assert refused.code == 1
            assert f"--{kind} {named[kind]}" in refused.err
            given += flags[kind]
        if command[0] != "optimize":  # a search with these is tried above
            ended = mergerl(*command, *given)
            assert ended.code == 0, ended.err
    card = Path("whole/final/README.md").read_text()
    assert f'mrl.load_model("path/to/this/folder", network="{named["network"]}")' in card
    assert "the network's own names and shapes" in card
    assert f"- {named['network']}" not in card  # which is no tag
    weights = [Path(f"{run}/final/model.safetensors").read_bytes() for run in ("whole", "part")]
    assert weights[0] == weights[1]


def test_python_fine_tunes_a_network_by_its_factory(shifts: Path, own: str) -> None:
    module = own_code.find(f"{own}:network", "network").__globals__
    forget()
    factory = module["network"]
    config = small_config(shifts, reward={"pool_size": 20}, update={"learning_rate": 0.1})
    result = mrl.finetune(
        shifts, out="run", config=config, network=factory, extractor=module["Points"](),
        reference="real.pt", progress=False,
    )  # fmt: skip
    start, end = (mrl.load_model(place, network=factory) for place in (shifts, result.model_path))
    assert not torch.equal(start.state_dict()["shift"], end.state_dict()["shift"])
    assert isinstance(mrl.resume("run", progress=False), mrl.FinetuneResult)  # it has ended


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"network": "missing"}, "network 'OWN:missing': cannot be imported"),
        ({"network": "nothing"}, "network 'OWN:nothing': expected a torch module, got dict"),
        ({"network": "unstated"}, "network 'OWN:unstated' does not state its prediction"),
        (
            {"network": "wide"},
            "not the tensors of the network: 1 differ, first 'other': found missing",
        ),
        ({"extractor": "Twice"}, "extractor 'OWN:Twice': expected an object with 'name'"),
        ({"autoencoder": "nothing"}, "autoencoder 'OWN:nothing': expected a method `decode`"),
        ({"searcher": "Lazy"}, "searcher 'OWN:Lazy': Lazy lacks ask, tell, mean, recenter"),
        ({"searcher": "nothing"}, "searcher 'OWN:nothing': calling it with"),
        ({"reward": "nothing"}, "reward 'OWN:nothing': calling it with its source failed"),
        ({"reward": "Short"}, r"reward 'OWN:Short' returned \(1,\), expected a tensor"),
        ({"reward": "Far"}, "reward 'OWN:Far' returned NoneType, expected a distance, a number"),
        ({"network": "a/b"}, "expected a network as package.module:factory"),
        ({"network": "one"}, "expected a factory, found an object of Shift, which takes something"),
        ({"network": "ends"}, r"OWN:ends': calling it .*: it ends the program \(exit code 3\)"),
        ({"extractor": "Raising"}, r"OWN.py, line \d+, in __call__: ValueError: no such point"),
        ({"autoencoder": "First"}, r"OWN:First' returned float32 \(1, 2\) for samples \("),
    ],
)
def test_code_that_cannot_be_used_is_refused_in_a_sentence(
    change: dict[str, str], sentence: str, mergerl: Callable[..., Ended], shifts: Path, own: str
) -> None:
    more = [part for kind, name in change.items() for part in (f"--{kind}", f"{own}:{name}")]
    if "searcher" not in change:
        more += [
            "--searcher",
            "random",
            *([] if "reward" in change else ["--reward", "fid-subset"]),
        ]
    ended = begin(mergerl, shifts, own, *more)
    assert ended.code == 1
    assert_one_sentence(ended, sentence.replace("OWN", own))
    if change.get("network") in ("missing", "nothing", "unstated"):  # no fault of the files
        looked = mergerl("inspect", shifts, *more[:2])
        assert (looked.code, looked.out) == (1, "")
        assert_one_sentence(looked, sentence.replace("OWN", own))
    late = {"Short", "Far", "Raising", "First"} & set(change.values())  # found in the first round
    assert late or not Path("run").exists()


@pytest.mark.parametrize("file", ["./flow.py", "flow.py", "/nets/flow.py"])
def test_a_file_in_the_place_of_a_module_is_told_what_it_is_called(file: str) -> None:
    expected = (
        rf"expected a network as package.module:factory \(flow:make of flow.py\), got '{file}"
    )
    with pytest.raises(ConfigError, match=expected):
        own_code.find(f"{file}:make", "network")


def test_shapes_of_an_own_network_cost_its_module_no_numbers(own: str) -> None:
    """What it makes on import, or keeps for later, is used by the network that is sampled."""
    own_code.allow(f"{own}:stepped")
    built = registry.build_on_meta({"model": f"{own}:stepped"})
    assert {name: value.is_meta for name, value in built.state_dict().items()} == {"shift": True}
    again = registry.build_model({"model": f"{own}:stepped"})
    assert again.last == pytest.approx(0.5)
    assert again.noise_levels is not None


def test_an_own_network_of_another_type_is_one_of_float32() -> None:
    class Half(torch.nn.Linear):
        def forward(self, input: torch.Tensor, *_t: torch.Tensor) -> torch.Tensor:
            if input.dtype != self.weight.dtype:
                raise TypeError(f"{input.dtype} meets {self.weight.dtype}")
            return super().forward(input)

    def network() -> torch.nn.Module:
        made = Half(2, 2, bias=False).bfloat16()
        return mrl.describe(made, prediction="noise", time="sigma", sample_shape=[2])

    built = registry.build_model({"model": own_code.allow(network)})
    assert {tensor.dtype for tensor in built.state_dict().values()} == {torch.float32}
    require_call(built)
    other = mrl.describe(Half(2, 2).double(), prediction="noise", time="sigma", sample_shape=[2])
    with pytest.raises(
        ConfigError, match="the network Half, in float32, with x .* failed: TypeErr"
    ):
        require_call(other)


def test_weights_beside_an_own_network_guide_it(shifts: Path, own: str) -> None:
    """They say nothing of what they are; the user has."""
    named = f"{own}:network"
    own_code.allow(named)
    network = registry.build_model({"model": named})
    sampler = mrl.SamplerConfig(guide=str(shifts / "step_0.safetensors"))
    guide = load_guide(sampler, "cpu", network)
    assert guide is not None
    assert guide.state_dict()["shift"].tolist() == [2.0, 1.0]
    merged = open_guide(mrl.SamplerConfig(guide=str(shifts)), network)
    assert merged.config == {"model": named}
    with pytest.raises(CheckpointError, match="the model config is not known"):
        load_guide(sampler, "cpu", torch.nn.Linear(1, 1))


def test_a_guide_of_another_network_of_the_users_is_named(
    shifts: Path, own: str, tmp_path: Path
) -> None:
    folder = tmp_path / "guide"
    for k in range(2):
        save_checkpoint(folder / f"step_{k}.safetensors", {"model.shift": torch.ones(2) * k})
    (folder / "config.json").write_text(json.dumps({"model": f"{own}:wrapping"}))
    own_code.allow(f"{own}:network")
    network = registry.build_model({"model": f"{own}:network"})
    said = mrl.SamplerConfig(guide=str(folder), guide_network=f"{own}:wrapping")
    one = dataclasses.replace(said, guide=str(folder / "step_1.safetensors"))
    told = f"names the network '{own}:wrapping', a module; pass --guide-network {own}:wrapping to"
    for sampler in (one, dataclasses.replace(one, guide_network=None)):
        with pytest.raises(ConfigError, match=told):
            load_guide(sampler, "cpu", network)
    with pytest.raises(ConfigError, match=told):
        open_guide(said, network)
    assert mrl.OptimizeConfig(checkpoints=str(shifts), sampler=said).sampler == said
    own_code.allow(f"{own}:wrapping")
    guide = load_guide(one, "cpu", network)
    assert guide is not None
    assert guide.state_dict()["model.shift"].tolist() == [1.0, 1.0]
    assert open_guide(said, network).config == {"model": f"{own}:wrapping"}


def assert_one_sentence(ended: Ended, pattern: str) -> None:
    import re

    last: Any = ended.err.strip().splitlines()[-1]
    assert last.startswith("error:")
    assert re.search(pattern, last), last
    assert "unexpected" not in last
