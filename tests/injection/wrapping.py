"""What the tests of wrapped networks share: trained-looking adapters, snapshots, comparisons."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import CASES, Case

from perceive_adapter import AdapterConfig, PerceiveModel, Perception, PromptInjector, wrap

KINDS = {
    "modulation": AdapterConfig(layer=None),
    "cross_attention": AdapterConfig(level="cross_attention", layer=None),
    "low_rank": AdapterConfig(level=None),
    "all": AdapterConfig(level="cross_attention", rank=4),
}
# "all" has the other kinds in it, so they go apart only to networks that differ in their layouts.
LAYOUTS = ("u_shape", "tokens", "nhwc", "windows", "sequence_first", "attention", "mixed", "shared")
PAIRS = [(case, kind) for case in CASES for kind in KINDS if kind == "all" or case in LAYOUTS]


def moved(module: nn.Module, seed: int = 0, scale: float = 0.05) -> None:
    """Move every parameter, as training does, so that prompts no longer are the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += scale * noise.to(parameter)


def wrapped(case: Case | str, *, trained: bool = True, seed: int = 0, **options: Any) -> Any:
    """Wrap a new network of the zoo; ``trained`` moves the adapter away from the identity.

    Without a perceiver, unless one is given: most tests are of what the prompts do.
    """
    case = CASES[case] if isinstance(case, str) else case
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = wrap(case.net(seed), **{"perceiver": False, **case.wrap, **options})
    if trained:
        moved(model.injector)
    return model


def oracle(batch: int, seed: int = 0, width: int = 64) -> Perception:
    """Perceptions that differ from image to image far more than small random images do."""
    generator = torch.Generator().manual_seed(seed)
    return Perception(compact=F.normalize(torch.randn(batch, width, generator=generator), dim=1))


def injector_like(model: PerceiveModel, seed: int = 0) -> PromptInjector:
    """Another adapter for the same sites."""
    injector = PromptInjector(model.sites, model.injector.config)
    moved(injector, seed)
    return injector


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation as a share of the largest value."""
    assert actual.shape == expected.shape
    return float(((actual - expected).abs().max() / expected.abs().max()).detach())


def state(net: nn.Module) -> list[object]:
    """All that could be changed of a network and of the random state, comparable by ``==``."""
    tensors = [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        [(name, id(t), t.requires_grad, t.grad is None, _bits(t)) for name, t in tensors],
        list(net.state_dict()),
        [(name, m.training, sorted(vars(m))) for name, m in net.named_modules()],
        [[len(getattr(m, hook)) for hook in hooks] for m in net.modules()],
        _bits(torch.get_rng_state()),
    ]


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes()
