"""The configuration: what may be set, how it is checked, and that it runs again."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from itertools import cycle
from pathlib import Path

import pytest

from mil.config.compose import compose_config
from mil.config.options import OPTIMIZERS, RECIPES, SCHEDULERS, TASK_LOSSES
from mil.config.overrides import take_overrides
from mil.config.sections import HeadConfig, LossConfig, OptimizerConfig, SchedulerConfig
from mil.config.train import TrainConfig
from mil.errors import ConfigError


def test_nothing_given_is_the_defaults() -> None:
    assert compose_config() == TrainConfig()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["head=transformer", "optimizer=sgd", "scheduler=constant", "seeds=[4,2]", "instance_budget=null"],
        ["standardize=none", "head.input_norm=layer", "grad_clip=null"],
        ["target='1e-4'", "labels='/a b/ü,ö.csv'", "backbone='001'", "slide_column=null"],
        ["optimizer.betas=[0.8,0.99]", "accumulate=2", "ema=0.9", "init=a.safetensors", "freeze_epochs=2", "l1=1e-4"],
        *[
            [f"optimizer={a}", f"scheduler={b}", f"loss={c}"]
            for a, b, c in zip(OPTIMIZERS, cycle(SCHEDULERS), cycle(TASK_LOSSES["classification"]))
        ],
        ["recipe=strong"],
        ["recipe=clam_official"],
    ],
)
def test_a_saved_config_composes_to_itself(overrides: list[str], tmp_path: Path) -> None:
    config = compose_config(overrides)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert compose_config([], file) == config


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("epochs: 7\npatience: 3\nfolds: 4\noptimizer: {lr: 1e-3}\nhead: {name: mean, dropout: 0.5}\n")
    config = compose_config(["patience=4", "folds=3"], file, {"folds": 2})
    assert (config.epochs, config.patience, config.folds) == (7, 4, 2)
    assert config.optimizer == OptimizerConfig(lr=1e-3)
    assert (config.head.name, config.head.keywords["dropout"]) == ("mean", 0.5)


def test_another_head_does_not_inherit_the_files_keywords(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("head: {name: abmil, gated: false, dropout: 0.5}\n")
    assert compose_config(["head=mean"], file).head == compose_config(["head=mean"]).head
    assert compose_config(["head=abmil"], file).head.keywords["gated"] is False


def test_values_are_taken_as_they_are() -> None:
    config = compose_config(
        ["optimizer=sgd"],
        values={"target": "HER2(+), {x}=1", "head": "mean", "optimizer": {"lr": 1}, "seeds": [3], "store": "a b.zarr"},
    )
    assert config.target == "HER2(+), {x}=1"
    assert config.head.name == "mean"
    assert (config.optimizer.name, config.optimizer.lr) == ("sgd", 1.0)
    assert (config.seeds, config.store) == ((3,), Path.cwd() / "a b.zarr")
    assert compose_config(values={"head": {"name": "mean", "dropout": 0.1}}).head.keywords["dropout"] == 0.1


def test_widths_are_a_list_of_whole_numbers_that_may_repeat() -> None:
    for text, widths in (("[64,64]", (64, 64)), ("[]", ()), ("[0]", (0,))):
        assert compose_config(["head=chowder", f"head.hidden_dims={text}"]).head.keywords["hidden_dims"] == widths
    for text, names in (("64", ["head.hidden_dims=64", "a list", "[64]"]), ("[6.5]", ["6.5", "a whole number"])):
        with pytest.raises(ConfigError) as caught:
            compose_config(["head=chowder", f"head.hidden_dims={text}"])
        assert all(name in str(caught.value) for name in names), caught.value


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("epoch=3", ["one of epochs, ", "did you mean 'epochs'", "… (mil config show lists all)"]),
        ("lr=0.1", ["did you mean optimizer.lr"]),
        ("head.dropot=0.1", ["did you mean 'head.dropout'"]),
        ("head=abml", ["head=abml → expected one of head=abmil, ", "did you mean 'abmil'", "--options lists all"]),
        ("optimizer=adm", ["did you mean 'adam'", "optimizer=adamw"]),
        ("optimizer=lookahed_lion", ["did you mean 'lookahead_lion'"]),
        ("optimizer.momentum=0.9", ["optimizer.momentum for optimizer=adamw", "a key of", "sgd", "optimizer.betas"]),
        ("optimizer.betas=[0.9,1]", ["optimizer.betas=1.0", "below 1"]),
        ("optimizer.betas=[0.9]", ["2 values", "[0.9,0.9]"]),
        ("optimizer.betas=0.9", ["a list"]),
        ("optimizer.weight_decay=-1", ["at least 0"]),
        ("scheduler=cosin", ["did you mean 'cosine'"]),
        ("scheduler.factor=0.1", ["scheduler.factor", "scheduler.warmup_fraction"]),
        ("scheduler.warmup_fraction=1", ["below 1"]),
        ("loss=focl", ["did you mean 'focal'", "expected one of loss=focal, "]),
        ("loss.gamma=1", ["loss.gamma", "a key of focal → take loss=focal", "loss.label_smoothing"]),
        ("loss.label_smoothing=1", ["below 1"]),
        ("sampler=class_balance", ["did you mean 'class_balanced'", "sampler=natural"]),
        ("accumulate=0", ["at least 1"]),
        ("instance_dropout=1", ["below 1"]),
        ("instance_dropot=0.1", ["did you mean 'instance_dropout'"]),
        ("grad_clip_value=0", ["above 0"]),
        ("l1=-0.1", ["at least 0"]),
        ("ema=1", ["above 0 and below 1"]),
        ("ema=0", ["above 0"]),
        ("min_epochs=0", ["at least 1"]),
        ("freeze_epochs=-1", ["at least 0"]),
        ("freeze_epochs=1", ["without init", "add init="]),
        ("freeze_lr_factor=0", ["above 0 and at most 1"]),
        ("recipe=fas", ["did you mean 'fast'", "recipe=strong"]),
        ("recip=fast", ["did you mean 'recipe'"]),
        ("+recipe=fast", ["that exists"]),
        ("standardize=tran", ["standardize=train"]),
        ("epochs=0", ["epochs=0", "at least 1"]),
        ("epochs=2.5", ["whole number"]),
        ("epochs=true", ["whole number"]),
        ("epochs=${folds}", ["whole number"]),
        ("validation_fraction=1", ["below 1"]),
        ("optimizer.lr=0", ["above 0"]),
        ("optimizer.lr=nan", ["finite"]),
        ("optimizer.lr=inf", ["finite"]),
        ("head.dropout=much", ["head.dropout='much'", "a number"]),
        ("target=1", ["quote it"]),
        ("seeds=[1,1]", ["different seeds"]),
        ("head.branches=[2]", ["head.branches=[2]", "a whole number"]),
        ("seeds=0", ["how many seeds"]),
        ("device=gpu", ["auto, cpu, cuda"]),
        ("epochs=1,2", ["one value"]),
        ("+extra=1", ["that exists"]),
        ("~epochs", ["that exists"]),
        ("head@head2=mean", ["that exists"]),
        ("hydra.run.dir=x", ["hydra.run.dir"]),
        ("_target_=os.system", ["_target_"]),
        ("head.name=mean", ["head.name"]),
        ("epochs", ["group=option"]),
        ("head.input_norm=layer", ["standardize=none"]),
    ],
)
def test_a_wrong_override_says_what_is_wrong_and_what_is_right(override: str, names: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config([override])
    assert all(name in str(caught.value) for name in names), caught.value
    assert str(caught.value).count("→") == 2


def test_an_unknown_key_names_its_neighbours_and_no_others() -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config(["epoch=3"])
    assert str(caught.value).partition(" → did you")[0].count(", ") == 8


def test_a_key_of_other_heads_says_whose_it_is() -> None:
    wrong = (["head=mean", "head.gated=true"], ["head=max", "head.mask_top=1"], ["head=mean", "head.gatd=true"])
    expected = (
        "got the unknown key head.gated for head=mean → a key of abmil, clam_mb, clam_sb → take head=abmil, or a key "
        "of mean: head.embed_dim, head.dropout, head.input_norm",
        "got the unknown key head.mask_top for head=max → a key of acmil → take head=acmil, or a key of max: "
        "head.embed_dim, head.dropout, head.input_norm",
        "got the unknown key head.gatd → expected one of head.",
    )
    for overrides, start in zip(wrong, expected, strict=True):
        with pytest.raises(ConfigError) as caught:
            compose_config(overrides)
        assert str(caught.value).startswith(start), caught.value
    with pytest.raises(ConfigError, match=r"unknown key optimizer.momentum for optimizer=adamw → a key of .*sgd"):
        OptimizerConfig(momentum=0.9)


def test_null_stands_for_the_default_of_an_option() -> None:
    assert compose_config(["optimizer.lr=null"]) == compose_config()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("_target_: os.system", ["_target_", "never code"]),
        ("head:\n  name: abmil\n  inner: [{_target_: os.system}]", ["_target_", "never code"]),
        ("epoch: 3", ["did you mean 'epochs'"]),
        ("head: {name: abml}", ["did you mean 'abmil'"]),
        ("head: {dropot: 1}", ["head.dropot"]),
        ("- 1", ["key: value"]),
        ("a: [", ["cannot be read"]),
        ("epochs: many", ["whole number"]),
    ],
)
def test_a_wrong_file_is_refused(text: str, names: list[str], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose_config([], file)
    assert all(name in str(caught.value) for name in names), caught.value


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        compose_config([], tmp_path / "none.yaml")


def test_a_config_made_by_hand_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="epochs=-1"):
        TrainConfig(epochs=-1)
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        OptimizerConfig(lr=-1)
    with pytest.raises(FrozenInstanceError):
        TrainConfig().epochs = 3  # type: ignore[misc]


def test_hydras_own_state_is_left_as_it_was() -> None:
    from hydra import compose, initialize
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    store = ConfigStore.instance()
    store.store(group="head", name="theirs", node={"x": 1})
    store.store(name="train", node={"defaults": [{"head": "theirs"}]})
    with initialize(config_path=None, version_base="1.2"):
        assert compose_config(["head=mean"]).head.name == "mean"
        with pytest.raises(ConfigError):
            compose_config(["head=theirs"])
        assert compose("train").head.x == 1
    assert not GlobalHydra.instance().is_initialized()
    del store.repo["head"], store.repo["train.yaml"]


def test_threads_compose_while_another_application_of_hydra_runs() -> None:
    from hydra import compose, initialize
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    ConfigStore.instance().store(name="theirs", node={"x": 1})

    def ours(at: int) -> tuple[int, str]:
        found = compose_config([f"epochs={at + 1}", f"head={('mean', 'max')[at % 2]}"])
        return found.epochs, found.head.name

    with initialize(config_path=None, version_base="1.2"):
        active = GlobalHydra.instance().hydra
        with ThreadPoolExecutor(8) as pool:
            found = [pool.submit(ours, at) for at in range(60)]
            for _ in range(10):
                assert GlobalHydra.instance().hydra is active
                assert compose("theirs", overrides=["x=2"]).x == 2
        assert [each.result() for each in found] == [(at + 1, ("mean", "max")[at % 2]) for at in range(60)]
    del ConfigStore.instance().repo["theirs.yaml"]


def test_the_keys_of_an_option_go_with_it(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("optimizer: {name: sgd, lr: 0.3, momentum: 0.5}\nloss: focal\n")
    assert compose_config([], file).optimizer == OptimizerConfig("sgd", lr=0.3, momentum=0.5)
    assert compose_config(["optimizer=lion"], file).optimizer == OptimizerConfig("lion")
    assert compose_config(["loss.gamma=3"], file).loss == LossConfig("focal", gamma=3.0)
    with pytest.raises(ConfigError, match=r"unknown key optimizer\.momentum for optimizer=adamw"):
        OptimizerConfig(momentum=0.9)
    with pytest.raises(ConfigError, match=r"scheduler\.patience=-1"):
        SchedulerConfig("plateau", patience=-1)
    with pytest.raises(ConfigError, match="optimizer=sgdd"):
        OptimizerConfig("sgdd")


def test_values_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="before the learning rate ever falls"):
        compose_config(["scheduler=plateau", "patience=3"])
    with pytest.raises(ConfigError, match="raise epochs"):
        compose_config(["init=a.safetensors", "freeze_epochs=5", "epochs=5"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_what_it_says_and_nothing_else(name: str) -> None:
    plain, composed = TrainConfig().to_dict(), compose_config([f"recipe={name}"]).to_dict()
    values = RECIPES[name].values
    for key, value in values.items():
        section = value if isinstance(value, dict) else {"name": value}
        got = composed[key]
        assert got.items() >= section.items() if isinstance(got, dict) else got == value
    assert {key for key in plain if plain[key] != composed[key]} <= set(values)
    assert "recipe" not in composed


def test_what_is_asked_for_stands_above_the_recipe(tmp_path: Path) -> None:
    config = compose_config(["epochs=9", "recipe=clam_official", "optimizer.lr=0.5", "head.k_sample=4"])
    assert (config.epochs, config.patience, config.batch_bags) == (9, 20, 1)
    assert config.optimizer == OptimizerConfig("adam", lr=0.5, weight_decay=1e-5)
    assert (config.head.name, config.head.keywords["official"], config.head.keywords["k_sample"]) == (
        "clam_sb",
        True,
        4,
    )
    other = compose_config(["recipe=clam_official", "head=abmil", "optimizer=sgd"])
    assert other.head == HeadConfig("abmil")
    assert other.optimizer == OptimizerConfig("sgd")


def test_a_recipe_is_beneath_its_own_source_and_above_earlier_ones(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("recipe: fast\nepochs: 7\npatience: 3\n")
    config = compose_config([], file)
    assert (config.epochs, config.patience, config.scheduler.name) == (7, 3, "onecycle")
    assert compose_config(["recipe=fast"], file).epochs == 15
    assert compose_config(["epochs=8"], file, {"recipe": "fast"}).epochs == 8
    assert compose_config([], file, {"recipe": "fast", "epochs": 6}).epochs == 6
    assert (
        compose_config(["recipe=clam_official"], file, {"head": "mean"}).head
        == compose_config(["head=mean", "standardize=none"]).head
    )


def test_quotes_are_not_part_of_what_they_quote() -> None:
    assert take_overrides(["heads=['a b',c]"], ["heads"])[0] == {"heads": ["a b", "c"]}


@pytest.mark.parametrize("name", ["labels", "split_file", "init"])
def test_a_file_at_a_url_is_refused_by_its_setting_and_a_store_is_taken(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"got {name}=s3://bucket/file → expected a file of this machine → download"):
        compose_config(values={name: "s3://bucket/file"})
    assert str(compose_config(values={"store": "s3://bucket/c.zarr"}).store) == "s3://bucket/c.zarr"
