"""What the tests of faults share: a server of drivers, which takes seconds to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from drive import Driver


@pytest.fixture(scope="session")
def driver() -> Iterator[Driver]:
    with Driver() as driver:
        yield driver
