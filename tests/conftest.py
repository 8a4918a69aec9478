"""Strictness for the whole run: no silent promotion of dtypes or ranks."""

import gc
import os
from pathlib import Path

import jaxlib.version

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_parallel_codegen_split_count=1"  # programs are small: a twelfth less to compile
    # halves compilation; later versions know no such flag and abort
    + (" --xla_cpu_use_fusion_emitters=false" if jaxlib.version.__version_info__ < (0, 11) else "")
)
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

import jax
import jaxtyping
import pytest
from hypothesis import settings

from tests import tiers

gc.set_threshold(200_000, 20, 20)  # tracing makes many objects and little garbage: 3 to 7 % of the time

settings.register_profile("mijax", deadline=None, max_examples=20, derandomize=True, print_blob=True)
settings.load_profile("mijax")


def pytest_addoption(parser):
    parser.addoption("--share", metavar="K/N", help="of the slow tests every N-th, the K-th first (K from 0 on)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark the tests of `slow.txt`, and leave out those slow ones that are not of the share asked for."""
    names = tiers.slow()
    for item in items:
        if item.nodeid in names:
            item.add_marker("slow")
    if config.getoption("share"):
        kept = tiers.share(items, config.getoption("share"))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


@pytest.fixture(autouse=True)
def programs_are_forgotten_in_time():
    """Linux gives a process 65,530 memory maps, and each compiled program takes some: XLA crashes when they are used up."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 45_000:
        jax.clear_caches()


@pytest.fixture
def x64():
    """Run a test in float64, where rounding cannot hide an error."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def smollm2():
    """The real model and its tokenizer."""
    import mijax as mj

    return mj.load("smollm2-135m-instruct")


@pytest.fixture
def as_a_user():
    """Without the type checker that this test run has and a user has not: the messages are ours."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
