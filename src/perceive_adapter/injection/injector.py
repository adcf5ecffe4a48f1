"""The hooks: prompt modules at the sites of a backbone, steered by one condition."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.hooks import RemovableHandle
from torch.utils.module_tracker import ModuleTracker

from perceive_adapter.config import AdapterConfig
from perceive_adapter.errors import (
    AlreadyWrappedError,
    BackboneError,
    CompiledBackboneError,
    ConfigError,
    PerceptionError,
    SiteError,
)
from perceive_adapter.injection.branches import Branches
from perceive_adapter.injection.condition import ConditionEncoder
from perceive_adapter.injection.perception import Perception, check_perception
from perceive_adapter.injection.plan import Geometry, Role, Site, SitePlan
from perceive_adapter.injection.prompts import (
    GatedLowRank,
    at_depth,
    build_prompt,
    is_dense,
    is_plain,
    weight_shape,
    with_weight,
)
from perceive_adapter.injection.state import ConditionState, ForwardPass, Lock

__all__ = ["PromptInjector", "check_backbone", "modules_at", "release_lost"]


class Fold:
    """Whether a branch is part of its layer's weight, and where that weight lies in memory.

    By itself, since to set an attribute of a module takes as long as a small operation.
    """

    def __init__(self) -> None:
        self.under_way = False
        self.address = 0


class PromptSite(nn.Module):
    """The prompt module of one site, and the hook that applies it."""

    def __init__(
        self, site: Site, config: AdapterConfig, state: ConditionState, depth: float
    ) -> None:
        super().__init__()
        self.site = site
        self.prompt = build_prompt(site, config)
        self.state = state
        self.depth = depth
        self.is_branch = isinstance(self.prompt, GatedLowRank)
        self.fold = Fold()

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook: give the module's output, changed by the prompt."""
        if self._is_folded(module):
            self.state.check_fold()
            return None
        if (inputs := self.state.inputs()) is None:
            return None
        source = args[0] if args else output
        known: dict[str, Any] = {}
        compiling = torch.compiler.is_compiling()
        if self.is_branch and (inputs.traced or not compiling):
            if args and (weight := inputs.folded.get(self.site.name)) is not None:
                return with_weight(module, source, weight)
            ready = inputs.ready.get(self.site.name)
            if ready is not None and (ready.down is None or ready.down.dtype == source.dtype):
                known["gated"], known["down"] = ready.gated, ready.down
            known["in_place"] = not compiling and self._is_alone(module)
        condition = at_depth(inputs.condition, self.depth)
        changed: Tensor = self.prompt(output, condition, source, **known)
        self.state.hold(changed)
        return changed

    def _is_alone(self, module: nn.Module) -> bool:
        """Whether nobody else has seen the module's output, so that it may be written over."""
        if torch.is_grad_enabled() or not is_plain(module):
            return False
        return len(module._forward_hooks) == 1 and not _global_forward_hooks

    def _is_folded(self, module: nn.Module) -> bool:
        """Whether the layer ran with the folded weight, which some networks put another over."""
        if not self.fold.under_way or torch.compiler.is_compiling():
            return self.fold.under_way
        weight = module._parameters.get("weight")
        return weight is not None and weight.data_ptr() == self.fold.address


class PromptInjector(nn.Module):
    """Prompt modules and the hooks that bring them into a backbone.

    :func:`~perceive_adapter.wrap` does all of this; use the injector by itself to build your own
    model around it. Hooks are bound methods, installed once by :meth:`attach` and switched by
    :attr:`enabled`. The backbone is neither frozen nor registered here.

    Args:
        plan: sites, from :func:`~perceive_adapter.plan_sites`.
        config: kinds of the prompt modules and sources of the condition.

    Attributes:
        attached: whether the hooks are installed.

    Raises:
        ConfigError: the plan was made for prompt modules of other kinds or sizes.

    Example:
        >>> from perceive_adapter import Perception, PromptInjector, plan_sites
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1))
        >>> injector = PromptInjector(plan_sites(net), AdapterConfig())
        >>> injector.attach(net)
        >>> image = torch.rand(1, 3, 32, 32)
        >>> with injector.conditioned(injector.perceive(image)):
        ...     net(image).shape
        torch.Size([1, 3, 32, 32])
        >>> injector.detach()
    """

    def __init__(self, plan: SitePlan, config: AdapterConfig | None = None) -> None:
        super().__init__()
        self.plan = plan
        self.config = config or AdapterConfig()
        self.state = ConditionState()
        self.lock = Lock()
        self.encoder = ConditionEncoder(self.config, plan.image_channels)
        self.levels = self._sites("level")
        self.layers = self._sites("layer")
        self.branches = Branches(
            {
                prompt.site.name: (prompt.prompt, prompt.depth)
                for prompt in self.prompt_sites
                if isinstance(prompt.prompt, GatedLowRank)
            }
        )
        self._check_size()
        self.attached = False
        self._handles: list[RemovableHandle] = []
        self._hooked: dict[tuple[str, str], nn.Module] = {}

    def _check_size(self) -> None:
        """Raise unless the modules have as many parameters as the plan says."""
        count = sum(parameter.numel() for parameter in self.parameters())
        if count != self.plan.parameters:
            raise ConfigError(
                f"the plan is of {self.plan.parameters:,} parameters, and with this config there "
                f"are {count:,}; expected the config that the plan was made with: "
                "plan_sites(backbone, config=config)"
            )

    def _sites(self, role: Role) -> nn.ModuleDict:
        sites = self.plan.of(role)
        if sites and getattr(self.config, role) is None:
            raise ConfigError(
                f"the plan has {role} sites, and the config {role}=None leaves them without a kind "
                "of prompt module; expected the config that the plan was made with: "
                "plan_sites(backbone, config=config)"
            )
        return nn.ModuleDict(
            {
                f"/{site.name}".replace(".", "/"): PromptSite(
                    site, self.config, self.state, depth=i / len(sites)
                )
                for i, site in enumerate(sites)
            }
        )

    @property
    def prompt_sites(self) -> list[PromptSite]:
        """The sites with their prompt modules, levels first."""
        return [cast(PromptSite, s) for s in (*self.levels.values(), *self.layers.values())]

    @property
    def enabled(self) -> bool:
        """Whether the hooks change anything."""
        return self.state.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.state.enabled = value

    def attach(self, backbone: nn.Module, *, beside_others: bool = False) -> None:
        """Install the hooks, after checking that every site is there.

        Args:
            backbone: the network.
            beside_others: whether the backbone may carry the hooks of other injectors.

        Raises:
            CompiledBackboneError: the backbone is compiled or scripted.
            AlreadyWrappedError: it carries the hooks of an injector, or this one is attached.
            SiteError: a site is missing, or its module has another shape or geometry.
        """
        if self.attached:
            raise AlreadyWrappedError("this injector is attached already; detach() it first")
        release_lost(backbone)
        check_backbone(backbone, hooked=beside_others, without_weights=True)
        self._hooked = modules_at(self.plan, backbone)
        self._handles = [
            self.module_at(prompt.site).register_forward_hook(prompt.hook)
            for prompt in reversed(self.prompt_sites)  # a layer's branch before its level's change
        ]
        self.state.owner = weakref.ref(self)
        self.attached = True

    def detach(self) -> None:
        """Remove the hooks; the prompt modules stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._hooked = {}
        self.state.owner = self.state.frozen = None
        self.attached = False

    def module_at(self, site: Site) -> nn.Module:
        """Return the module of the attached backbone at ``site``."""
        return self._hooked[site.role, site.name]

    def foldable(self, *, traced: bool = False) -> list[tuple[nn.Module, PromptSite, nn.Parameter]]:
        """Return the layers whose weights branches can be a part of, with both.

        Not those that do more than their kind does, nor where somebody else's hook, or one of all
        modules, has changed the output before the branch is added.

        Args:
            traced: torch.compile is at work, which cannot tell whose a hook is; then not where
                other injectors have hooks either.
        """
        found: list[tuple[nn.Module, PromptSite, nn.Parameter]] = []
        if _all_modules_hooked(traced):
            return found
        for prompt in self.prompt_sites:
            module = self.module_at(prompt.site)
            weight = module._parameters.get("weight")
            rewritten = f"{prompt.site.name}.weight" in self.plan.rewritten
            if weight is None or rewritten or not (prompt.is_branch and is_plain(module)):
                continue
            if traced:
                own = 2 if ("level", prompt.site.name) in self._hooked else 1
                ours = len(module._forward_hooks) == own
            else:
                owners = [
                    getattr(hook, "__self__", None) for hook in module._forward_hooks.values()
                ]
                ours = all(isinstance(owner, PromptSite) for owner in owners)
            if ours:
                found.append((module, prompt, weight))
        return found

    def perceive(self, image: Tensor) -> Perception:
        """Return the compact features of images (B, C, H, W) in [0, 1].

        Raises:
            PerceptionError: this injector's sources do not include the compact features.
        """
        if self.encoder.compact is None:
            raise PerceptionError(
                f"this adapter is steered by {', '.join(self.encoder.sources)}, not by compact "
                "features; give it perception=Perception(...)"
            )
        return Perception(compact=self.encoder.compact(image))

    def treat(self, columns: tuple[int, ...] | None) -> None:
        """Limit the prompts to images in which one of these degradations is perceived.

        Args:
            columns: of ``perception.degradations``; None lifts the limit.

        Raises:
            ConfigError: a column is not there.
        """
        config = dataclasses.replace(self.config, treats=columns)
        self.encoder.treat(columns)
        self.config = config

    def arm(self, condition: Tensor, this: ForwardPass | None = None) -> None:
        """Set the condition (B, L, C + 1) for the forward pass that follows.

        Args:
            condition: of each image, or of all.
            this: the pass, where other injectors of the backbone take part in it.
        """
        folded = self._folded_in_trace(condition) if this is None else {}
        ready = {} if folded else self.branches.ready(condition, self._dtype(condition))
        self.state.arm(condition, ready, folded, this)

    def _dtype(self, condition: Tensor) -> torch.dtype:
        """The dtype of the first layer with a branch that holds its weight as it is."""
        for (role, _), module in self._hooked.items():
            weight = module._parameters.get("weight")
            if role == "layer" and weight is not None:
                return weight.dtype
        return condition.dtype

    def _folded_in_trace(self, condition: Tensor) -> dict[str, Tensor]:
        """Folded weights by name, where torch.compile traces a pass of one condition.

        The hooks then run their layers once more, with these; the first run, which nobody uses, is
        no part of what is compiled. A layer with others' hooks keeps its branch.
        """
        traced = torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled()
        if not (traced and self.plan.folds and condition.shape[0] == 1):
            return {}
        foldable = self.foldable(traced=True)
        weights = {prompt.site.name: weight for _, prompt, weight in foldable}
        return self.branches.folded(condition, weights)

    def check_idle(self) -> None:
        """Raise where the backbone runs with a perception already; the caller holds the lock.

        Raises:
            PerceptionError: a forward pass or a fold is under way.
        """
        if self.state.armed:
            raise PerceptionError(
                "the backbone runs with another perception already; leave that context first"
            )

    def disarm(self) -> None:
        """End the forward pass; its backward pass still finds the condition."""
        self.state.disarm()

    @contextmanager
    def conditioned(self, perception: Perception) -> Iterator[None]:
        """Let the backbone run with ``perception``, as often as wanted, inside the context.

        Raises:
            PerceptionError: a pass of another perception is under way in this thread, or it is no
                perception, or not one that this injector's sources fit.
        """
        check_perception(perception)
        with self.lock:
            self.check_idle()
            self.arm(self.encoder(perception))
            try:
                yield
            finally:
                self.disarm()


def release_lost(backbone: nn.Module) -> None:
    """Take off the hooks that are left of a model that is gone, and undo what it did.

    In a notebook a cell that wraps a network is run again, and nobody has the first model any more.
    Where one of the injectors is still there, nothing is done.
    """
    if not isinstance(backbone, nn.Module):
        return
    hooks = [
        (module, key, site.state)
        for module in backbone.modules()
        for key, hook in module._forward_hooks.items()
        if isinstance(site := getattr(hook, "__self__", None), PromptSite)
    ]
    if not all(state.lost for _, _, state in hooks):
        return
    for module, key, _ in hooks:
        del module._forward_hooks[key]
    for frozen in {id(state.frozen): state.frozen for _, _, state in hooks}.values():
        if frozen is not None:
            frozen.release()


def check_backbone(
    backbone: nn.Module, *, hooked: bool = False, without_weights: bool = False
) -> None:
    """Raise if hooks cannot be installed on ``backbone`` as it is.

    Args:
        backbone: what a user gave.
        hooked: whether it may carry the hooks of an injector already.
        without_weights: whether it may be on the meta device.

    Raises:
        BackboneError: no module, in a wrapper for several devices, on several devices, on the meta
            device, or with weights that were made under ``torch.inference_mode()``.
        CompiledBackboneError: compiled or scripted.
        AlreadyWrappedError: it carries the hooks of an injector.
    """
    if not isinstance(backbone, nn.Module):
        raise BackboneError(
            f"the backbone is a {type(backbone).__name__}; expected a torch.nn.Module (of a "
            "spandrel descriptor, take .model)"
        )
    if isinstance(backbone, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise BackboneError(
            f"the backbone is a {type(backbone).__name__}, which would neither copy prompt modules "
            "nor average their gradients; wrap the network in it, its .module, and put "
            "nn.parallel.DistributedDataParallel around the result"
        )
    for module in backbone.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CompiledBackboneError("the backbone is scripted; wrap the Python module instead")
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None):
            raise CompiledBackboneError(
                "the backbone is compiled, so new hooks would be ignored; wrap the original "
                "first and compile the result: torch.compile(wrap(backbone))"
            )
        for hook in module._forward_hooks.values():
            if not hooked and isinstance(getattr(hook, "__self__", None), PromptSite):
                raise AlreadyWrappedError(
                    "the backbone is wrapped already; use the model that wraps it, its "
                    "add_adapter(), or unwrap() it first (of a copy: copy the model, and unwrap "
                    "that)"
                )
    _check_tensors(backbone, without_weights)


def _check_tensors(backbone: nn.Module, without_weights: bool) -> None:
    tensors = [*backbone.parameters(), *backbone.buffers()]
    if any(map(torch.nn.parameter.is_lazy, tensors)):
        raise BackboneError(
            "the backbone has lazy modules whose shapes are not known yet; run it once on an image "
            "before it is wrapped"
        )
    if any(parameter.is_inference() for parameter in backbone.parameters()):
        raise BackboneError(
            "the backbone's weights were made under torch.inference_mode(), where no gradient can "
            "ever pass them; build or load the network outside of it, or under torch.no_grad()"
        )
    devices = {tensor.device for tensor in backbone.parameters()}
    if len(devices) > 1 or (torch.device("meta") in devices and not without_weights):
        raise BackboneError(
            f"the backbone's parameters are on {', '.join(sorted(map(str, devices)))}; move it to "
            "one real device first (a saved adapter may also be wrapped around one on the meta "
            "device, whose weights come later)"
        )


def _all_modules_hooked(traced: bool) -> bool:
    """Whether every module has a hook, other than that by which torch counts operations."""
    if traced:
        return len(_global_forward_hooks) > 0
    owners = [getattr(hook, "__self__", None) for hook in _global_forward_hooks.values()]
    return not all(isinstance(owner, ModuleTracker) for owner in owners)


def modules_at(plan: SitePlan, backbone: nn.Module) -> dict[tuple[str, str], nn.Module]:
    """Return the module of ``backbone`` at the (role, name) of every site.

    Raises:
        SiteError: a site is missing, or its module has another shape or geometry.
    """
    modules = dict(backbone.named_modules())
    for site in plan:
        _check_site(site, modules.get(site.name), type(backbone).__name__)
    return {(site.role, site.name): modules[site.name] for site in plan}


def _check_site(site: Site, module: nn.Module | None, backbone: str) -> None:
    if module is None:
        raise SiteError(f"site {site.name!r} is no module of this {backbone}")
    if site.role == "level":
        return
    shape = weight_shape(module)
    geometry = Geometry.of(module) if isinstance(module, nn.Conv2d) else None
    if not is_dense(module) or shape != site.weight_shape or geometry != site.geometry:
        raise SiteError(
            f"site {site.name!r} of this {backbone} is a {type(module).__name__} with weight "
            f"{shape}, {geometry}; the plan expects {site.weight_shape}, {site.geometry}"
        )
