"""Mixture and HMM: what they say is exact is, and the programs run."""

import json

import pyro
import pytest
import torch
from pyro import poutine

import scorefn as sf
from applications.vi import hmm, mixture
from applications.vi.latent_fit import STATES as APART
from applications.vi.latent_fit import corrected_means, fit
from applications.vi.latent_gradients import compare
from applications.vi.latent_posterior import posterior
from applications.vi.latent_states import hermite

SHORT_SERIES = torch.tensor([-3.0, 2.5, 0.4, -1.2, 3.6], dtype=torch.float64)
STATES = [(program, family) for program in (mixture, hmm) for family in program.FAMILIES]


def moved(program, family, *, pathwise=True):
    """A guide for five data that is nothing special: every parameter somewhere else."""
    found = program.FAMILIES[family](SHORT_SERIES if program is mixture else SHORT_SERIES + 6, pathwise=pathwise)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return found


def every_state(found, per_dim):
    """Draws of the Pyro programs at each node of x with each of the 32 states, and the node's weight."""
    x, weight = found.globals.nodes(per_dim)
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=x.dtype)] * len(SHORT_SERIES))
    nodes, z = x.repeat_interleave(len(states), 0), states.repeat(len(x), 1)
    trace = pyro.poutine.Trace()
    values = {"x": nodes if found.depth == 0 else nodes.unsqueeze(-2)}
    values |= {"z": z} if found.depth else {f"z_{t}": z[:, t] for t in range(len(SHORT_SERIES))}
    for name, value in values.items():
        infer = {"is_auxiliary": name == "x"}
        trace.add_node(name, name=name, type="sample", is_observed=False, infer=infer, value=value)
    loss = sf.posteriors.ScoreFunctionELBO(len(z), max_plate_nesting=found.depth, baseline=None)
    draws = loss.draws(found.model, poutine.replay(found.guide, trace=trace))
    return draws, weight.repeat_interleave(len(states))


def test_hermite_has_the_moments_of_a_gaussian():
    nodes, weight = hermite(3, 4)
    assert abs(weight.sum() - 1) < 1e-14
    torch.testing.assert_close(torch.einsum("m,mi,mj->ij", weight, nodes, nodes), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(weight @ nodes**6, torch.full((3,), 15.0, dtype=torch.float64))


@pytest.mark.parametrize(("program", "per_dim", "log_evidence"), [(mixture, 5, -2115.6831), (hmm, 8, -173.4042)])
def test_posterior_is_that_of_posteriordb(program, per_dim, log_evidence):
    y, reference = program.load()
    family = program.Exact(y)
    found = posterior(family, per_dim)
    assert abs(found.log_evidence - log_evidence) < 1e-4
    for label, mean, sd in zip(family.labels, found.means, found.sds, strict=True):
        own = reference[label]
        assert abs(mean - own["mean"]) < 4 * own["sd"] / own["draws"] ** 0.5  # four standard errors of its draws
        assert abs(sd / own["sd"] - 1) < 4 / (2 * own["draws"]) ** 0.5


@pytest.mark.parametrize(("program", "family"), STATES)
def test_jacobians_are_those_of_the_constraints(program, family):
    found = moved(program, family)
    x = found.start() + 0.3
    jacobian = torch.autograd.functional.jacobian(lambda u: found.values(u.unsqueeze(0))[0], x)
    total = sum(part.log_jacobian for part in found.parts(x).values())
    torch.testing.assert_close(total, torch.linalg.slogdet(jacobian).logabsdet)
    torch.testing.assert_close(found.globals.white(found.globals.nodes(2)[0]), hermite(len(x), 2)[0])


@pytest.mark.parametrize(("program", "family"), STATES)
def test_bound_and_gradient_by_every_state(program, family):
    found, per_dim = moved(program, family), 2
    draws, weight = every_state(found, per_dim)
    share = (weight * draws.log_prob.sum(-1).exp()).detach()
    assert abs(share.sum() - 1) < 1e-12
    bound = found.bound(per_dim)
    torch.testing.assert_close(share @ draws.fx.sum(-1), bound, rtol=1e-11, atol=1e-11)
    parameters = list(found.parameters())
    expected = torch.autograd.grad(share @ sf.surrogate(draws), parameters, materialize_grads=True)
    exact = torch.autograd.grad(bound, parameters, materialize_grads=True)
    for one, other in zip(expected, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("program", "family"), STATES)
def test_states_summed_out_are_sums_over_states(program, family):
    found = moved(program, family)
    draws, weight = every_state(found, 2)
    x, _ = found.globals.nodes(2)
    shape = len(x), -1
    log_q_x = found.globals.normal().log_prob(x)
    log_joint = draws.fx.sum(-1) + draws.log_prob.sum(-1) + log_q_x.repeat_interleave(2 ** len(SHORT_SERIES))
    log_joint = log_joint.reshape(shape)
    torch.testing.assert_close(log_joint.logsumexp(-1), found.log_joint(x), rtol=1e-11, atol=1e-11)
    z = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=x.dtype)] * len(SHORT_SERIES))
    torch.testing.assert_close(log_joint.softmax(-1) @ z, found.states(x), rtol=1e-10, atol=1e-12)
    q = draws.log_prob.sum(-1).exp().reshape(shape)
    torch.testing.assert_close(q @ z, found.guide_states(x), rtol=1e-10, atol=1e-12)
    assert len(weight) == log_joint.numel()


@pytest.mark.parametrize("program", [mixture, hmm])
def test_exact_states_leave_nothing_to_their_scores(program):
    found = moved(program, "exact")
    x, _ = found.globals.nodes(3)
    torch.testing.assert_close(found.expected(x), found.log_joint(x), rtol=1e-11, atol=1e-11)
    loss = sf.posteriors.ScoreFunctionELBO(50, max_plate_nesting=found.depth)
    draws = loss.draws(found.model, found.guide)
    own = draws.x["x"].reshape(50, -1)
    expected = found.log_joint(own) - found.globals.normal().log_prob(own)
    torch.testing.assert_close(draws.fx.sum(-1), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("program", [mixture, hmm])
def test_globals_can_be_decisions(program):
    for pathwise, decisions in ((True, len(SHORT_SERIES)), (False, len(SHORT_SERIES) + 1)):
        found = moved(program, "learnt", pathwise=pathwise)
        loss = sf.posteriors.ScoreFunctionELBO(3, max_plate_nesting=found.depth)
        assert loss.draws(found.model, found.guide).log_prob.shape == (3, decisions)


@pytest.mark.parametrize("program", [mixture, hmm])
def test_a_wide_guide_is_corrected(program):
    y, _ = program.load()
    found = program.Exact(y[:40])
    exact = posterior(found, 5)
    found.globals.set(exact.loc, 1.5 * exact.covariance)  # wider, as the posterior has heavier tails
    torch.testing.assert_close(found.globals.normal().covariance_matrix, 1.5 * exact.covariance)
    pyro.set_rng_seed(0)
    judged = corrected_means(found, 2000)
    assert judged.weights.khat < judged.weights.threshold
    assert abs(judged.weights.log_evidence - exact.log_evidence) < 4 * judged.weights.log_evidence_error
    for mean, error, own in zip(judged.means, judged.errors, exact.means, strict=True):
        assert abs(mean - own) < 4 * error
    fitted = fit(found, exact, 0, 3, particles=4, rates={"globals": 1e-6})
    row = fitted.summary()
    assert row["state_error"] == fitted.curve[-1].others[APART]
    assert row["goal_met"] == (row["mean_error"] <= 0.1 and row["state_error"] <= 0.02)
    with pytest.raises(ValueError, match="rates are given for .'slopes'., but the guide also has .'globals.loc'"):
        fit(found, exact, 0, 3, particles=4, rates={"slopes": 1.0})


@pytest.mark.parametrize("program", [mixture, hmm])
def test_comparison_leaves_the_guide_and_the_store(program):
    found = moved(program, "learnt")
    before = [parameter.detach().clone() for parameter in found.parameters()]
    rows = compare(found, 3, 4, warm=2)
    assert [row.name.partition(",")[0] for row in rows][3:6] == ["TraceGraph_ELBO", "TraceGraph_ELBO", "Trace_ELBO"]
    assert all(row.variance > 0 for row in rows)
    assert all(torch.equal(one, other) for one, other in zip(before, found.parameters(), strict=True))
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("program", [mixture, hmm])
def test_data_that_are_no_finite_vector_are_refused(program):
    for bad in (torch.zeros(3, 2), torch.zeros(0), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match=r"y has shape \(.*\).*is a finite vector|data are a finite vector"):
            program.Exact(bad.double())


@pytest.mark.parametrize("program", [mixture, hmm])
def test_programs_of_states_write_their_results(program, tmp_path, capsys):
    name = program.__name__.rpartition(".")[-1]
    arguments = ["--steps", "2", "--particles", "2", "--families", "learnt", "--score", "--out", str(tmp_path / "new")]
    assert program.main(arguments) == 0
    result = json.loads((tmp_path / "new" / "result.json").read_text(encoding="utf-8"))
    assert result["complete"] is True
    assert result["arguments"]["seed"] == "0"
    assert [row["family"] for row in result["families"]] == ["learnt"]
    assert result["families"][0]["goal_met"] is False
    assert (tmp_path / "new" / f"{name}.png").stat().st_size > 1000
    assert "goal not met" in capsys.readouterr().out
    for bad, message in (
        (["--steps", "0"], "--steps: it is 0, but must be 1 or more"),
        (["--particles", "1"], "--particles: it is 1, but must be 2 or more"),
        (["--families", "best"], "--families: invalid choice: 'best'"),
    ):
        with pytest.raises(SystemExit):
            program.main(bad)
        assert message in capsys.readouterr().err
