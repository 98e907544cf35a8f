"""The record and its first f, without Gymnasium."""

import subprocess
import sys

import pytest
import torch
from torch.utils import _pytree as pytree

import scorefn as sf
from scorefn.trajectories import Trajectories, returns, rewards

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
    parts = [torch.arange(6.0).reshape(2, 3) + i for i in range(8)]
    record = Trajectories(*parts, state={"h": torch.zeros(2, 5)})
    assert rewards(record) is record.rewards
    half = pytree.tree_map(lambda leaf: leaf[:1], record)
    assert isinstance(half, Trajectories)
    assert torch.equal(half.mask, record.mask[:1])
    assert half.state["h"].shape == (1, 5)
    assert Trajectories(*parts).state is None


def flags(*rows):
    return torch.tensor([[symbol == "1" for symbol in row] for row in rows])


def record(mask, starts, terminated, truncated):
    fields = [flags(*rows) for rows in (terminated, truncated, mask)]
    values = torch.ones(fields[0].shape) * torch.tensor([[1.0], [10.0]]) * fields[2]
    return Trajectories(values, values, values, *fields, values, flags(*starts))


def test_done_is_either_end():
    both = record(["111", "111"], ["100", "100"], ["001", "010"], ["001", "001"])
    assert torch.equal(both.done, flags("001", "011"))


def test_returns_are_those_of_whole_episodes():
    whole = record(["110", "111"], ["100", "100"], ["010", "000"], ["000", "001"])
    assert returns(whole).tolist() == [2.0, 30.0]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            (["110", "111"], ["100", "100"], ["010", "000"], ["000", "000"]),
            "Stream 1 of 2 has not ended .* after step 2",
        ),
        (
            (["110", "111"], ["100", "100"], ["100", "001"], ["000", "000"]),
            "Stream 0 of 2 has not ended .* after step 1",
        ),
        (
            (["111", "111"], ["100", "000"], ["001", "001"], ["000", "000"]),
            "Stream 1 of 2 is in the middle .* at step 0",
        ),
        ((["111", "111"], ["100", "110"], ["001", "101"], ["000", "000"]), "Stream 1 of 2 begins another episode"),
        ((["000", "111"], ["000", "100"], ["000", "001"], ["000", "000"]), "Stream 0 of 2 is in the middle"),
    ],
)
def test_returns_of_anything_else_are_refused(parts, message):
    with pytest.raises(sf.ScorefnError, match=f"{message}.*whole episodes were asked for.*Draw whole episodes"):
        returns(record(*parts))


def test_gymnasium_loads_with_the_first_name_that_needs_it():
    subprocess.run([sys.executable, "-c", WITHOUT], check=True)


def test_an_unknown_name_is_an_attribute_error():
    import scorefn.trajectories

    assert not hasattr(scorefn.trajectories, "rolout")
