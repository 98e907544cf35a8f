"""The checks of the wheel and the sdist can fail; `python -m tests.packaging` runs them on what is built."""

import tomllib

import pytest

import scorefn
from tests.packaging import ROOT, faults_of_sdist, faults_of_wheel

VERSION = scorefn.__version__
ABOUT = f"scorefn-{VERSION}.dist-info"
METADATA = """Metadata-Version: 2.4
Name: scorefn
Version: {version}
Summary: {summary}
Requires-Python: >=3.11
License-Expression: Apache-2.0
Description-Content-Type: text/markdown
Requires-Dist: numpy>=1.26
Requires-Dist: torch>=2.6
Requires-Dist: gymnasium>=1.1; extra == 'rl'

# scorefn
"""


@pytest.fixture
def wheel():
    summary = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["description"]
    files = {path.relative_to(ROOT).as_posix(): b"" for path in (ROOT / "scorefn").rglob("*") if path.is_file()}
    files = {name: content for name, content in files.items() if "__pycache__" not in name}
    metadata = METADATA.format(version=VERSION, summary=summary).encode()
    return files | {f"{ABOUT}/METADATA": metadata, f"{ABOUT}/WHEEL": b"", f"{ABOUT}/licenses/LICENSE": b""}


@pytest.fixture
def sdist():
    parts = {"CITATION.cff", "applications/tour.py", "docs/index.md", "scorefn/__init__.py", "tests/conftest.py"}
    return parts | {".ci/constraints.txt", "PKG-INFO", "pyproject.toml", "README.md", "LICENSE"}


def test_a_whole_wheel_and_sdist_have_no_fault(wheel, sdist):
    assert faults_of_wheel(wheel, VERSION) == []
    assert faults_of_sdist(sdist) == []


@pytest.mark.parametrize("name", ["scorefn/py.typed", "scorefn/citation/search.bib", f"{ABOUT}/licenses/LICENSE"])
def test_a_file_that_the_wheel_lacks_is_named(wheel, name):
    del wheel[name]
    assert faults_of_wheel(wheel, VERSION) == [f"the wheel lacks {name}"]


@pytest.mark.parametrize("name", ["tests/conftest.py", "applications/tour.py", "scorefn/left_over.py"])
def test_a_file_too_many_is_named(wheel, name):
    assert faults_of_wheel(wheel | {name: b""}, VERSION) == [f"the wheel has {name}"]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (b"Version: 0", b"Version: 1", "METADATA says Version: 1"),
        (b"License-Expression: Apache-2.0", b"License: Apache", "METADATA says License-Expression: None"),
        (b"Requires-Dist: torch>=2.6\n", b"", "METADATA requires ['numpy']"),
        (b"\n# scorefn\n", b"", "METADATA has no description"),
    ],
)
def test_metadata_that_says_something_else_is_named(wheel, old, new, fault):
    name = f"{ABOUT}/METADATA"
    (found,) = faults_of_wheel(wheel | {name: wheel[name].replace(old, new)}, VERSION)
    assert found.startswith(fault)


def test_what_the_sdist_lacks_or_has_too_much_is_named(sdist):
    assert faults_of_sdist(sdist - {"CITATION.cff"}) == ["the sdist lacks CITATION.cff"]
    assert faults_of_sdist(sdist | {"runs/result.json"}) == ["the sdist has runs/result.json"]
