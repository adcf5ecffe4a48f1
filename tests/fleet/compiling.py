"""Compiling and exporting the networks of the fleet, bare and wrapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from checks import relative, wrapped
from members import Member, seeded
from torch import Tensor, nn

from perceive_adapter import PerceiveModel, Perception

ROUNDING = 1e-5
GRADIENTS = 1e-3  # sums of many terms in another order

Runner = Callable[..., Any]


class Unsupported(Exception):
    """The bare network cannot do it either."""


class WithPerception(nn.Module):
    """A wrapped network with a perception as its second input, all inputs tensors."""

    def __init__(self, member: Member, model: PerceiveModel) -> None:
        super().__init__()
        self.member, self.model = member, model

    def forward(self, image: Tensor, compact: Tensor) -> Any:
        return self.member.call(_given(self.model, Perception(compact=compact)), image)


def compiles(member: Member) -> None:
    """The wrapped network compiles as a whole, and gives what it gives in eager mode."""
    model, image = wrapped(member, trained=True), member.images()
    with torch.no_grad():
        expected = member.run(model, image)
        assert relative(member.run(compiled(model), image), expected) < ROUNDING


def compiles_for_a_given_perception(member: Member) -> None:
    """The same, perceived outside."""
    model, image = wrapped(member, trained=True), member.images()
    with torch.no_grad():
        seen = model.perceive(image * 0.5)
        expected = member.run(_given(model, seen), image)
        assert relative(member.run(_given(compiled(model), seen), image), expected) < ROUNDING


def compiles_to_train(member: Member) -> None:
    """The gradients of a compiled training step are those of an eager one, perceived outside."""
    model, image = wrapped(member, trained=True).train(), member.images()
    with torch.no_grad():
        seen = model.perceive(image)
    expected = _gradient(member, model, _given(model, seen), image)
    actual = _gradient(member, model, _given(compiled(model), seen), image)
    assert relative(actual, expected) < GRADIENTS


def exports(member: Member) -> None:
    """The wrapped network exports with the perception as an input, which steers the program."""
    model = wrapped(member, trained=True).requires_grad_(False)
    first, second = member.images(), member.images(seed=2) * 0.5
    net = WithPerception(member, model)
    with torch.no_grad():
        seen = [model.perceive(image).compact for image in (first, second)]
        program = torch.export.export(net, (first.clone(), seen[0]), strict=False).module()
        for image, compact in zip((first, second), seen, strict=True):
            expected = seeded(net, image, compact)
            assert relative(seeded(program, image, compact), expected) < ROUNDING


def bare_compiles(member: Member) -> None:
    with torch.no_grad():
        member.run(compiled(member.net()), member.images())


def bare_compiles_to_train(member: Member) -> None:
    net = member.net().train()
    _gradient(member, net, compiled(net), member.images())


def bare_exports(member: Member) -> None:
    net = Called(member)
    with torch.no_grad():
        torch.export.export(net, (member.images(),), strict=False)


class Called(nn.Module):
    """A bare network that is called with an image alone."""

    def __init__(self, member: Member) -> None:
        super().__init__()
        self.member, self.net = member, member.net()

    def forward(self, image: Tensor) -> Any:
        return self.member.call(self.net, image)


CHECKS: dict[str, tuple[Callable[[Member], None], Callable[[Member], None]]] = {
    "compiles": (compiles, bare_compiles),
    "compiles for a given perception": (compiles_for_a_given_perception, bare_compiles),
    "compiles to train": (compiles_to_train, bare_compiles_to_train),
    "exports": (exports, bare_exports),
}


def check(member: Member, what: str) -> None:
    """Check the wrapped network, or find that the bare one cannot do it either.

    Raises:
        Unsupported: with the bare network's own reason.
    """
    of_wrapped, of_bare = CHECKS[what]
    try:
        of_wrapped(member)
    except Exception:
        try:
            of_bare(member)
        except Exception as error:
            raise Unsupported(f"{type(error).__name__}: {error}") from error
        raise


def compiled(net: nn.Module) -> Runner:
    """Compile a network as a whole."""
    torch._dynamo.reset()
    return torch.compile(net, backend="aot_eager", fullgraph=True)


def _given(run: Runner, seen: Perception) -> Runner:
    return lambda *args, **kwargs: run(*args, perception=seen, **kwargs)


def _gradient(member: Member, net: nn.Module, run: Runner, image: Tensor) -> Tensor:
    net.zero_grad()
    (member.run(run, image) - 0.3).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
