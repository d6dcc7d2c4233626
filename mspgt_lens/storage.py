"""Results on disk: one safetensors file with a JSON header, never pickled, written atomically."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_HEADER = "mspgt_lens"
_FORMAT = 1


def write_result(
    path: str | os.PathLike[str],
    kind: str,
    header: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> Path:
    """Write one result; the suffix ``.safetensors`` is added where it is missing.

    Args:
        path: Where to write.
        kind: Name of the result's class.
        header: What describes it, for JSON.
        arrays: Its numbers.

    Returns:
        The path that was written.
    """
    file = _with_suffix(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".partial")
    os.close(handle)
    text = json.dumps({"format": _FORMAT, "kind": kind, **header})
    try:
        save_file(dict(arrays), temporary, metadata={_HEADER: text})
        # Temporary files are private; results are as readable as any new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return file


def read_result(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays that :func:`write_result` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no result of this kind.
    """
    file = Path(path) if Path(path).is_file() else _with_suffix(path)
    if not file.exists():
        raise FileNotFoundError(f"path: no saved {kind} at {file}")
    try:
        with safe_open(file, framework="np") as opened:
            header = json.loads((opened.metadata() or {}).get(_HEADER, "{}"))
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"path: {file} is not a saved {kind} ({error})") from error
    if header.get("kind") != kind or header.get("format") != _FORMAT:
        raise ValueError(
            f"path: {file} must hold a {kind} of format {_FORMAT}, got "
            f"{header.get('kind', 'something else')} of format {header.get('format')}"
        )
    return header, arrays


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide a result's numbers."""
    names = ("mspgt-lens", "transformer-lens", "transformers", "torch", "numpy", "scipy")
    return {name: metadata.version(name) for name in names} | {"python": platform.python_version()}


def _with_suffix(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
