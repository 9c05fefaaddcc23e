import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import socket

import pytest
import torch
from cases import ARCHITECTURES, build_model, build_tokenizer
from filelock import FileLock

torch.set_num_threads(1)  # arrays are small here: threads would only wait for each other


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Nothing here may reach another machine."""
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family == socket.AF_UNIX:
            return connect(self, address)
        raise RuntimeError(f"a test tried to connect to {address}")

    socket.socket.connect = refuse
    yield
    socket.socket.connect = connect


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    """Name of each architecture in turn."""
    return request.param


@pytest.fixture
def model(architecture):
    """A fresh tiny model of each architecture, which a test may change."""
    return build_model(architecture)


@pytest.fixture
def llama():
    """A fresh tiny model, where one architecture is enough."""
    return build_model("llama")


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer with bos, eos and pad."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_testbed():
    """Models told and never told of a fictional world; trained once, then cached. Do not change."""
    from manifold_unlearn.testbed.cache import cache_directory
    from manifold_unlearn.testbed.models import load_testbed

    cache_directory().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_directory() / "tests.lock"):  # one worker trains, the others read
        return load_testbed("tiny", device="cpu", progress=False)
