"""The names of heads and keywords that are read without torch are those of the registry."""

import subprocess
import sys

import pytest

from mil.config import head_keywords as known
from mil.config.head_keywords import head_keywords
from tests.conftest import REPOSITORY


def test_the_sources_say_what_the_registry_says() -> None:
    from aggregators import list_aggregators
    from aggregators.registry import keyword_names

    assert known._written() == {name: tuple(keyword_names(name)) for name in list_aggregators()}


def test_heads_that_others_register_are_known_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from aggregators import registry
    from aggregators.abmil import ABMIL

    monkeypatch.setattr(registry, "_RECORDS", dict(registry._RECORDS))
    registry.register_aggregator("theirs", paper="none")(ABMIL)
    assert head_keywords()["theirs"] == head_keywords()["abmil"]


def test_without_sources_the_registry_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "find_spec", lambda name: None)
    known._written.cache_clear()
    monkeypatch.delitem(sys.modules, "aggregators")
    try:
        assert "abmil" in head_keywords()
    finally:
        known._written.cache_clear()


def test_a_mistyped_setting_is_told_without_torch() -> None:
    wrong = ["head=abml", "head.gatd=true", "epoch=3", "epochs=none", "optimizer=adm", "optimizer.lr=-1", "x=1,2"]
    code = (
        "import sys\nfrom mil.config.compose import compose_config\nfrom mil.errors import ConfigError\n"
        f"for override in {wrong!r}:\n"
        "    try:\n        compose_config([override])\n"
        "    except ConfigError:\n        print(override, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{override} False" for override in wrong], done.stderr
