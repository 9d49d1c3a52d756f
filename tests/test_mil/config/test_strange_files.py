"""Config files of strangers: none hangs, none takes all memory, none ends in a traceback."""

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregators import HeadConfigError, create_aggregator
from mil.config.compose import compose_config, read_config_file
from mil.errors import ConfigError, MilError


def bomb(levels: int = 9) -> str:
    """A few hundred bytes whose aliases stand for 10^levels values."""
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels + 1))]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(), "aliases stand for more"),
        ("a: &a\n  b: *a\n", "contains itself"),
        ("a: &a [*a]\n", "contains itself"),
        ("a: " + "[" * 4000 + "]" * 4000, "brackets"),
        ("a: [1", "cannot be read"),
        ("- 1\n- 2\n", "key: value"),
        ("x: " + "y" * (1 << 20), "larger than"),
        ("head: {_target_: os.system}", "never code"),
    ],
)
def test_what_is_no_config_is_refused_at_once(tmp_path: Path, text: str, message: str):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config_file(path)


def test_aliases_that_stand_for_a_few_values_are_followed(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("optimizer: &o\n  name: adamw\n  lr: 0.003\nepochs: 7\n")
    assert compose_config(file=path).optimizer.lr == 0.003


@pytest.mark.parametrize(
    "override",
    [
        "head.embed_dim=100000000000",
        "head.dropout=nan",
        "head.dropout=.inf",
        "optimizer.lr=nan",
        "optimizer.lr=-inf",
        "epochs=1e400",
        "instance_dropout=nan",
    ],
)
def test_numbers_beyond_sense_are_refused(override: str):
    with pytest.raises((MilError, HeadConfigError)):
        build(override)


def build(override: str) -> None:
    """The head of a configuration."""
    config = compose_config([override])
    create_aggregator(config.head.name, in_dim=8, n_classes=2, **config.head.keywords)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("ab:&*[]{}<>\"' \n-0.1nie!#|%@"), max_size=60))
def test_no_text_ends_in_another_error(tmp_path: Path, text: str):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with suppress(ConfigError):
        assert isinstance(read_config_file(path), dict)
