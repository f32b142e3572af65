"""How tests are compiled, each program once; their order: files with slow ones first, so that workers end together."""

import gc
import os
import shutil
import tempfile

MADE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Before the first import of JAX; for the workers of pytest-xdist and all processes of tests too.
    MADE = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import pytest  # noqa: E402

from tests.compiled import quick  # noqa: E402

os.environ.setdefault("XLA_FLAGS", quick())
# Tracing makes millions of objects that stay: looking for rubbish among them is in vain.
gc.set_threshold(200_000, 20, 100)


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist would start with the files of the most tests
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_unconfigure() -> None:
    if MADE:
        shutil.rmtree(MADE, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
