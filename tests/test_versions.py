"""`show_versions`: what a report of a fault should say, and nothing imported for it."""

import io
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

import scorefn as sf
from scorefn import versions


def shown():
    file = io.StringIO()
    assert sf.show_versions(file) is None
    return dict(line.split(maxsplit=1) for line in file.getvalue().splitlines())


def test_it_names_the_versions_in_use():
    rows = shown()
    assert rows["scorefn"] == sf.__version__
    assert rows["Python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert rows["torch"].startswith(f"{torch.__version__} (")
    assert ("CUDA" in rows["torch"]) == (torch.version.cuda is not None)
    assert rows["threads"].startswith(f"torch {torch.get_num_threads()}, OMP_NUM_THREADS ")
    assert rows["numpy"] == version("numpy")
    assert set(versions.OPTIONAL) <= set(rows)


def test_a_package_that_is_not_there_says_how_to_get_it(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", absent)
    rows = shown()
    assert rows["pyro-ppl"] == "not installed (pip install scorefn[vi])"
    assert rows["mpi4py"] == "not installed"


def test_gpus_are_counted():
    assert [versions._devices(count) for count in range(3)] == ["no GPU seen", "1 GPU seen", "2 GPUs seen"]


def test_it_prints_to_the_standard_output(capsys):
    sf.show_versions()
    assert capsys.readouterr().out.startswith("scorefn ")


def test_nothing_is_imported_for_it():
    program = "import sys, scorefn as sf; sf.show_versions(); sf.cite(sf.LeaveOneOut()); print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert not {"gymnasium", "pyro", "ray", "matplotlib", "scorefn.search"} & set(printed.splitlines()[-1].split())
