"""Fixtures of several files."""

import pytest


@pytest.fixture
def one_thread():
    """For models so small that threads cost more than they give."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
