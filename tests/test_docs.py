"""The pages know the library: every public name stands in the API page."""

import importlib
import re
from pathlib import Path

import pytest

import scorefn

API = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
DOCUMENTED = set(re.findall(r"^\.\. auto\w+:: (\S+)$", API, flags=re.MULTILINE))
ROOMS = ["diagnostics", "posteriors", "scale", "search", "tracking", "trajectories"]


def public_names(room: str) -> set[str]:
    module = importlib.import_module(f"scorefn.{room}".rstrip("."))
    return {f"{module.__name__}.{name}" for name in module.__all__ if name not in ROOMS and not name.startswith("_")}


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_every_public_name_is_documented(room):
    assert not public_names(room) - DOCUMENTED


def test_nothing_else_is_documented():
    known = set().union(*(public_names(room) for room in ["", "core", *ROOMS]))
    assert not DOCUMENTED - known


def test_the_version_is_that_of_the_citation():
    citation = (Path(__file__).parents[1] / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {scorefn.__version__}\n" in citation
