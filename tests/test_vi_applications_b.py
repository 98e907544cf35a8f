"""Eight schools, survey and control flow: what they say is exact is, and the programs run."""

import json

import pyro
import pytest
import torch

import scorefn as sf
from applications.vi import control_flow, eight_schools, survey


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
    assert eight_schools.flat(torch.autograd.grad(net.exact_bound(), parameters)).abs().max() < 1e-6


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
    assert fitted.steps_within(1e-9) is None


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
    assert fitted.curve[-1].kl > 0
    if way in (survey.OURS, survey.PLAIN, "exact gradient"):
        assert fitted.curve[-1].kl < fitted.curve[0].kl


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
    assert "must be at least 2" in capsys.readouterr().err
