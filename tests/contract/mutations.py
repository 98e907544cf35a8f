"""What a mutation is, the checks that must catch it, and the changes that are made."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import scorefn as sf
from tests import test_anchors
from tests.contract import test_expected_gradient, test_values_and_orders
from tests.oracles.couplings import check_coupling, check_orthogonal
from tests.oracles.expectations import check_exact
from tests.oracles.families import FAMILIES
from tests.oracles.higher_orders import check_orders
from tests.oracles.plain import check_plain
from tests.oracles.settings import setting
from tests.oracles.toys import values
from tests.oracles.twins import check_adjoint, check_identity, check_microbatches, check_twin, dense_reward_to_go


@dataclass(frozen=True)
class Mutation:
    """`owner.name` becomes `change(original)`; every check must then raise AssertionError."""

    owner: object
    name: str
    change: Callable
    checks: tuple[Callable[[], None], ...]


def exact(toy, layout, credit, baseline, entry="surrogate", off_policy=False):
    return lambda: check_exact(setting(toy, layout, off_policy), credit, baseline, entry)


def orders(credit, baseline, off_policy=False):
    return lambda: check_orders(setting("coins", "N=2", off_policy), credit, baseline, 2)


def plain(family, entry="surrogate"):
    return lambda: check_plain(FAMILIES[family], 2, None, entry)


def coupled(name, family, N, baseline=None, entry="surrogate"):
    return lambda: check_coupling(name, family, N, baseline, entry)


def orthogonal(baseline=None, mirrored=False, entry="surrogate"):
    return lambda: check_orthogonal(sf.OrthogonalGaussian(2, mirrored), "Independent(Normal)", 2, baseline, entry)


DONE = torch.tensor([False, True, False, False, True])
EPISODES = sf.RewardToGo(0.9, done=DONE)
AGES = torch.tensor([0.0, 1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
V, U = values((5,), 40), values((5,), 41)


def twin():
    check_twin(EPISODES, dense_reward_to_go(DONE), V, U)


def adjoint():
    check_adjoint(EPISODES, V, U)


def identity():
    credit, step = sf.RewardToGo(0.9), torch.arange(5).double()
    check_identity(credit, V, step, 0.9, True)


def microbatches():
    check_microbatches(torch.float64, 1e-12)


def loop(toy, layout):
    return lambda: test_expected_gradient.test_leave_one_out_against_the_loop(toy, layout)


def moving_average():
    test_values_and_orders.test_a_moving_average_is_read_before_it_is_updated()


def anchor_a():
    test_anchors.test_a_one_bernoulli(0.3, ".06090", ".05145")


def whole_batch(signal):
    return signal.mean(0, keepdim=True).expand(signal.shape)


def shifted_later(charged):
    """Decision k is charged with what belongs to k + 1."""
    return torch.cat([charged[..., 1:], torch.zeros_like(charged[..., :1])], -1)


def shifted_earlier(charged):
    """Decision k is charged with what belongs to k - 1: unbiased, but not reward-to-go."""
    return torch.cat([charged[..., :1], charged[..., :-1]], -1)


def averaged_score(draw):
    def mutant(p, f, num_samples, **options):
        draws = draw(p, f, num_samples, **options)
        size = torch.Size(p.batch_shape[draws.fx.ndim - 2 :]).numel()
        return replace(draws, log_prob=draws.log_prob / size)

    return mutant


def first_coordinate(draw):
    def mutant(p, f, num_samples, **options):
        draws = draw(p, f, num_samples, **options)
        log_prob = p.log_prob(draws.x)
        return replace(draws, log_prob=log_prob.flatten(draws.fx.ndim - 1)[..., :1])

    return mutant


def mask_by_multiplication(check):
    def mutant(draws):
        mask = draws.mask
        if mask is not None:
            object.__setattr__(draws, "log_prob", draws.log_prob * mask)
            object.__setattr__(draws, "mask", None)
        check(draws)
        object.__setattr__(draws, "mask", mask)

    return mutant


def not_carried(read):
    """What undoes the weight that an off-policy baseline is carried by."""

    def mutant(self, signal, draws):
        b = read(self, signal, draws)
        if draws.behaviour_log_prob is None:
            return b
        log_ratio = (draws.log_prob - draws.behaviour_log_prob).detach()
        return b / (draws.credit.predecessors(log_ratio) + log_ratio).exp()

    return mutant


def update_first(read):
    def mutant(self, signal, draws):
        self.update(signal, draws)
        return read(self, signal, draws)

    return mutant


def value_minus_baseline(surrogate):
    def mutant(draws, *, credit=None, baseline=None):
        per_draw = surrogate(draws, credit=credit, baseline=baseline)
        return per_draw if baseline is None else per_draw - baseline(draws.signal(credit), draws).mean(-1).detach()

    return mutant


LEAVE_ONE_OUT = (sf.LeaveOneOut, "__call__")
REWARD_TO_GO = (sf.RewardToGo, "__call__")
