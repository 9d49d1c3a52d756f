"""Reads the recorded outputs of published heads."""

from pathlib import Path

import numpy as np
import pytest
import torch

PARITY = Path(__file__).resolve().parents[1] / "data" / "parity"


def load_fixture(name, folder=PARITY):
    """Every array of a file, by its name."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def state_of(fixture):
    """The weights under their official names."""
    return {key.removeprefix("state/"): value for key, value in fixture.items() if key.startswith("state/")}


def outputs_of(fixture, case):
    """What the published code gave for one bag."""
    start = f"output/{case}/"
    return {key.removeprefix(start): value for key, value in fixture.items() if key.startswith(start)}


def close(got, expected, tolerance=1e-5):
    """Fails unless both agree to the tolerance, relative or absolute."""
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=tolerance, atol=tolerance)


def parity_folder(data_folder):
    """Where the files with published trained weights lie: beside the real data, as they are not ours to ship."""
    folder = data_folder.parent / "parity"
    if not folder.is_dir():
        pytest.skip(f"recorded outputs of trained heads not found at {folder}")
    return folder
