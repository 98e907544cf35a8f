"""The tests can fail: each mutation of the library turns a check of the battery red (law 8).

A mutation replaces part of the library in this process and names the checks that must catch it, by AssertionError and
nothing else; the same checks pass on the library as it is.

A truncated episode taken as a terminal one belongs to the trajectories, where values are bootstrapped: nothing in the
core or the reducers bootstraps, so there is nothing to mutate here.
"""

from dataclasses import replace

import pytest
import torch

import scorefn as sf
from scorefn.reducers import couplings, quantiles
from tests import test_anchors
from tests.contract.mutations import (
    AGES,
    EPISODES,
    LEAVE_ONE_OUT,
    REWARD_TO_GO,
    Mutation,
    V,
    adjoint,
    anchor_a,
    averaged_score,
    coupled,
    exact,
    first_coordinate,
    identity,
    loop,
    mask_by_multiplication,
    microbatches,
    moving_average,
    not_carried,
    orders,
    orthogonal,
    plain,
    shifted_earlier,
    shifted_later,
    twin,
    update_first,
    value_minus_baseline,
    whole_batch,
)
from tests.oracles.higher_orders import check_constant_cancels
from tests.oracles.settings import setting
from tests.oracles.toys import values
from tests.oracles.twins import check_identity, check_recurrence, check_value
from tests.reducers import test_couplings

MUTATIONS = {
    # leave-one-out
    "a baseline that includes its own draw": Mutation(
        *LEAVE_ONE_OUT,
        lambda original: lambda self, signal, draws: whole_batch(signal),
        (exact("single", "N=2", "Total()", "LeaveOneOut()"), exact("chain", "N=3", "RewardToGo(1)", "LeaveOneOut()")),
    ),
    "population 1/N": Mutation(
        *LEAVE_ONE_OUT,
        lambda original: (
            lambda self, signal, draws: (
                signal - (signal - original(self, signal, draws)) * (len(draws) - 1) / len(draws)
            )
        ),
        (exact("single", "N=3", "Total()", "LeaveOneOut()", "dice"), anchor_a),
    ),
    "a mean over the others that is divided by N": Mutation(
        *LEAVE_ONE_OUT,
        lambda original: lambda self, signal, draws: original(self, signal, draws) * (len(draws) - 1) / len(draws),
        (anchor_a, loop("chain", "N=3"), lambda: check_constant_cancels("Total()", order=1)),
    ),
    "leave-one-out inside a coupled block": Mutation(
        *LEAVE_ONE_OUT,
        lambda original: lambda self, signal, draws: original(self, signal, replace(draws, block=None)),
        tuple(
            exact("chain", layout, "RewardToGo(1)", "LeaveOneOut()", entry)
            for layout in ("copies", "ragged copies", "antithetic", "groups of blocks")
            for entry in ("surrogate", "dice", "expectation")
        ),
    ),
    "leave-one-out across groups": Mutation(
        *LEAVE_ONE_OUT,
        lambda original: lambda self, signal, draws: original(self, signal, replace(draws, group=None)),
        (loop("chain", "groups"), loop("ended", "ragged groups")),
    ),
    "absent decisions in the mean": Mutation(
        *LEAVE_ONE_OUT,
        lambda original: lambda self, signal, draws: original(self, signal, replace(draws, mask=None)),
        (loop("ended", "N=3"),),
    ),
    # learned baselines
    "an update before the read": Mutation(
        sf.MovingAverage,
        "__call__",
        update_first,
        (
            moving_average,
            exact("single", "N=2", "Total()", "MovingAverage, new"),
            exact("chain", "N=3", "RewardToGo(.9)", "MovingAverage, after three batches"),
        ),
    ),
    "an average that never learns": Mutation(
        sf.MovingAverage, "update", lambda original: lambda self, signal, draws: None, (moving_average,)
    ),
    # draws
    "a dropped event sum: the mean over the event": Mutation(
        sf,
        "draw",
        averaged_score,
        (plain("Bernoulli, f over its batch"), plain("Bernoulli, f over the tail of its batch")),
    ),
    "a dropped event sum: the first coordinate": Mutation(
        sf, "draw", first_coordinate, (plain("Bernoulli, f over its batch", "dice"),)
    ),
    "the pathwise part dropped": Mutation(
        sf.Draws,
        "weighted",
        lambda original: lambda self: original(self).detach(),
        (
            exact("single", "N=1", "Total()", "None"),
            exact("chain", "N=2", "RewardToGo(.9)", "None", "expectation"),
            plain("Normal"),
        ),
    ),
    "the behaviour weight dropped": Mutation(
        sf.Draws,
        "weighted",
        lambda original: lambda self: self.fx,
        (
            exact("chain", "N=1", "Total()", "None", off_policy=True),
            lambda: check_value(setting("chain", "groups", True), "RewardToGo(1)", "None", "surrogate"),
        ),
    ),
    "the behaviour weight dropped in dice": Mutation(
        sf,
        "dice",
        lambda original: lambda draws, **options: original(replace(draws, behaviour_log_prob=None), **options),
        (exact("chain", "N=1", "Total()", "None", "dice", off_policy=True),),
    ),
    "a mask by multiplication": Mutation(
        sf.Draws,
        "__post_init__",
        mask_by_multiplication,
        (exact("ended", "N=1", "Total()", "None"), exact("ended", "N=2 B=(2, 3)", "RewardToGo(1)", "None")),
    ),
    "a slice that loses the behaviour": Mutation(
        sf.Draws,
        "__getitem__",
        lambda original: lambda self, index: replace(original(self, index), behaviour_log_prob=None),
        (microbatches,),
    ),
    "a baseline not carried by the off-policy weight": Mutation(
        sf.Constant,
        "__call__",
        not_carried,
        (
            exact("single", "N=1", "Total()", "Constant(.7)", off_policy=True),
            exact("chain", "N=2", "own", "Constant([K])", "expectation", off_policy=True),
        ),
    ),
    "a value with the baseline subtracted": Mutation(
        sf,
        "surrogate",
        value_minus_baseline,
        (lambda: check_value(setting("chain", "groups"), "RewardToGo(1)", "Constant(.7)", "surrogate"),),
    ),
    # credit
    "gamma^t dropped": Mutation(
        *REWARD_TO_GO,
        lambda original: lambda self, v: original(replace(self, visitation_discount=False), v),
        (
            exact("chain", "N=1", "RewardToGo(.9)", "None"),
            identity,
            lambda: test_anchors.test_the_usual_discounted_update_can_point_the_other_way(0.5, 1.2, (".4", "-.2")),
        ),
    ),
    "gamma^t doubled": Mutation(
        *REWARD_TO_GO,
        lambda original: lambda self, v: original(self, v) * self.discount ** torch.arange(v.shape[-1]).to(v),
        (exact("chain", "N=1", "RewardToGo(.9)", "None"), identity),
    ),
    "gamma^t doubled in the value": Mutation(
        sf.RewardToGo,
        "value_weight",
        lambda original: lambda self, v: None if (w := original(self, v)) is None else w * w,
        (
            exact("chain", "N=1", "RewardToGo(.9)", "None"),
            lambda: check_value(setting("chain", "groups"), "RewardToGo(.9)", "None", "surrogate"),
        ),
    ),
    "reward-to-go off by one, too late": Mutation(
        *REWARD_TO_GO,
        lambda original: lambda self, v: shifted_later(original(self, v)),
        (
            exact("chain", "N=1", "RewardToGo(1)", "None"),
            exact("ended", "N=2", "RewardToGo(.9)", "LeaveOneOut()"),
            identity,
            lambda: test_anchors.test_chain(0.5, *test_anchors.CHAIN[1]),
        ),
    ),
    "reward-to-go off by one, too early": Mutation(
        *REWARD_TO_GO,
        lambda original: lambda self, v: shifted_earlier(original(self, v)),
        (identity, lambda: test_anchors.test_chain(0.5, *test_anchors.CHAIN[1])),
    ),
    "an influence off by one": Mutation(
        sf.RewardToGo, "influence", lambda original: lambda self, v: shifted_later(original(self, v)), (twin, adjoint)
    ),
    "an adjoint that forgets where episodes end": Mutation(
        sf.RewardToGo,
        "influence_adjoint",
        lambda original: lambda self, u: original(replace(self, done=None), u),
        (twin, adjoint),
    ),
    "a discount that runs on after the end of an episode": Mutation(
        sf.RewardToGo,
        "value_weight",
        lambda original: lambda self, v: original(replace(self, done=None), v),
        (
            exact("episodes", "N=1", "RewardToGo(.9)", "None"),
            lambda: check_identity(EPISODES, V, AGES, 0.9, True),
        ),
    ),
    "a recurrence that reads the decay of the step before": Mutation(
        sf,
        "linear_recurrence",
        lambda original: (
            lambda x, decay, *, reverse=False, dim=0: original(x, decay.roll(1, dim), reverse=reverse, dim=dim)
        ),
        tuple(
            lambda reverse=reverse: check_recurrence(values((5, 2), 42), values((5, 2), 43), reverse, 0)
            for reverse in (True, False)
        ),
    ),
    # dice
    "a box over the last decision only": Mutation(
        sf.Total,
        "influence_adjoint",
        lambda original: lambda self, u: u[..., -1:],
        (
            orders("Total()", "None"),
            exact("chain", "N=1", "Total()", "None", "dice"),
            exact("chain", "N=1", "Total()", "None", off_policy=True),
        ),
    ),
    "a box over the own decision, not through the adjoint": Mutation(
        sf.RewardToGo,
        "influence_adjoint",
        lambda original: lambda self, u: u,
        (orders("RewardToGo(1)", "None"), exact("chain", "N=1", "RewardToGo(.9)", "None", "dice"), twin),
    ),
    "a baseline whose predecessors include itself": Mutation(
        sf.Total,
        "predecessors",
        lambda original: lambda self, log_prob: log_prob.cumsum(-1),
        (orders("Total()", "Constant(.7)"), lambda: check_constant_cancels("Total()", order=2)),
    ),
    "a baseline without predecessors": Mutation(
        sf.Total,
        "predecessors",
        lambda original: lambda self, log_prob: torch.zeros_like(log_prob),
        (lambda: check_constant_cancels("Total()", order=2),),
    ),
    # couplings
    "couplings whose draws are blocks of their own": Mutation(
        couplings,
        "_labelled",
        lambda original: lambda u: (original(u)[0], torch.arange(u.shape[0] * u.shape[1])),
        (
            *(
                coupled(name, family, N, sf.LeaveOneOut(), entry)
                for name, family, N in (
                    ("Antithetic()", "Bernoulli", 6),
                    ("Antithetic()", "Normal", 4),
                    ("Stratified(2)", "Bernoulli", 6),
                    ("Stratified(3)", "Bernoulli", 6),
                    ("Systematic(3)", "Categorical", 6),
                    ("Sobol(4)", "Bernoulli", 8),
                )
                for entry in ("surrogate", "dice", "expectation")
            ),
            orthogonal(sf.LeaveOneOut()),
            orthogonal(sf.LeaveOneOut(), mirrored=True),
        ),
    ),
    "a block whose first draw is apart": Mutation(
        couplings,
        "_labelled",
        lambda original: lambda u: (lambda x, block: (x, block.index_fill(0, torch.tensor([0]), 99)))(*original(u)),
        (coupled("Stratified(3)", "Bernoulli", 6, sf.LeaveOneOut()), orthogonal(sf.LeaveOneOut(), mirrored=True)),
    ),
    "cells that are not permuted": Mutation(
        couplings,
        "_permutations",
        lambda original: (
            lambda count, size, shape, device: (
                torch.arange(size).reshape(1, -1, *[1] * len(shape)).expand(count, size, *shape)
            )
        ),
        (lambda: test_couplings.test_coordinates_are_permuted_apart(sf.Stratified(64)),),
    ),
    "a shift that is always 0": Mutation(
        couplings,
        "_integers",
        lambda original: (
            lambda low, high, shape, device: original(low, high, shape, device) * (low > 0)  # images have low > 0
        ),
        (lambda: test_couplings.test_sobol_shifts_each_block_anew(),),
    ),
    "the lengths of orthogonal draws are all the root of D": Mutation(
        couplings,
        "from_normal",
        lambda original: lambda p, z: original(p, z / z.norm(dim=-1, keepdim=True) * 2**0.5),
        (orthogonal(), orthogonal(sf.LeaveOneOut(), entry="dice")),
    ),
    "a Bernoulli of the other side": Mutation(
        quantiles,
        "_served",
        lambda original: (
            lambda p: (
                (lambda p, u: 1 - original(p)[0](p, u), original(p)[1])
                if isinstance(p, torch.distributions.Bernoulli)
                else original(p)
            )
        ),
        (
            coupled("Antithetic()", "Bernoulli", 2),
            coupled("Stratified(3)", "Bernoulli", 6, sf.LeaveOneOut()),
            coupled("Sobol(2)", "Independent(Bernoulli)", 2),
        ),
    ),
    "outcomes found from the wrong side": Mutation(
        quantiles,
        "_outcome",
        lambda original: lambda mass, u: (original(mass, u) + 1).clamp(max=mass.shape[-1] - 1),
        (
            coupled("Antithetic()", "Categorical", 4),
            coupled("Systematic(3)", "Binomial", 6),
            coupled("Antithetic()", "OneHotCategorical", 4),
        ),
    ),
}


@pytest.fixture(autouse=True)
def fresh_settings():
    """Draws are built anew on the mutated library, and none of them outlives it."""
    setting.cache_clear()
    yield
    setting.cache_clear()


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_checks_turn_red(name, monkeypatch):
    mutation = MUTATIONS[name]
    for check in mutation.checks:
        check()
    setting.cache_clear()
    monkeypatch.setattr(mutation.owner, mutation.name, mutation.change(getattr(mutation.owner, mutation.name)))
    for number, check in enumerate(mutation.checks):
        try:
            check()
        except AssertionError:
            continue
        pytest.fail(f"check {number} of {len(mutation.checks)} stays green under: {name}")
