"""Where the kernels run: interpreted on the CPU, or compiled on a GPU under `pytest -m gpu` (`make test-gpu`)."""

import os
import signal

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # A shell without job control has what it starts in the background ignore Ctrl-C, and all that starts from there.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Read by Triton when a kernel is defined, so before anything imports prime_kernels.
    on_gpu = config.getoption("-m") == "gpu"
    os.environ.setdefault("TRITON_INTERPRET", "0" if on_gpu else "1")
    # torch's cache of compiled graphs does not see that the code of an op's backward has changed.
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    # Models that are named and not there are not looked for, again and again, where there is no network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    interpreted = os.environ["TRITON_INTERPRET"] == "1"
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        elif item.get_closest_marker("gpu") and interpreted:
            item.add_marker(pytest.mark.skip(reason="kernels are interpreted in this run; use `make test-gpu`"))


@pytest.fixture(autouse=True)
def _restore_workspace():
    yield
    from prime_kernels import set_workspace

    set_workspace(None)


@pytest.fixture(autouse=True)
def _quiet_interpreter():
    """numpy warns of overflows and NaN in lanes that a kernel's tl.where then discards."""
    import numpy

    with numpy.errstate(all="ignore"):
        yield
