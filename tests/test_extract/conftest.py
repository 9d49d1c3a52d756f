"""Fixtures of the extract tests."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import openslide
import pytest

from tests.test_extract.small import write_slide

pytest.register_assert_rewrite("tests.test_extract.store_conformance")


@pytest.fixture
def slide_file(tmp_path: Path) -> Path:
    """A small pyramidal TIFF of 0.5 µm/px."""
    return write_slide(tmp_path / "slide.tif")


@pytest.fixture
def with_properties(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, str]], None]:
    """Make OpenSlide report these properties on top of a file's own."""

    def patch(properties: Mapping[str, str]) -> None:
        class Patched(openslide.OpenSlide):
            @property
            def properties(self) -> Mapping[str, str]:
                return {**super().properties, **properties}

        monkeypatch.setattr(openslide, "OpenSlide", Patched)

    return patch


@pytest.fixture
def rng() -> np.random.Generator:
    """Seeded random numbers."""
    return np.random.default_rng(0)
