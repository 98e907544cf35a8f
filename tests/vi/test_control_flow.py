"""Control flow: what it says is exact is; and this program, eight schools and the survey run."""

import json

import pyro
import pytest
import torch

from applications.vi import control_flow, eight_schools, survey

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
