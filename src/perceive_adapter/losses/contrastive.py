"""Contrastive loss of degradation embeddings, with negatives from every rank."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from perceive_adapter.errors import LossInputError
from perceive_adapter.losses._inputs import check_number
from perceive_adapter.precision import full_precision

__all__ = ["DegradationContrastiveLoss"]

_MIN_NORM = 1e-6  # bounds the gradient of the normalization at a zero vector


class DegradationContrastiveLoss(nn.Module):
    r"""InfoNCE over degradation labels.

    With unit vectors a_i (anchor) and p_i (another crop of the same degraded image), temperature
    T, and N(i) the vectors of both crops of all images whose label differs from that of image i,

    .. math::
        -\log \frac{\exp(a_i \cdot p_i / T)}
        {\exp(a_i \cdot p_i / T) + \sum_{v \in N(i)} \exp(a_i \cdot v / T)}

    and the mean over i. Other images with the same label are neither positive nor negative. An
    image without any negative contributes 0 (with a graph).

    Where ``torch.distributed`` is initialized, negatives come from all ranks, with gradient: the
    mean of the ranks' losses is the loss of the whole batch, and so are its gradients after the
    averaging of DistributedDataParallel. All ranks must call it, with equal batches.

    Sources: Perceive-IR, IEEE TIP 2025, arXiv 2408.15994, compact feature extraction; InfoNCE,
    arXiv 1807.03748.

    Args:
        temperature: T, above 0.

    Raises:
        ConfigError: ``temperature`` is not above 0.

    Example:
        >>> loss = DegradationContrastiveLoss(temperature=0.5)
        >>> vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> round(loss(vectors, vectors, torch.tensor([0, 1])).item(), 4)  # log(1 + 2 exp(-2))
        0.2395
        >>> loss(vectors, vectors, torch.tensor([0, 0])).item()  # no negatives
        0.0
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, positive=True)

    def forward(self, anchor: Tensor, positive: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, a scalar of at least 0, computed in float32 or better.

        Args:
            anchor: (B, D), vectors of any length.
            positive: (B, D), of another crop of the same degraded images.
            labels: (B,), integers: which degradation, on any device.

        Raises:
            LossInputError: shapes or dtypes that do not fit, an empty batch, or batches of
                different sizes on different ranks.
        """
        _check_vectors(anchor, positive, labels)
        labels = labels.to(anchor.device)
        with torch.autocast(anchor.device.type, enabled=False):
            anchor = F.normalize(full_precision(anchor), dim=1, eps=_MIN_NORM)
            positive = F.normalize(full_precision(positive), dim=1, eps=_MIN_NORM)
            vectors, vector_labels = _gather(torch.stack([anchor, positive], 1), labels)
            alike = labels[:, None] == vector_labels.repeat_interleave(2)
            negatives = anchor @ vectors.flatten(0, 1).T / self.temperature
            negatives = negatives.masked_fill(alike, -torch.inf)
            positives = (anchor * positive).sum(1, keepdim=True) / self.temperature
            logits = torch.cat([positives, negatives], 1)
            return (logits.logsumexp(1) - positives.squeeze(1)).mean()

    def extra_repr(self) -> str:
        """Return the settings, for ``repr``."""
        return f"temperature={self.temperature}"


def _check_vectors(anchor: Tensor, positive: Tensor, labels: Tensor) -> None:
    for name, vectors in (("anchor", anchor), ("positive", positive)):
        if not isinstance(vectors, Tensor):
            raise LossInputError(f"{name} must be a tensor (B, D), got {type(vectors).__name__}")
        if vectors.ndim != 2 or vectors.numel() == 0 or not vectors.is_floating_point():
            raise LossInputError(
                f"{name} must be a floating tensor (B, D), not empty; got {vectors.dtype} of shape "
                f"{tuple(vectors.shape)}"
            )
    if anchor.shape != positive.shape:
        raise LossInputError(
            f"anchor has shape {tuple(anchor.shape)}, positive {tuple(positive.shape)}: they must "
            "be the same"
        )
    if not isinstance(labels, Tensor):
        raise LossInputError(f"labels must be a tensor (B,), got {type(labels).__name__}")
    integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if tuple(labels.shape) != (len(anchor),) or not integer:
        raise LossInputError(
            f"labels must be integers of shape ({len(anchor)},), got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )


def _gather(vectors: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Concatenate every rank's vectors (with gradient) and labels; own ones if there is one."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return vectors, labels
    # all_gather of unequal shapes hangs or corrupts, so every rank learns all sizes first.
    size = torch.tensor([len(labels)], device=labels.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    counts = torch.cat(sizes).tolist()
    if len(set(counts)) > 1:
        raise LossInputError(
            f"every rank must give the contrastive loss an equal batch, got {counts}; use "
            "drop_last=True"
        )
    all_labels = [torch.empty_like(labels) for _ in counts]
    dist.all_gather(all_labels, labels.contiguous())
    all_vectors: Tensor = _AllGather.apply(vectors)
    return all_vectors, torch.cat(all_labels)


class _AllGather(torch.autograd.Function):
    """Concatenate equal tensors of all ranks; the gradient sums what every rank sends back.

    torch.distributed.nn.functional.all_gather does the same; newer versions of torch warn of it,
    and its successor does not exist in older ones.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format)
            for _ in range(dist.get_world_size())
        ]
        dist.all_gather(parts, tensor.contiguous())
        ctx.own = slice(dist.get_rank() * len(tensor), (dist.get_rank() + 1) * len(tensor))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.own]
