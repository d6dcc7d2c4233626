"""The state of torch and numpy around this package: its own while it works, the caller's after."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def in_own_state(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A public function that gives the same numbers whatever state torch and numpy are in.

    It works under :func:`own_state`, and leaves everything as it was, also where it raises.
    """

    @wraps(function)
    def called(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with own_state():
            return function(*args, **kwargs)

    return called


@contextmanager
def own_state() -> Iterator[None]:
    """Torch's and numpy's own defaults; the caller's are put back on leaving.

    No inference mode and gradients on (what needs none turns them off itself), no autocast, float32
    as default dtype, the CPU as default device, no reduced precision in products of float32 (TF32,
    bfloat16), and numpy's own treatment of floating-point errors. Left as they are: the number of
    threads, deterministic algorithms (both change rounding at most), and random state, which
    nothing here draws from.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in _autocast_devices():
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_dtype() != torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        # Entered where it is needed only: it slows every call of torch a little.
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        _exact_products(stack)
        # What numpy does where nobody has asked for something else.
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        yield


def tell(note: str) -> None:
    """Warn, in the name of the line outside of this package that led here."""
    package = __name__.partition(".")[0]
    frame, level = sys._getframe(1), 2
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(note, stacklevel=level)


def _autocast_devices() -> list[str]:
    """Kinds of devices on which autocast could be on."""
    kinds = ["cpu"]
    if torch.cuda.is_available():
        kinds.append("cuda")
    # Older versions of torch have no autocast there.
    known = getattr(torch.amp, "is_autocast_available", None)
    if torch.backends.mps.is_available() and known is not None and known("mps"):
        kinds.append("mps")
    return kinds


def _exact_products(stack: ExitStack) -> None:
    """Products of float32 in float32, until the stack closes."""
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        return
    # One for each backend: the single setting cannot be read where they differ.
    for backend in (backends.cuda.matmul, backends.mkldnn.matmul):
        stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
        backend.fp32_precision = "ieee"
