"""One thread per test process and for its children: more threads than cores are slower than one."""

import gc
import os
from collections import Counter

import pytest

gc.set_threshold(100_000, 50, 1000)  # the libraries are half a million objects, which stay
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    """Tests marked `slow` run with MHDET_ALL=1 only.

    Chapters come first, then files with few tests, which are long ones: no process has much left
    to do when the others are done.
    """
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.stem != "test_notebooks", count[item.path]))
    if os.environ.get("MHDET_ALL") != "1":
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes half a minute: MHDET_ALL=1"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "A file stays in one process, of the chapters each package; in the order above."
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return nodeid.rpartition("/")[0] if file.endswith("test_notebooks.py") else file

    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def fp32():
    "`precision=auto` is fp32 in every test: the same numbers on a processor with bf16."
    import torch

    told = getattr(torch.cpu, "get_capabilities", None)
    torch.cpu.get_capabilities = dict
    yield
    if told:
        torch.cpu.get_capabilities = told


@pytest.fixture(scope="module")
def one_thread():
    "Small layers on a busy machine: threads would wait for each other."
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
