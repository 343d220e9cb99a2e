import os

import pytest
import torch
from tiny_run import tiny, train

from moe_lab import Trainer

os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # `datasets` would wait for the hub, for each file that it opens
torch.set_num_threads(1)  # on a busy machine with few cores, small tests run ten times faster with one thread


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before the fixtures, shared ones too: what a test draws does not depend on which tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A finished run of six steps, to look at and to copy."""
    folder = tmp_path_factory.mktemp("run")
    return train(tiny(folder), folder / "run")
