"""Results on disk: one safetensors file with a JSON header, never pickled, written atomically."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_HEADER = "mspgt_lens"
_FORMAT = 1
_Saved = TypeVar("_Saved", bound="SavedResult")


class SavedResult:
    """A frozen dataclass with read-only arrays, compared by value and saved field by field.

    Arrays must be finite, but where a class says that NaN stands for what is undefined.
    """

    nan_is_undefined: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, np.ndarray):
                kept = np.array(value)
                if not (self.nan_is_undefined or np.isfinite(kept).all()):
                    raise ValueError(f"{type(self).__name__}: {item.name} must be finite")
                kept.flags.writeable = False
                object.__setattr__(self, item.name, kept)
            elif isinstance(value, Mapping):
                object.__setattr__(self, item.name, MappingProxyType(dict(value)))

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        pairs = (
            (getattr(self, item.name), getattr(other, item.name))
            for item in fields(self)  # type: ignore[arg-type]
        )
        return all(
            np.array_equal(a, b, equal_nan=True) if isinstance(a, np.ndarray) else a == b
            for a, b in pairs
        )

    __hash__ = None  # type: ignore[assignment]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result to one ``.safetensors`` file with a JSON header.

        Args:
            path: Where to write; the suffix is added where it is missing.

        Returns:
            The path that was written.
        """
        values = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        header = {name: value for name, value in values.items() if name not in arrays}
        return write_result(path, type(self).__name__, header, arrays)

    @classmethod
    def load(cls: type[_Saved], path: str | os.PathLike[str]) -> _Saved:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file holds something else.
        """
        header, arrays = read_result(path, cls.__name__)
        names = {item.name for item in fields(cls)}  # type: ignore[arg-type]
        values = {
            # Settings keep their lists, which is what JSON has.
            name: value if name == "settings" else _as_tuples(value)
            for name, value in header.items()
            if name in names
        }
        return cls(**cls._decoded(values), **arrays)

    @classmethod
    def _decoded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Header fields as the class wants them, where JSON does not say enough."""
        return values


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
    text = json.dumps({"format": _FORMAT, "kind": kind, **header}, default=_plain)
    try:
        # Arrays in any other order than C's would come back scrambled.
        ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        save_file(ordered, temporary, metadata={_HEADER: text})
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


def _plain(value: Any) -> Any:
    """What JSON does not know: read-only mappings, and dataclasses by their fields."""
    return dict(value) if isinstance(value, Mapping) else asdict(value)


def _as_tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_as_tuples(item) for item in value)
    if isinstance(value, dict):
        return {name: _as_tuples(item) for name, item in value.items()}
    return value


def _with_suffix(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
