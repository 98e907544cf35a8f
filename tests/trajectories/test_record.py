"""The record and its first f, without Gymnasium."""

import subprocess
import sys

import torch
from torch.utils import _pytree as pytree

from scorefn.trajectories import Trajectories, rewards

WITHOUT = """
import sys
import scorefn as sf
from scorefn.trajectories import CategoricalPolicy, Trajectories, rewards
assert "TrajectoryDistribution" in dir(sf.trajectories)
assert "gymnasium" not in sys.modules
sf.trajectories.rollout
assert "gymnasium" in sys.modules
"""


def test_the_record_is_a_pytree_and_rewards_reads_it():
    record = Trajectories(*[torch.arange(6.0).reshape(2, 3) + i for i in range(6)])
    assert rewards(record) is record.rewards
    half = pytree.tree_map(lambda leaf: leaf[:1], record)
    assert isinstance(half, Trajectories)
    assert torch.equal(half.mask, record.mask[:1])


def test_gymnasium_loads_with_the_first_name_that_needs_it():
    subprocess.run([sys.executable, "-c", WITHOUT], check=True)


def test_an_unknown_name_is_an_attribute_error():
    import scorefn.trajectories

    assert not hasattr(scorefn.trajectories, "rolout")
