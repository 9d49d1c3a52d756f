"""``mil config show``."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mil.cli import main as cli
from mil.config.compose import compose_config
from mil.errors import ConfigError


def test_what_is_shown_can_be_run(tmp_path: Path) -> None:
    settings = ["recipe=strong", "head=clam_sb", "optimizer.lr=0.002"]
    result = CliRunner().invoke(cli.app, ["config", "show", *settings])
    assert result.exit_code == 0
    (tmp_path / "config.yaml").write_text(result.stdout)
    assert compose_config([], tmp_path / "config.yaml") == compose_config(settings)


def test_options_are_listed() -> None:
    text = CliRunner().invoke(cli.app, ["config", "show", "--options"]).stdout
    parts = ("optimizer=", "  lion: lr=0.0001", "scheduler=", "  abmil: ", "recipe= default, fast, strong", "augment=")
    for part in parts:
        assert part in text, part


def test_mistypes_are_answered() -> None:
    with pytest.raises(ConfigError, match="did you mean 'abmil'"):
        CliRunner().invoke(cli.app, ["config", "show", "head=abml"], catch_exceptions=False)
