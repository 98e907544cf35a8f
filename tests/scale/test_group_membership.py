"""A process that is no member of a group is told so; labels of any integers make groups; moments of no values are 0."""

import pytest
import torch
import torch.distributed as dist

import scorefn as sf
from scorefn.core.process_groups import merged_moments
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


@pytest.mark.usefixtures("alone", "float64")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_labels_of_any_integers_are_the_same_groups(dtype):
    signal = torch.tensor([[3.0], [5.0], [7.0], [-1.0]])
    log_prob = torch.zeros(4, 1, requires_grad=True)
    draws = sf.Draws(torch.zeros(4), log_prob, signal, group=torch.tensor([7, 3, 7, 3], dtype=dtype))
    expected = torch.tensor([[7.0], [-1.0], [3.0], [5.0]])
    for process_group in (None, World()):
        assert torch.equal(sf.LeaveOneOut(process_group=process_group)(signal, draws), expected)


def test_moments_of_ranks_are_those_of_all_values_and_0_where_there_are_none():
    values = [torch.tensor([1.0, 4.0]), torch.tensor([]), torch.tensor([10.0])]
    count = torch.tensor([float(len(v)) for v in values])
    mean = torch.tensor([v.mean() if len(v) else 0.0 for v in values])
    square = torch.tensor([(v - v.mean()).square().sum() if len(v) else 0.0 for v in values])
    total, whole, squares = merged_moments(count, mean, square)
    assert (total.item(), whole.item(), squares.item()) == (3.0, 5.0, 42.0)
    nothing = torch.zeros(2)
    assert [v.item() for v in merged_moments(nothing, nothing, nothing)] == [0.0, 0.0, 0.0]
