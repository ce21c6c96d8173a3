"""Markers, hypothesis profiles and one torch thread per worker, for all tests."""

import importlib.util
import os

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "default", derandomize=True, deadline=None, print_blob=True, max_examples=50
)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=5000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config: pytest.Config) -> None:
    """Set what must stand before torch and Triton are used.

    One core for each worker: two workers with two threads each wait for one another.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Without a GPU the kernels are interpreted. Triton reads this where a kernel is decorated, so
    # it must stand before anything imports one.
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason said, what this machine cannot run."""
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(pytest.mark.skip(reason="no CUDA device: not run"))
    if not os.environ.get("BACKMIX_DATA"):
        for item in items:
            if item.get_closest_marker("real"):
                item.add_marker(pytest.mark.skip(reason="BACKMIX_DATA is not set: not run"))


@pytest.fixture(scope="session")
def torchvision():
    """Import torchvision, also beside a CPU build of torch, where its operators do not load."""
    from backmix.train.models.libraries import import_library

    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: not run")
    return import_library("torchvision")  # one that is there and does not load is a failure
