"""Order of the tests: files with slow ones first, so that several workers end at about the same time."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist would start with the files of the most tests
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
