"""Settings: to YAML and back, and a refusal for everything that cannot work."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from merge_rl.config.commands import EvaluateConfig, SampleConfig
from merge_rl.config.finetune import CurveConfig, FinetuneConfig
from merge_rl.config.mapping import (
    changed,
    dump_config,
    from_mapping,
    load_config,
    recipe_names,
    to_mapping,
)
from merge_rl.config.named import with_settings
from merge_rl.config.optimize import (
    AUTO_BATCH,
    EvaluationConfig,
    MergeConfig,
    OptimizeConfig,
    RewardConfig,
    SearchConfig,
)
from merge_rl.config.sampler import SamplerConfig
from merge_rl.config.setting import at_home
from merge_rl.config.training import RolloutConfig
from merge_rl.errors import ConfigError, UnknownNameError

# Every value differs from its default, so that a field that is dropped on the way is noticed.
SAMPLER = SamplerConfig(
    solver="euler", num_steps=7, sigma_min=0.01, sigma_max=40.0, rho=5.5, guidance=1.4,
    guide="g/x", path="gvp", diffusion="linear", diffusion_norm=2.0, last_step="tweedie",
    last_step_size=0.125, sde_num_steps=77, rtol=1e-4, atol=1e-7, guidance_channels=None,
    guide_network="g.n:f",
    low_memory=True, precision="bfloat16", compile=True, levels="edm",
    guidance_interval=(0.25, 1.5), guidance_ends="shared",
)  # fmt: skip
MERGE = MergeConfig(
    grouping="blocks", map="softmax", start="uniform", scale=0.125, max_abs=3.5, l2=0.25,
    freeze=(r"\.out_", "^emb"), groups={"enc": r"\.enc\.", "später": "^dec: '#"},
)  # fmt: skip
REWARD = RewardConfig(
    name="other", pool_size=300, subset_size=40, num_subsets=2, num_replacements=3, refresh="4",
    refresh_size=17, max_gap=0.3,
)  # fmt: skip
SEARCH = SearchConfig(
    box=2.5,
    name="other", policy="mlp", population=6, antithetic=False, std=0.5, learn_std=True,
    learning_rate=1e-05, std_learning_rate=0.125, betas=(0.25, 0.75), decay=0.5, min_decay=0.25,
    top_fraction=0.3, clip=math.inf, epochs=4, update="adam", momentum=0.25, width_rate=0.5,
    shaping="rank", start_share=0.125, final_share=0.25, incumbents=2, tune=("guidance",),
)  # fmt: skip
EVALUATION = EvaluationConfig(
    num_images=60, repeats=5, selection_images=30, share=0.25, reserved=70, keep_worse=True
)
OPTIMIZE = OptimizeConfig(
    checkpoints="a b: c", track="0.05", select=("x", "y"), extractor="e",
    extractor_weights="w", reference="r",
    heldout="h", autoencoder="sd-vae-sit", autoencoder_weights="v", autoencoder_dtype="bfloat16",
    extra_references={"dinov2": "d: r"}, extra_weights={"a.b:c": "x=y"}, budget=12345, seed=-3,
    batch=9, device="cuda:1", sampler=SAMPLER, merge=MERGE, reward=REWARD, search=SEARCH,
    weights_device="disk", licence="MIT", evaluation=EVALUATION, rules=1, network="n.m:f",
    generate="g.m:f", num_classes=7,
)  # fmt: skip
CONFIGS: list[Any] = [SAMPLER, MERGE, REWARD, SEARCH, EVALUATION, OPTIMIZE]
CONFIGS += [OptimizeConfig(checkpoints="x"), MergeConfig(), SearchConfig()]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_yaml_round_trip(config: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(type(config), path) == config


@pytest.mark.parametrize("config", CONFIGS[:6], ids=lambda c: type(c).__name__)
def test_the_examples_leave_no_default(config: Any) -> None:
    for item in dataclasses.fields(config):
        if item.default is not dataclasses.MISSING:
            assert getattr(config, item.name) != item.default, item.name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_configs_are_frozen_and_keyword_only(config: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    with pytest.raises(TypeError, match="positional"):
        type(config)("x")


def test_mappings_are_plain_data() -> None:
    values = to_mapping(OPTIMIZE)
    assert values["search"]["betas"] == [0.25, 0.75]
    assert values["merge"]["groups"] == MERGE.groups
    assert values["sampler"]["guide"] == "g/x"
    assert to_mapping(OptimizeConfig(checkpoints="x"))["sampler"] is None
    values["merge"]["groups"]["new"] = "y"
    assert "new" not in MERGE.groups


def test_nested_types_are_restored() -> None:
    found = from_mapping(OptimizeConfig, to_mapping(OPTIMIZE))
    assert found == OPTIMIZE
    assert isinstance(found.search.betas, tuple)
    # A whole number is a number.
    assert type(from_mapping(SamplerConfig, {"rho": 7}).rho) is float
    assert from_mapping(SearchConfig, {"betas": [0, 0.5]}).betas == (0.0, 0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"buget": 5}, r"unknown setting in config 'buget'; did you mean 'budget'\?"),
        ({"reward": {"poolsize": 5}}, r"setting in config.reward 'poolsize'; .* 'pool_size'"),
        ({"sampler": {"steps": 5}}, r"setting in config.sampler 'steps'; did you mean 'num_steps'"),
        ({3: 5}, r"unknown setting in config '3' \(known: autoencoder, "),
    ],
)
def test_unknown_keys(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        from_mapping(OptimizeConfig, {"checkpoints": "x", **values})


def test_forms_that_yaml_reads_otherwise_are_taken() -> None:
    # YAML 1.1 reads 1e-3 as text and 10 as a number.
    values = {"search": {"learning_rate": "1e-3"}, "reward": {"refresh": 10}, "budget": "1e5"}
    config = from_mapping(OptimizeConfig, {"checkpoints": "x", **values})
    assert config.search.learning_rate == 0.001
    assert config.reward.refresh == "10"
    assert config.budget == 100_000


def test_auto_is_taken_for_the_batch_wherever_settings_are_said() -> None:
    assert from_mapping(OptimizeConfig, {"checkpoints": "x", "batch": "auto"}).batch == AUTO_BATCH
    assert with_settings(OptimizeConfig, None, batch="auto").batch == AUTO_BATCH


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": "many"}, r"config.budget: expected int, found str 'many'"),
        ({"budget": 2.5}, r"config.budget: expected int, found float 2.5"),
        ({"budget": True}, r"config.budget: expected int, found bool True"),
        ({"decay": 0.5}, r"unknown setting in config 'decay'; did you mean 'search.decay'\?"),
        ({"solver": "heun"}, r"'solver'; did you mean 'sampler.solver'\?"),
        ({"batch": "many"}, r"config.batch: expected int or auto, found str 'many'"),
        ({"budget": None}, r"config.budget: expected int, found nothing$"),
        ({"device": 0.5}, r"config.device: expected str, found float 0.5"),
        ({"track": 0.05}, r"config.track: expected str, found float 0.05"),
        ({"sampler": {"rho": True}}, r"config.sampler.rho: expected float, found bool True"),
        ({"sampler": {"rho": "x7"}}, r"config.sampler.rho: expected float, found str 'x7'"),
        ({"sampler": [7]}, r"config.sampler: expected a mapping, found list"),
        ({"reward": None}, r"config.reward: expected a mapping, found nothing$"),
        ({"search": {"antithetic": 1}}, r"config.search.antithetic: expected bool, found int 1"),
        ({"search": {"betas": 0.5}}, r"config.search.betas: expected a list of float, found float"),
        ({"search": {"betas": ["a", 0]}}, r"config.search.betas: expected float, found str 'a'"),
        (
            {"merge": {"groups": ["a"]}},
            r"merge.groups: expected a mapping of names to str, found l",
        ),
        (
            {"merge": {"groups": "a"}},
            r"merge.groups: expected a mapping of names to str, found str",
        ),
        ({"merge": {"freeze": {"a": "b"}}}, r"merge.freeze: expected a list of str, found dict"),
        ({"merge": {"groups": {"a": [1]}}}, r"config.merge.groups.a: expected str, found list"),
    ],
)
def test_wrong_types(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(OptimizeConfig, {"checkpoints": "x", **values})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needy:
    """Settings that do not all have a default."""

    path: str
    count: int = 3


def test_missing_setting() -> None:
    assert from_mapping(Needy, {"path": "x"}) == Needy(path="x")
    with pytest.raises(ConfigError, match=r"run: 'path' is missing"):
        from_mapping(Needy, {"count": 5}, "run")


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (SamplerConfig, {"num_steps": 0}, "expected num_steps >= 1, got 0"),
    (SamplerConfig, {"sde_num_steps": 1}, "expected sde_num_steps >= 2, got 1"),
    (SamplerConfig, {"guidance": -0.5, "guide": "g"}, "expected guidance >= 0, got -0.5"),
    (SamplerConfig, {"guidance": math.nan, "guide": "g"}, "expected guidance >= 0, got nan"),
    (SamplerConfig, {"guidance_channels": 0}, r"guidance_channels >= 1 or null \(all\), got 0"),
    (SamplerConfig, {"diffusion_norm": -1.0}, "diffusion_norm finite and >= 0, got -1.0"),
    (SamplerConfig, {"diffusion_norm": math.inf}, "diffusion_norm finite and >= 0, got inf"),
    (SamplerConfig, {"last_step_size": 0.0}, r"last_step_size in \(0, 1\), got 0.0"),
    (SamplerConfig, {"last_step_size": 1.0}, r"last_step_size in \(0, 1\), got 1.0"),
    (SamplerConfig, {"rtol": 0.0}, "rtol > 0, got 0.0"),
    (SamplerConfig, {"atol": math.nan}, "atol > 0, got nan"),
    (SamplerConfig, {"path": "Linear"}, "unknown path 'Linear'; did you mean 'linear'"),
    (SamplerConfig, {"diffusion": "SBDM"}, r"unknown diffusion 'SBDM' \(known: .*sbdm"),
    (SamplerConfig, {"last_step": "twedie"}, "unknown last_step 'twedie'; did you mean 'tweedie'"),
    (SamplerConfig, {"precision": "float16"}, "unknown precision 'float16'; .* 'bfloat16'"),
    (MergeConfig, {"scale": 0.0}, "expected scale finite and > 0, got 0.0"),
    (MergeConfig, {"scale": math.inf}, "expected scale finite and > 0, got inf"),
    (RewardConfig, {"pool_size": 1}, "expected pool_size >= 2, got 1"),
    (RewardConfig, {"subset_size": 0}, "expected subset_size >= 1, got 0"),
    (
        RewardConfig,
        {"pool_size": 100, "subset_size": 101},
        "the subset of 101 images is larger than the pool of 100; expected subset_size <= pool_siz",
    ),
    (RewardConfig, {"num_subsets": 0}, "expected num_subsets >= 1, got 0"),
    (RewardConfig, {"num_replacements": 0}, "expected num_replacements >= 1, got 0"),
    (RewardConfig, {"max_gap": 0.0}, "expected max_gap > 0, got 0.0"),
    (RewardConfig, {"refresh": "0"}, r'expected refresh "rolling" or a number .* >= 1, got \'0\''),
    (RewardConfig, {"refresh": "often"}, "a number of rounds >= 1, got 'often'"),
    (RewardConfig, {"refresh": "²"}, "a number of rounds >= 1, got '²'"),
    (RewardConfig, {"refresh_size": 0}, r"expected refresh_size in 1\.\.5000, got 0"),
    (RewardConfig, {"refresh_size": 5001}, r"expected refresh_size in 1\.\.5000, got 5001"),
    (SearchConfig, {"population": 0}, "expected population >= 1, got 0"),
    (SearchConfig, {"update": "adm"}, "unknown update 'adm'; did you mean 'adam'"),
    (SearchConfig, {"shaping": "ranks"}, "unknown shaping 'ranks'; did you mean 'rank'"),
    (SearchConfig, {"width_rate": -0.1}, "expected width_rate finite and >= 0, got -0.1"),
    (SearchConfig, {"momentum": 1.0}, r"expected momentum in \[0, 1\), got 1.0"),
    (SearchConfig, {"final_share": 0.5}, r"expected final_share in \[0, 0.5\), got 0.5"),
    (SearchConfig, {"incumbents": -1}, "expected incumbents >= 0, got -1"),
    (OptimizeConfig, {"checkpoints": "x", "rules": 4}, r"expected rules of a run in 1\.\.3, got 4"),
    (MergeConfig, {"max_abs": 0.0}, "expected max_abs finite and > 0, got 0.0"),
    (MergeConfig, {"l2": -1.0}, "expected l2 finite and >= 0, got -1.0"),
    (SearchConfig, {"box": 0.0}, "expected box finite and > 0, got 0.0"),
    (SearchConfig, {"std": 0.0}, "expected std finite and > 0, got 0.0"),
    (SearchConfig, {"std": math.inf}, "expected std finite and > 0, got inf"),
    (SearchConfig, {"learning_rate": 0.0}, "expected learning_rate finite and > 0, got 0.0"),
    (SearchConfig, {"learning_rate": math.nan}, "expected learning_rate finite and > 0, got nan"),
    (SearchConfig, {"std_learning_rate": -1.0}, "expected std_learning_rate finite and > 0, got"),
    (SearchConfig, {"decay": 0.0}, r"expected decay in \(0, 1\], got 0.0"),
    (SearchConfig, {"decay": 1.1}, r"expected decay in \(0, 1\], got 1.1"),
    (SearchConfig, {"min_decay": 0.0}, r"expected min_decay in \(0, 1\], got 0.0"),
    (SearchConfig, {"top_fraction": 0.0}, r"expected top_fraction in \(0, 1\], got 0.0"),
    (SearchConfig, {"clip": 0.0}, "expected clip > 0, got 0.0"),
    (SearchConfig, {"epochs": 0}, "expected epochs >= 1, got 0"),
    (SearchConfig, {"betas": (0.5, 1.0)}, r"expected betas two numbers in \[0, 1\), got \(0.5, 1"),
    (SearchConfig, {"betas": (0.5,)}, r"expected betas two numbers in \[0, 1\), got \(0.5,\)"),
    (EvaluationConfig, {"num_images": 1}, "expected num_images >= 2, got 1"),
    (EvaluationConfig, {"num_images": 10**9 // 4 + 1}, "expected repeats times num_images <= 1000"),
    (EvaluationConfig, {"selection_images": 10**9 + 1}, "expected selection_images <= 1000000000"),
    (CurveConfig, {"num_images": 2**63}, "expected num_images <= 1000000000 images, got 92233720"),
    (CurveConfig, {"repeats": 10**6}, "expected repeats times final_images <= 1000000000 images"),
    (SampleConfig, {"num_images": 2**62}, "expected num_images <= 1000000000 images, got 46116"),
    (EvaluateConfig, {"repeats": 10**9, "num_images": 2}, "times num_images <= 1000000000 images"),
    (EvaluationConfig, {"repeats": 2}, "expected repeats >= 3, got 2"),
    (EvaluationConfig, {"selection_images": 1}, "expected selection_images >= 2, got 1"),
    (OptimizeConfig, {"checkpoints": "x", "budget": 0}, "expected budget >= 1 image, got 0"),
    (OptimizeConfig, {"budget": 10**9 + 1}, "expected budget <= 1000000000 images, got 1000000001"),
    (SamplerConfig, {"num_steps": 100_001}, "expected num_steps <= 100000, got 100001"),
    (OptimizeConfig, {"checkpoints": "x", "batch": 0}, "expected batch >= 1, got 0"),
]


@pytest.mark.parametrize(("cls", "values", "message"), REFUSED)
def test_refusals(cls: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls(**values)


def test_limits_are_allowed() -> None:
    whole = RewardConfig(pool_size=100, subset_size=100, refresh_size=100)
    assert whole.rolling_size == whole.images_per_candidate == 100
    loose = SearchConfig(
        decay=1.0, min_decay=1.0, top_fraction=1.0, clip=math.inf, betas=(0.0, 0.0)
    )
    assert loose.clip == math.inf
    assert SamplerConfig(num_steps=1, guidance=0.0, diffusion_norm=0.0).guidance == 0.0


def test_images_a_reward_costs() -> None:
    assert REWARD.images_per_candidate == 2 * 3 * 40
    # Every fourth round, counted from 0, the whole pool.
    assert [REWARD.refresh_images(i) for i in range(9)] == [0, 0, 0, 300, 0, 0, 0, 300, 0]
    rolling = RewardConfig(pool_size=300, subset_size=5)
    assert rolling.rolling_size == 30  # a tenth of the pool
    assert dataclasses.replace(rolling, subset_size=40).rolling_size == 160  # four candidates
    assert dataclasses.replace(rolling, subset_size=80).rolling_size == 300  # all of it
    assert [rolling.refresh_images(i) for i in range(3)] == [30, 30, 30]
    assert dataclasses.replace(rolling, refresh_size=17).refresh_images(5) == 17


@pytest.mark.parametrize(
    "text",
    [
        "checkpoints: !!python/object/apply:os.getcwd []",
        "checkpoints: !!python/name:os.getcwd",
        "checkpoints: !!python/tuple [a]",
        "checkpoints: !custom x",
        "checkpoints: [unclosed",
        "checkpoints: 2024-99-99",
        "a: " + "[\n" * 2000,
        "checkpoints: x\n\tbudget: 5",
    ],
)
def test_yaml_that_is_not_plain(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run.yaml: not readable YAML: "):
        load_config(OptimizeConfig, path)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text", "3"])
def test_yaml_that_is_no_mapping(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run.yaml: expected a mapping, found"):
        load_config(OptimizeConfig, path)


def test_recipes_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"digits", "digits-sit", "finetune-digits-sit"} <= set(recipe_names())
    for name in recipe_names():
        kind: type[Any] = FinetuneConfig if name.startswith("finetune") else OptimizeConfig
        assert load_config(kind, Path(name)).seed == 0, name
    with pytest.raises(UnknownNameError, match="'digit'; did you mean 'digits'"):
        load_config(OptimizeConfig, Path("digit"))
    # A file of that name is meant, where there is one; a folder has no settings in it.
    (tmp_path / "digits").mkdir()
    assert load_config(OptimizeConfig, Path("digits")).track == "raw"
    (tmp_path / "digits").rmdir()
    (tmp_path / "digits").write_text("checkpoints: mine\n", encoding="utf-8")
    assert str(load_config(OptimizeConfig, Path("digits")).checkpoints) == "mine"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe: expected a file, found a pipe"):
        load_config(OptimizeConfig, Path("pipe"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.yaml: no such file"):
        load_config(OptimizeConfig, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="expected a file, found a folder"):
        load_config(OptimizeConfig, tmp_path)
    (tmp_path / "latin.yaml").write_bytes("checkpoints: über".encode("latin-1"))
    told = r"latin.yaml: expected text, found bytes that are not UTF-8 \(byte 13\)"
    with pytest.raises(ConfigError, match=told):
        load_config(OptimizeConfig, tmp_path / "latin.yaml")


def test_the_home_folder_is_known_where_no_shell_puts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    said = {"checkpoints": "~/ckpts", "extra_weights": {"a": "~/a.pt"}, "select": ["~/x", "y~/z"]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
    read = load_config(OptimizeConfig, tmp_path / "run.yaml")
    assert (read.checkpoints, read.extra_weights) == ("/home/me/ckpts", {"a": "/home/me/a.pt"})
    assert read.select == ("/home/me/x", "y~/z")
    assert at_home("key=~/a/") == "key=/home/me/a/"
    words = ["--out=~/a", "sampler.guide=~/b c", "~", "a=b=~/c", "~/d\ne", "~you/f", ""]
    assert at_home(words) == [
        "--out=/home/me/a", "sampler.guide=/home/me/b c", "~", "a=b=~/c", "/home/me/d\ne", "~you/f",
        "",
    ]  # fmt: skip


def test_a_refusal_in_a_file_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("checkpoints: x\nreward:\n  pool_size: big\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run.yaml.reward.pool_size: expected int, found str"):
        load_config(OptimizeConfig, path)


@pytest.mark.parametrize(
    ("name", "distance"),
    [
        (None, "FID"), ("fd-dinov2-subset", "FID"), ("kid-subset", "KID"), ("mmd-subset", "MMD"),
        ("fd-mean:inception,dinov2", "fd-mean"), ("fid-subset + 0.2 * kid-subset", "distance"),
        ("0.5 * fid-subset", "distance"), ("mine.rewards:Sharp", "distance"),
    ],
)  # fmt: skip
def test_what_the_distance_of_a_pool_is_called(name: str | None, distance: str) -> None:
    assert RewardConfig(name=name).distance == distance


def test_a_gradient_through_rollouts_needs_few_sets_of_images() -> None:
    def made(algorithm: str, subsets: int | None = None) -> float:
        rollout = RolloutConfig(subsets=subsets)
        config = FinetuneConfig(model="x", algorithm=algorithm, rollout=rollout)
        return config.images_per_step / config.reward.images_per_subset

    assert [made("pg"), made("rs"), made("pathwise"), made("pathwise", 5)] == [16, 16, 2, 5]


def test_what_changed_between_two_documents() -> None:
    before = {"seed": 1, "sampler": {"path": "linear", "num_steps": 8}, "gone": None}
    assert changed(before, {"seed": 1, "sampler": {"path": "own", "num_steps": 8}}) == {}
    now = {"seed": 2, "sampler": {"path": "gvp", "num_steps": 8}, "new": True}
    assert changed(before, now) == {
        "seed": (1, 2), "sampler.path": ("linear", "gvp"), "new": (None, True),
    }  # fmt: skip
    assert changed({"path": "linear"}, {"path": "own"}) == {"path": ("linear", "own")}
