"""Exported files that several tests look at: writing one takes seconds."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One calibrated run, exported both ways, by the files' endings; nobody writes into them."""
    # Not at the top: this file may be read before tests/conftest.py has set what kernels read.
    from backmix.train.decide.export import export
    from tests.train.decide.calibrated import calibrated

    folder = tmp_path_factory.mktemp("exported")
    run = calibrated(folder / "run")
    found = {suffix: folder / f"model{suffix}" for suffix in (".onnx", ".pt2")}
    for out in found.values():
        export(run, out)
    return found
