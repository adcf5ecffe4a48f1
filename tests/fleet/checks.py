"""What every network of the fleet goes through, from wrapping to unwrapping."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from members import Member
from torch import Tensor, nn

from perceive_adapter import PerceiveModel, SitePlan, wrap

STEPS = 3
ROUNDING = 1e-4


@dataclass
class Outcome:
    """What came of one network.

    Args:
        plan: its sites; None where it cannot be wrapped.
        seconds: what wrapping took, of one core.
        failures: the traceback of each check that failed.
    """

    plan: SitePlan | None = None
    seconds: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)


def wrapped(member: Member, *, trained: bool = False) -> PerceiveModel:
    """Wrap a new network, in eval mode; ``trained`` moves the prompts away from the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = wrap(member.net(), perceiver=False, **member.wrap)
        if trained:
            for parameter in model.trainable_parameters():
                nn.init.normal_(parameter, std=0.05)
    return model


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation as a share of the largest value."""
    assert actual.shape == expected.shape
    assert expected.isfinite().all()
    return float(((actual - expected).abs().max() / expected.abs().max()).detach())


def identical(member: Member, model: PerceiveModel) -> None:
    """At step 0 the output is the frozen bare network's, bit for bit.

    Where gradients are on, torch takes other kernels for attention, with other rounding.
    """
    net = member.net().requires_grad_(False)
    for image in (member.images(1), member.images()):
        with torch.no_grad():
            expected = member.run(net, image)
            assert torch.equal(member.run(model, image), expected)
        assert relative(member.run(model, image), expected) < ROUNDING


def trains(member: Member, model: PerceiveModel) -> None:
    """Three steps change the output, and gradients reach every parameter that is not blocked."""
    blocked = {
        id(p)
        for site in model.injector.prompt_sites
        for p in site.parameters()
        if site.site.name in model.sites.blocked
    }
    waiting = {n for n, p in model.named_parameters() if p.requires_grad and id(p) not in blocked}
    optimizer = torch.optim.Adam(model.trainable_parameters(), lr=0.01)
    image = member.images()
    with torch.no_grad():
        before = member.run(model, image)
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        (member.run(model, image) - 0.3).square().mean().backward()
        optimizer.step()
        waiting -= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.eval()
    assert waiting == set()
    with torch.no_grad():
        after = member.run(model, image)
    assert after.isfinite().all()
    assert not torch.equal(after, before)


def folds(member: Member, model: PerceiveModel) -> None:
    """Branches that are folded into the weights do what they do as hooks."""
    image = member.images()
    with torch.no_grad():
        seen = model.perceive(image[:1])
        hooked = member.run(lambda *a, **k: model(*a, perception=seen, **k), image)
        with model.fold(seen):
            assert relative(member.run(model, image), hooked) < ROUNDING
        with model.disabled():
            assert relative(member.run(model, image), hooked) > 0


def reloads(member: Member, model: PerceiveModel) -> None:
    """What is saved gives a new copy of the network the same output."""
    image = member.images()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        expected = member.run(model, image)
        model.save_pretrained(folder)
        # torch.matmul rounds otherwise where no factor requires a gradient, on some processors.
        again = wrap(member.net(), folder, is_trainable=True)
        assert torch.equal(member.run(again, image), expected)


def unwraps(member: Member, model: PerceiveModel) -> None:
    """The bare network comes back as it was."""
    net, image = member.net(), member.images()
    with torch.no_grad():
        expected = member.run(net, image)
    back = model.unwrap()
    with torch.no_grad():
        assert torch.equal(member.run(back, image), expected)
    assert list(back.state_dict()) == list(net.state_dict())
    for name, value in net.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
    assert _wiring(back) == _wiring(net)


def _wiring(net: nn.Module) -> list[object]:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    return [hooks, [p.requires_grad for p in net.parameters()]]


CHECKS: dict[str, Callable[[Member, PerceiveModel], None]] = {
    "identical": identical,
    "trains": trains,
    "folds": folds,
    "reloads": reloads,
    "unwraps": unwraps,
}


def timed(member: Member) -> tuple[PerceiveModel, float]:
    """Wrap a new network, and say how many seconds of one core that took."""
    net = member.net()
    start = time.process_time()
    model = wrap(net, perceiver=False, **member.wrap)
    return model, time.process_time() - start


def run_checks(member: Member) -> Outcome:
    """Send one network through every check, each going on where the one before ended."""
    outcome = Outcome()
    try:
        model, outcome.seconds = timed(member)
    except Exception:
        outcome.failures["wraps"] = traceback.format_exc()
        return outcome
    outcome.plan = model.sites
    for name, check in CHECKS.items():
        try:
            check(member, model)
        except Exception:
            outcome.failures[name] = traceback.format_exc()
    return outcome
