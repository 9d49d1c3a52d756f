"""Killed writers: whatever the moment, a reader gets whole units or none, and the end is as if nothing had happened.

``make test-crash`` kills 1,000 writers of each backend, and one before each single step of its work.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.test_extract.seeded import FORMATS

KILLS = int(os.environ.get("TESSERA_CRASH_ROUNDS", "30"))
STRIDE = max(1, 150 // KILLS)
EVERYWHERE = {"nothing", "a partial of tiles", "a partial of features", "saved rows"}


def crash(*arguments: object) -> dict:
    """What `crash_store` printed."""
    command = [sys.executable, "-m", "tests.test_extract.crash_store", *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # shown by pytest -rP
    sys.stdout.write(done.stdout)
    return json.loads(done.stdout)


@pytest.mark.timeout(120 + KILLS)
@pytest.mark.parametrize("backend", FORMATS)
def test_writers_killed_at_random_moments_leave_whole_units_or_none(tmp_path: Path, backend: str):
    result = crash("random", tmp_path, backend, KILLS, 1)
    assert result["wrong"] == []
    assert result["hits"] == KILLS
    # they hit units that were being built, and stores were finished in between
    assert any(place.startswith("a partial of") for place in result["places"])
    assert result["stores"] > KILLS // 100


@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", FORMATS)
def test_a_writer_killed_at_any_step_leaves_whole_units_or_none(tmp_path: Path, backend: str):
    result = crash("steps", tmp_path, backend, STRIDE)
    assert result["wrong"] == []
    assert set(result["places"]) >= EVERYWHERE
    assert result["hits"] > 80 // STRIDE
