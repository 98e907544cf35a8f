"""What the tests of posteriors share: a store of parameters for each test."""

import pyro
import pytest


@pytest.fixture(autouse=True)
def fresh_store():
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        yield
