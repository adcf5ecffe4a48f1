"""What the hooks of one injector share: the condition of the forward pass under way."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Mapping
from types import FrameType
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from perceive_adapter.errors import BackboneError, PerceptionError
from perceive_adapter.injection.branches import Ready
from perceive_adapter.injection.freezing import FrozenBackbone
from perceive_adapter.injection.probe import tensors_in

__all__ = ["ConditionState", "ForwardPass", "Lock", "Passes"]


class HookInputs(NamedTuple):
    """What hooks work with.

    Args:
        condition: (B, L, C + 1).
        ready: see :meth:`Branches.ready`, by the branches' names, where it is known.
        folded: see :meth:`Branches.folded`, of the layers that run with such weights.
        traced: whether torch.compile traces the whole pass. Blocks that are compiled alone look up
            no names, by which they would differ.
    """

    condition: Tensor
    ready: Mapping[str, Ready]
    folded: Mapping[str, Tensor]
    traced: bool


class ForwardPass:
    """A forward pass with gradient, and what hooks worked with, for as long as its graph lives."""

    def __init__(self) -> None:
        self.inputs: dict[ConditionState, HookInputs] = {}
        self.has_graph = False
        self.backward_done = False
        self.task: int | None = None  # of autograd, in which its backward pass runs

    def watch(self, output: Any) -> None:
        """Know its backward pass by what the network has returned, through which that begins."""
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(self._begin)  # type: ignore[no-untyped-call]

    def hold(self, features: Tensor) -> None:
        """Live as long as the graph of ``features``, the first that a prompt has changed."""
        if not self.has_graph and features.requires_grad:
            features.register_hook(self._end)  # type: ignore[no-untyped-call]
            self.has_graph = True

    def _begin(self, gradient: Tensor) -> None:
        self.task, self.backward_done = torch._C._current_graph_task_id(), False

    def _end(self, gradient: Tensor) -> None:
        # The backward pass has come to the first prompt: no hook runs again after that.
        self.backward_done = True


class Passes:
    """The forward passes with gradient through one backbone that may still run again.

    Activation checkpointing runs the hooks again in the backward pass. All injectors of a backbone
    share one of these, so that each knows whether it took part in the pass that runs again.
    """

    def __init__(self) -> None:
        self._alive: WeakSet[ForwardPass] = WeakSet()

    def begin(self) -> ForwardPass:
        """Return a new pass."""
        this = ForwardPass()
        self._alive.add(this)
        return this

    def find_replayed(self) -> ForwardPass | None:
        """Return the pass that runs again, None where there is none that hooks took part in.

        Raises:
            PerceptionError: it may be one of several.
        """
        alive = [this for this in self._alive if this.has_graph]
        task = torch._C._current_graph_task_id()
        alive = [this for this in alive if this.task == task] or alive
        waiting = [this for this in alive if not this.backward_done] or alive
        if len(waiting) > 1:
            raise PerceptionError(
                f"activation checkpointing runs the network again, and it is not known in which of "
                f"{len(waiting)} forward passes, each with its own perception, whose results are "
                "still there: run a backward pass for each, or turn checkpointing off"
            )
        return waiting[0] if waiting else None

    def __reduce__(self) -> tuple[type[Passes], tuple[()]]:
        return Passes, ()  # graphs are neither copied nor saved


class ConditionState:
    """The condition that the hooks of one injector read.

    A hook that runs finds the backbone in one of these states:

    - disabled: the hook does nothing;
    - armed, by :meth:`arm` until :meth:`disarm`: a forward pass is under way, and hooks work with
      what it set;
    - replayed: activation checkpointing runs a part of an earlier forward pass again, inside its
      backward pass, and hooks work with what that one had set;
    - neither: somebody has called the backbone by itself, which is an error.

    ``armed`` says whether a forward pass that set it is under way, so that the backbone, called by
    itself, never runs on a stale one; ``thread`` whose it is, since meanwhile the backward pass of
    another thread may run the hooks again. Hooks outlive the injector: ``owner`` says whether there
    still is one, and ``frozen`` what its model did to the backbone.
    """

    def __init__(self) -> None:
        self.owner: weakref.ref[Any] | None = None
        self.frozen: FrozenBackbone | None = None
        self.enabled = True
        self.armed = False
        self.thread: int | None = None
        self.passes = Passes()
        self.now: HookInputs | None = None
        self.this: ForwardPass | None = None

    @property
    def lost(self) -> bool:
        """Whether the injector is gone, and only the hooks are left; not known of copies."""
        return self.owner is not None and self.owner() is None

    def arm(
        self,
        condition: Tensor,
        ready: Mapping[str, Ready] | None = None,
        folded: Mapping[str, Tensor] | None = None,
        this: ForwardPass | None = None,
    ) -> None:
        """Set the condition (B, L, C + 1) of the forward pass that begins.

        Args:
            condition: of each image, or of all.
            ready: see :meth:`Branches.ready`.
            folded: see :meth:`Branches.folded`, of layers that their hooks run again with it.
            this: the pass, where other injectors take part in it; None begins one.
        """
        self.now = HookInputs(condition, ready or {}, folded or {}, torch.compiler.is_compiling())
        self.this = None
        if not torch.compiler.is_compiling():
            self.thread = threading.get_ident()
            if torch.is_grad_enabled():
                self.this = this or self.passes.begin()
                self.this.inputs[self] = self.now
        self.armed = True

    def disarm(self) -> None:
        """End the forward pass; where its graph lives, hooks can run again."""
        self.armed = False
        # Kept, folded weights would be results of the graph that torch.compile makes of the pass.
        self.now = self.this = None

    def inputs(self) -> HookInputs | None:
        """Return what hooks work with, None where this injector takes no part.

        Raises:
            PerceptionError: no forward pass is under way, or hooks run again in a backward pass and
                it cannot be told of which forward pass.
            BackboneError: a hook runs inside reentrant checkpointing.
        """
        if torch.compiler.is_compiling():
            return self._current()
        if self._is_replayed():
            return self._replayed()
        inputs = self._current()
        if inputs is not None and _loses_gradient(inputs.condition):
            raise BackboneError(
                "the network checkpoints its activations with use_reentrant=True, which loses the "
                f"gradient of prompts where the network is frozen: checkpoint {_REENTRANT}"
            )
        return inputs

    def watch(self, output: Any) -> None:
        """See :meth:`ForwardPass.watch`, of the pass under way."""
        if self.this is not None:
            self.this.watch(output)

    def hold(self, features: Tensor) -> None:
        """Keep the pass under way for as long as the graph of these features."""
        if torch.compiler.is_compiling() or self.this is None or self._is_replayed():
            return
        self.this.hold(features)

    def check_fold(self) -> None:
        """Raise where hooks run again while another thread has folded the layers' weights.

        Raises:
            PerceptionError: another thread has.
        """
        if not torch.compiler.is_compiling() and self._is_replayed():
            raise PerceptionError(
                "activation checkpointing runs the network again while another thread restores "
                "with it, its perception folded into the weights; keep threads that restore from "
                "a model that trains, or turn checkpointing off"
            )

    def _is_replayed(self) -> bool:
        """Whether hooks run in a backward pass, and not in one inside the pass under way."""
        if torch._C._current_graph_task_id() == -1:
            return False
        return not self.armed or self.thread != threading.get_ident()

    def _replayed(self) -> HookInputs | None:
        this = self.passes.find_replayed()
        if this is not None:
            return this.inputs.get(self)
        if not self.enabled:
            return None
        raise BackboneError(
            "a backward pass runs the network again, and no forward pass is known that it belongs "
            f"to: stay inside disabled() for both, and checkpoint activations {_REENTRANT}"
        )

    def _current(self) -> HookInputs | None:
        if not self.enabled:
            return None
        if not self.armed:
            if self.lost:
                raise BackboneError(
                    "the model that wrapped this network is gone, and its hooks are still there: "
                    "wrap() it again, which takes them off"
                )
            raise PerceptionError(
                "the wrapped backbone was called by itself, without a fresh perception; call the "
                "PerceiveModel, or use its disabled() context, or unwrap() it (a copy of a wrapped "
                "backbone is still wrapped: copy the model, and unwrap the copy)"
            )
        return self.now

    def __getstate__(self) -> dict[str, Any]:
        # A condition belongs to the graph of one forward pass: it is neither copied nor saved.
        return {"enabled": self.enabled, "passes": self.passes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)


_REENTRANT = "with use_reentrant=False, or not at all"


def _loses_gradient(condition: Tensor) -> bool:
    """Whether a pass with gradient has come into reentrant checkpointing, which takes it off.

    Other networks that turn gradients off, for a part that they have frozen, mean to.
    """
    if torch.is_grad_enabled() or not condition.requires_grad:
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


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
