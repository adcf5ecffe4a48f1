"""Operations on feature maps: pure torch everywhere, and fused Triton kernels on a GPU.

Each module has the operation and its reference in pure torch; ``kernels`` has the Triton code.
Which of both runs is decided in Python, by the device of the tensors, so ``torch.compile`` sees one
graph on any device. ``PERCEIVE_ADAPTER_KERNELS`` names the operations that may run fused, separated
by commas: ``add_low_rank,reference_distances``, which is the default, or ``none``.
"""

from perceive_adapter.ops.distances import reference_distances
from perceive_adapter.ops.low_rank import add_low_rank

__all__ = ["add_low_rank", "reference_distances"]
