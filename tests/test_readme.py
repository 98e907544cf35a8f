"""The README keeps its promises: its example runs, and it names two commands that work anywhere."""

import re
from pathlib import Path

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import scorefn as sf

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def fenced(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_the_example_runs_and_is_twelve_lines_long():
    (example,) = fenced("python", TEXT)
    assert len([line for line in example.splitlines() if line.strip()]) == 12
    (parsed,) = Sybil(parsers=[PythonCodeBlockParser()]).parse(README).examples()
    parsed.evaluate()


def test_what_it_says_about_sources_and_versions_runs(capsys):
    calls = re.findall(r"`((?:print\()?sf\.(?:cite|show_versions)\(.*\))`", TEXT)
    assert len(calls) == 2
    for call in calls:
        exec(call, {"sf": sf})
        assert capsys.readouterr().out.strip()
    assert "REINFORCE" in str(sf.cite(sf.LeaveOneOut(), sf.posteriors.ScoreFunctionELBO))


def test_there_are_two_commands_of_one_line_each():
    commands = fenced("sh", TEXT)
    assert len(commands) == 2
    for command in commands:
        assert len(command.splitlines()) == 1
        assert command.startswith("python3 -m venv .venv && .venv/bin/python -m pip install -c .ci/constraints.txt -e ")
    assert commands[0].endswith('".[apps]" && .venv/bin/python -m applications.tour\n')
    assert commands[1].endswith('".[dev]" && .venv/bin/python -m pytest -n auto --dist loadfile\n')


def test_the_test_command_stands_under_its_heading():
    """The checks in `.ci/run` read it from there."""
    section = TEXT.split("\n## Run the tests\n")[1].split("\n## ")[0]
    assert fenced("sh", section) == fenced("sh", TEXT)[1:]


def test_every_link_to_a_file_leads_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (README.parent / target).is_file(), target
