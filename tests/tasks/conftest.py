import pytest
import torch


@pytest.fixture(autouse=True)
def threads_as_they_were():
    """A cell that is measured in this process sets the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
