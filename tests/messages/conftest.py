"""The world, with each baseline that keeps a state."""

import pytest

from tests.messages.world import World


@pytest.fixture(params=["MovingAverage", "ValueFunction"])
def world(request):
    return World(request.param)
