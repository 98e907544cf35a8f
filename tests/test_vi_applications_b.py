"""Eight schools, survey, control flow, mixture and HMM: what they say is exact is, and the programs run."""

import json

import pyro
import pytest
import torch
from pyro import poutine

import scorefn as sf
from applications.gradients import flat
from applications.vi import control_flow, eight_schools, hmm, mixture, survey
from applications.vi.fitting import arrival
from applications.vi.latent_states import STATES as APART
from applications.vi.latent_states import compare, corrected_means, fit, hermite, posterior


@pytest.fixture(autouse=True)
def _fresh_store():
    pyro.clear_param_store()


def bound_by_draws(net, num_draws, seed):
    """The bound by the Pyro programs, and its standard error."""
    pyro.set_rng_seed(seed)
    loss = sf.posteriors.ScoreFunctionELBO(num_draws, max_plate_nesting=1)
    with torch.no_grad():
        return sf.posteriors.bound(loss.draws(net.model, net.guide).fx.sum(-1))


# -------------------------------------------------------------------------------------------------------- eight schools


def test_eight_schools_agree_with_known_integrals():
    found = eight_schools.exact(eight_schools.load())
    assert abs(found.log_evidence + 31.311347352) < 1e-8
    assert abs(found.optimum + 31.5985) < 0.0014
    assert abs(found.moments["mu"][0] - 4.396821) < 1e-6
    assert abs(found.moments["tau"][0] - 3.597705) < 1e-6
    theta = [6.211884, 4.940178, 3.927004, 4.757098, 3.615477, 4.042613, 6.296724, 4.854253]
    assert all(abs(found.moments[f"theta {j + 1}"][0] - value) < 1e-6 for j, value in enumerate(theta))


def test_eight_schools_bound_is_that_of_its_programs():
    net = eight_schools.EightSchools(eight_schools.load())
    net.to_optimum()
    found = bound_by_draws(net, 50_000, seed=0)
    assert abs(found.value - net.exact_bound()) < 4 * found.standard_error
    parameters = list(net.parameters.parameters())
    assert flat(torch.autograd.grad(net.exact_bound(), parameters)).abs().max() < 1e-6


@pytest.mark.parametrize(("pathwise", "decisions"), [(False, 10), (True, 0)])
def test_eight_schools_pathwise_has_no_decisions(pathwise, decisions):
    net = eight_schools.EightSchools(eight_schools.load(), pathwise=pathwise)
    trace = pyro.poutine.trace(net.guide).get_trace()
    sites = [site for site in trace.nodes.values() if site["type"] == "sample" and site["name"] != "schools"]
    assert sum(site["value"].numel() for site in sites if not site["fn"].has_rsample) == decisions


def test_eight_schools_fit_rises_towards_the_optimum():
    fitted = eight_schools.fit(0, 60, learning_rate=0.1)
    assert fitted.curve[-1].gap < fitted.curve[0].gap / 2
    assert all(point.gap > 0 for point in fitted.curve)
    assert arrival(fitted.curve, 1e-9) is None


def test_eight_schools_compares_without_a_trace_in_the_store():
    rows = eight_schools.compare(3, 4, warm=1)
    assert len(rows) == 14
    assert len(pyro.get_param_store()) == 0


# --------------------------------------------------------------------------------------------------------------- survey


def test_survey_agrees_with_known_sums():
    found = survey.exact(survey.load())
    assert abs(found.log_evidence + 17.936146268) < 1e-9
    assert abs(found.expected_number - 187.2426) < 1e-4
    assert (found.mode, found.median) == (51, 149)
    assert abs(found.expected_theta - 0.195501) < 1e-6


def test_survey_log_ratio_does_not_depend_on_theta():
    net = survey.Survey(survey.load())
    assert len(net.numbers) == 474
    loss = sf.posteriors.ScoreFunctionELBO(50, max_plate_nesting=1)
    draws = loss.draws(net.model, net.guide)
    places = draws.x["place"].reshape(50)
    log_q = net.parameters.logits.log_softmax(-1)[places - net.impossible]
    expected = net.log_joint(places + 1) - log_q
    torch.testing.assert_close(draws.fx.sum(-1), expected, rtol=1e-9, atol=1e-9)


def test_survey_best_guide_has_no_noise_left():
    net = survey.Survey(survey.load())
    with torch.no_grad():
        net.parameters.logits.copy_(net.log_joint(net.numbers))
    assert abs(net.exact_bound().item() - survey.exact(net.returns).log_evidence) < 1e-12
    net.plain_bound(4).backward()
    assert net.parameters.logits.grad.abs().max() < 1e-12


@pytest.mark.parametrize("way", survey.WAYS)
def test_survey_fits_every_way(way):
    fitted = survey.fit(0, 30, way=way, learning_rate=0.1)
    assert fitted.curve[-1].gap > 0
    if way in (survey.OURS, survey.PLAIN, "exact gradient"):
        assert fitted.curve[-1].gap < fitted.curve[0].gap


def test_survey_refuses_another_way():
    with pytest.raises(ValueError, match="way must be one of 'ScoreFunctionELBO'.*, but it is 'newton'"):
        survey.fit(way="newton")


# --------------------------------------------------------------------------------------------------------- control flow

SHORT = (1, 5, 2)


def test_control_flow_runs_are_all_runs():
    net = control_flow.Bursts(SHORT)
    runs = net.runs()
    assert len({(run.times, run.kinds) for run in runs}) == len(runs) == 27
    assert abs(net.log_guide(runs).exp().sum().item() - 1) < 1e-12


def test_control_flow_programs_agree_with_the_sums():
    net = control_flow.Bursts(SHORT)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters.parameters():
            parameter.normal_()
    runs = net.runs()
    for run, log_q in zip(runs, net.log_guide(runs), strict=True):
        guide = pyro.poutine.trace(control_flow.Forced(run.values(3))(net.guide)).get_trace()
        model = pyro.poutine.trace(pyro.poutine.replay(net.model, guide)).get_trace()
        assert abs(guide.log_prob_sum() - log_q) < 1e-12
        assert abs(model.log_prob_sum().item() - run.log_joint) < 1e-12


def test_control_flow_gradient_is_exact_where_following_tensors_is_not():
    found = {verdict.name: verdict for verdict in control_flow.check(control_flow.Bursts(SHORT))}
    assert found["ScoreFunctionELBO"].relative_error < 1e-12
    assert found["Trace_ELBO"].relative_error < 1e-12
    assert found["TraceGraph_ELBO"].relative_error > 0.5


def test_control_flow_fit_rises_and_marginals_sum_to_one():
    fitted = control_flow.fit(0, 20)
    assert fitted.curve[-1].bound > fitted.curve[0].bound
    assert abs(sum(fitted.number) - 1) < 1e-12
    assert abs(sum(fitted.exact.number) - 1) < 1e-12


# ------------------------------------------------------------------------------------------------------------- programs


@pytest.mark.parametrize("program", [eight_schools, survey, control_flow])
def test_programs_write_their_results(program, tmp_path, capsys):
    assert program.main(["--steps", "2", "--particles", "2", "--out", str(tmp_path / "new")]) == 0
    result = json.loads((tmp_path / "new" / "result.json").read_text(encoding="utf-8"))
    assert result["arguments"]["seed"] == "0"
    assert "log_evidence" in result["exact"]
    assert (tmp_path / "new" / f"{program.__name__.rpartition('.')[-1]}.png").stat().st_size > 1000
    assert "log evidence" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        program.main(["--steps", "0"])
    assert "it is 0, but must be 1 or more" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ mixture and HMM


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
