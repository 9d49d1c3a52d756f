"""The configuration: what may be set, how it is checked, and that it runs again."""

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from aggregators import list_aggregators
from mil.config import HeadConfig, OptimizerConfig, TrainConfig, compose_config
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
    ],
)
def test_a_saved_config_composes_to_itself(overrides: list[str], tmp_path: Path) -> None:
    config = compose_config(overrides)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert compose_config([], file) == config


@pytest.mark.parametrize("head", list_aggregators())
def test_every_head_is_an_option_with_its_keywords(head: str, tmp_path: Path) -> None:
    config = compose_config([f"head={head}"])
    assert config.head == HeadConfig(head, {"input_norm": "standardize"})
    assert "dropout" in config.head.keywords


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
        ("epoch=3", ["epoch", "did you mean 'epochs'", "patience"]),
        ("lr=0.1", ["did you mean optimizer.lr"]),
        ("head.dropot=0.1", ["did you mean 'head.dropout'"]),
        ("head=abml", ["head=abml", "did you mean 'abmil'", "head=mean"]),
        ("optimizer=adam", ["optimizer=adamw"]),
        ("standardize=tran", ["standardize=train"]),
        ("epochs=0", ["epochs=0", "at least 1"]),
        ("epochs=2.5", ["whole number"]),
        ("epochs=true", ["whole number"]),
        ("epochs=${folds}", ["whole number"]),
        ("validation_fraction=1", ["below 1"]),
        ("optimizer.lr=0", ["above 0"]),
        ("optimizer.lr=nan", ["above 0"]),
        ("optimizer.lr=inf", ["above 0"]),
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
