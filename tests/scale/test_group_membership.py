"""A process that is no member of a group is told so, before anything is sent."""

import pytest
import torch
import torch.distributed as dist

import scorefn as sf
from scorefn.scale import World, sum_over_ranks


@pytest.fixture
def alone():
    """A job of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_group_of_others_is_refused(monkeypatch):
    v = torch.arange(3.0)
    group = dist.new_group([0])
    assert torch.equal(sum_over_ranks(v, group), v)
    rank = dist.get_rank
    monkeypatch.setattr(dist, "get_rank", lambda of=None: -1 if of is group else rank(of))
    sent = []
    monkeypatch.setattr(dist, "all_reduce", lambda *arguments, **options: sent.append(arguments))
    with pytest.raises(sf.ScorefnError, match=r"^This process, rank 0 of the job, is no member of process_group: use"):
        sum_over_ranks(v, group)
    assert not sent


@pytest.mark.usefixtures("alone")
def test_what_new_group_gives_to_those_who_are_left_out_is_refused():
    with pytest.raises(sf.ScorefnError, match="no member of the group: it has no part in that group's sums"):
        sum_over_ranks(torch.ones(2), dist.GroupMember.NON_GROUP_MEMBER)
    assert torch.equal(sum_over_ranks(torch.ones(2), World()), torch.ones(2))
