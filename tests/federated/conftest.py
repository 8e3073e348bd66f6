import pytest
import torch

# first, because it knows which warnings of Flower's dependencies to let pass
import perdure.federated  # noqa: F401
from perdure.data.datasets.digits import digits
from perdure.data.scenarios import split


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def stream():
    return split(digits(), scenario="class", experiences=5)
