"""An empty store of parameters for each test."""

import pyro
import pytest


@pytest.fixture(autouse=True)
def _fresh_store():
    pyro.clear_param_store()
