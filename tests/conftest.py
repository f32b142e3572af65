"""How tests are compiled; their order: files with slow ones first, so that workers end at about the same time."""

import os

import pytest

from tests.compiled import quick

os.environ.setdefault("XLA_FLAGS", quick())


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist would start with the files of the most tests
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
