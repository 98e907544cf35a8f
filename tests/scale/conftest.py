"""One pool for the tests of a file."""

import pytest

from tests.scale.pools import pool


@pytest.fixture(scope="module")
def processes():
    with pool() as executor:
        yield executor
