"""What the hooks of one injector share: the condition of the forward pass under way."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from perceive_adapter.errors import BackboneError, PerceptionError

__all__ = ["ConditionState", "Lock"]


class ConditionState:
    """The condition that the hooks read. It outlives the forward pass.

    Activation checkpointing runs the hooks again in the backward pass, so the condition stays;
    ``armed`` says whether a forward pass that set it is under way, so that the backbone, called by
    itself, never runs on a stale one. Hooks that run again see the last condition only: a backward
    pass through two forward passes is refused there.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.armed = False
        self.condition: Tensor | None = None
        self.gated: Mapping[str, Tensor] = {}  # see Branches.gated; empty where not known
        self.pending: WeakSet[ForwardPass] = WeakSet()

    def arm(self, condition: Tensor) -> None:
        """Set the condition (B, L, C + 1) of the forward pass that begins."""
        if not torch.compiler.is_compiling() and condition.requires_grad:
            this = ForwardPass()
            self.pending.add(this)
            condition = cast(Tensor, _Watched.apply(condition, this))
        self.condition, self.gated = condition, {}
        self.armed = True

    def current(self) -> Tensor:
        """Return the condition (B, L, C + 1).

        Raises:
            PerceptionError: no forward pass is under way, or a backward pass runs hooks again and
                goes through several.
            BackboneError: the hook runs inside reentrant checkpointing.
        """
        if self.armed and self.condition is not None:
            if not torch.compiler.is_compiling() and self._loses_gradient():
                raise BackboneError(
                    "the network checkpoints its activations with use_reentrant=True, which loses "
                    "the gradient of prompts where the network is frozen: checkpoint with "
                    "use_reentrant=False, or not at all"
                )
            return self.condition
        if self.condition is None or torch._C._current_graph_task_id() == -1:
            raise PerceptionError(
                "the wrapped backbone was called by itself, without a fresh perception; call the "
                "PerceiveModel, or use its disabled() context, or unwrap() it"
            )
        if len(self.pending) > 1:
            raise PerceptionError(
                f"activation checkpointing runs the network again, and {len(self.pending)} forward "
                "passes wait for their backward pass, each with its own perception; run the "
                "backward pass after each forward pass, or turn checkpointing off"
            )
        return self.condition

    def _loses_gradient(self) -> bool:
        """Whether a pass with gradient has come into reentrant checkpointing, which takes it off.

        Other networks that turn gradients off, for a part that they have frozen, mean to.
        """
        assert self.condition is not None
        if torch.is_grad_enabled() or not self.condition.requires_grad:
            return False
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code is CheckpointFunction.forward.__code__:
                return True
            frame = frame.f_back
        return False

    def __getstate__(self) -> dict[str, Any]:
        # A condition belongs to the graph of one forward pass: it is neither copied nor saved.
        return {"enabled": self.enabled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.enabled = state["enabled"]


class ForwardPass:
    """A forward pass that may still see its backward pass; it lives as long as its graph."""


class _Watched(torch.autograd.Function):
    """The identity, whose node in the graph keeps a forward pass alive until its backward."""

    @staticmethod
    def forward(ctx: Any, condition: Tensor, this: ForwardPass) -> Tensor:
        ctx.this = this
        return condition.view_as(condition)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.this = None
        return gradients[0], None


class Lock:
    """A re-entrant lock that copies and pickles as a new, open one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()
