"""The setup cell of the tutorials, run where nothing is installed."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import venv
from importlib import metadata
from pathlib import Path

from notebooks import ROOT, SETUP

PUBLISHED = "git+https://github.com/mspgt-lens/mspgt_lens"
_KEPT = ("numpy", "torch")
_CHECK = f"""
import importlib.metadata as metadata, mspgt_lens
from mspgt_lens.models.loading import demo_file
print(*(metadata.version(name) for name in {_KEPT}), mspgt_lens.__file__, demo_file(), sep="\\n")
"""


def run_without_package() -> None:
    """Run the cell where numpy and torch are, but not the package, and see what is there then.

    A fresh environment sees this one's numpy and torch with what they need; everything else comes
    from PyPI, and the package from this checkout.

    Raises:
        subprocess.CalledProcessError: If the cell fails, or the package cannot be imported then.
        AssertionError: If another version of numpy or torch was installed, or another package.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / "bin" / "python"
        # In a place of their own: pip never uninstalls what lies outside of its environment.
        _link(_KEPT, folder / "kept")
        site = _output([python, "-c", "import site; print(site.getsitepackages()[0])"], folder)
        (Path(site) / "kept.pth").write_text(f"{folder / 'kept'}\n")
        assert PUBLISHED in SETUP, f"the setup cell must install from {PUBLISHED}"
        cell = folder / "cell.py"
        cell.write_text(SETUP.replace(PUBLISHED, ROOT.as_uri()))
        _output([python, cell], folder)
        *versions, package, weights = _output([python, "-c", _CHECK], folder).splitlines()
        assert versions == [metadata.version(name) for name in _KEPT], versions
        assert all(Path(file).is_relative_to(folder / "env") for file in (package, weights))


def _link(names: tuple[str, ...], folder: Path) -> None:
    """Links to some installed packages and all that they need, as pip would find them."""
    folder.mkdir()
    waiting, seen = list(names), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # Needed on other systems, or by an extra.
        waiting += [re.split(r"[^\w.-]", need, maxsplit=1)[0] for need in found.requires or ()]
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))


def _output(command: list[str | Path], folder: Path) -> str:
    """What a command prints, run in a folder without this environment's settings."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "MSPGT_LENS_TUTORIAL_MODEL")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, check=True)
    return done.stdout.decode().strip()
