"""Single precision or better, for what half precision is too coarse for."""

import torch
from torch import Tensor

__all__ = ["full_precision"]


def full_precision(values: Tensor) -> Tensor:
    """Return floating-point values in float32, or as they are in float64.

    Example:
        >>> full_precision(torch.ones(1, dtype=torch.float16)).dtype
        torch.float32
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))
