"""Products of large matrices of float32 on a CPU, as fast as the processor allows.

Torch leaves them to MKL, which on the AMD processor that was measured takes twice the time of
oneDNN, which torch brings as well. Both sum in float32 and differ in rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

# Multiplications below which it does not matter who makes them.
_LARGE = 2**22


def _found() -> Any:
    """What torch's compiler calls; None where a build lacks it, or it takes other arguments."""
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    try:
        torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return None
    return torch.ops.mkldnn._linear_pointwise


_FASTER = _found()


def product(
    left: Float[Tensor, "row inner"],
    right: Float[Tensor, "inner column"],
    bias: Float[Tensor, " column"] | None = None,
) -> Float[Tensor, "row column"]:
    """``left @ right``, and a bias in every row."""
    if _is_faster(left, right.mT):
        return _linear(left, right.mT, bias)
    return left @ right if bias is None else torch.addmm(bias, left, right)


@contextmanager
def faster_layers() -> Iterator[None]:
    """While open, linear layers of models compute faster where they can, without gradients."""
    with _FasterLayers():
        yield


class _FasterLayers(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is linear and not kwargs and _is_faster(*args[:2]):
            return _linear(*args)
        return func(*args, **(kwargs or {}))


def _linear(
    rows: Float[Tensor, "*batch inner"],
    weight: Float[Tensor, "column inner"],
    bias: Float[Tensor, " column"] | None = None,
) -> Float[Tensor, "*batch column"]:
    found: Tensor = _FASTER(_without_gaps(rows), _without_gaps(weight), bias, "none", [], "")
    return found


def _without_gaps(factor: Tensor) -> Tensor:
    """The same numbers, in rows or in columns without gaps: others take a hundred times as long."""
    return factor if factor.ndim == 2 and factor.mT.is_contiguous() else factor.contiguous()


def _is_faster(rows: Tensor, weight: Tensor) -> bool:
    return (
        _FASTER is not None
        # Weights of other kinds stand for other numbers.
        and all(type(factor) in (Tensor, torch.nn.Parameter) for factor in (rows, weight))
        and rows.device.type == weight.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and rows.numel() * len(weight) >= _LARGE
        and not (torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad))
    )
