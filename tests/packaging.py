"""Says whether what is published is whole: `python -m tests.packaging` in a checkout.

Builds the sdist and, from it and from the checkout, the wheel, with the build backend of this environment and without
a network; installs the wheel alone into an empty folder, and uses it there.
"""

import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
USE = """
import sys, pathlib, scorefn as sf
assert pathlib.Path(sf.__file__).is_relative_to(sys.argv[1]), sf.__file__
assert sf.cite(sf.LeaveOneOut).bibtex.startswith("@"), "the bibliography is missing"
print(sf.__version__)
"""


def build(source: Path, out: Path, kind: str) -> Path:
    """The sdist or wheel of a source tree."""
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    (made,) = out.iterdir()
    return made


def contents(wheel: Path) -> dict[str, bytes]:
    """Every file of a wheel but the list of their hashes."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


def faults_of_wheel(files: dict[str, bytes], version: str) -> list[str]:
    """What is missing from a wheel, or should not be in it."""
    about = f"scorefn-{version}.dist-info"
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "scorefn").rglob("*") if path.is_file()}
    wanted = {name for name in wanted if "__pycache__" not in name}
    wanted |= {f"{about}/METADATA", f"{about}/WHEEL", f"{about}/licenses/LICENSE"}
    faults = [f"the wheel lacks {name}" for name in sorted(wanted - set(files))]
    faults += [f"the wheel has {name}" for name in sorted(set(files) - wanted)]
    said = HeaderParser().parsestr(files.get(f"{about}/METADATA", b"").decode())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    expected = {
        "Name": project["name"],
        "Version": version,
        "Summary": project["description"],
        "Requires-Python": project["requires-python"],
        "License-Expression": project["license"],
        "Description-Content-Type": "text/markdown",
    }
    faults += [f"METADATA says {name}: {said[name]}" for name, value in expected.items() if said[name] != value]
    required = {part.split(">=")[0] for part in said.get_all("Requires-Dist", []) if "extra" not in part}
    if required != {part.split(">=")[0] for part in project["dependencies"]}:
        faults.append(f"METADATA requires {sorted(required)}")
    if not said.get_payload():
        faults.append("METADATA has no description")
    return faults


def faults_of_sdist(names: set[str]) -> list[str]:
    """What pyproject.toml says that an sdist holds, and does not; and what it holds beside that."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = [part.strip("/") for part in settings["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]]
    always = {"PKG-INFO", "pyproject.toml", "README.md", "LICENSE", ".gitignore"}
    faults = [f"the sdist lacks {part}" for part in included if not any(name.startswith(part) for name in names)]
    faults += [f"the sdist lacks {part}" for part in always - {".gitignore"} - names]
    inside = tuple(included)
    return faults + [f"the sdist has {name}" for name in sorted(names - always) if not name.startswith(inside)]


def main() -> int:
    """Print what is wrong; the exit status says whether anything is."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sdist = build(ROOT, work / "sdist", "sdist")
        version = sdist.name.removeprefix("scorefn-").removesuffix(".tar.gz")
        with tarfile.open(sdist) as archive:
            archive.extractall(work / "unpacked", filter="data")
        unpacked = work / "unpacked" / f"scorefn-{version}"
        names = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
        wheel = build(unpacked, work / "wheel", "wheel")
        files = contents(wheel)
        faults = faults_of_sdist(names) + faults_of_wheel(files, version)
        if files != contents(build(ROOT, work / "direct", "wheel")):
            faults.append("the wheel of the sdist is not that of the checkout")
        target = work / "installed"
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            str(target),
        ]
        subprocess.run([*install, str(wheel)], check=True)
        use = [sys.executable, "-c", f"import sys; sys.path.insert(0, sys.argv[1])\n{USE}", str(target)]
        used = subprocess.run(use, cwd=work, capture_output=True, text=True)
        if used.returncode or used.stdout.strip() != version:
            faults.append(f"the installed wheel does not work:\n{used.stdout}{used.stderr}")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
