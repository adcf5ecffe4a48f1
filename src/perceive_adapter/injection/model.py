"""The wrapped model: the user's backbone, adapters at its sites, perception in front."""

from __future__ import annotations

import copy
import dataclasses
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from perceive_adapter.data.images import Image
from perceive_adapter.errors import (
    BackboneError,
    CompiledBackboneError,
    ConfigError,
    ImageError,
    PerceptionError,
)
from perceive_adapter.hub import HubOptions, PushOptions, check_options, push_folder
from perceive_adapter.injection.adapters import AdapterSet
from perceive_adapter.injection.checkpoint import read_beside, save_adapter
from perceive_adapter.injection.folding import folded_weights
from perceive_adapter.injection.freezing import FrozenBackbone, hold_in_eval
from perceive_adapter.injection.injector import PromptInjector
from perceive_adapter.injection.perception import Perception, ValueRange, check_perception
from perceive_adapter.injection.plan import SitePlan
from perceive_adapter.injection.probe import check_image
from perceive_adapter.injection.restore import find_multiple, restore_image
from perceive_adapter.injection.status import AdapterStatus
from perceive_adapter.injection.steering import (
    Steering,
    check_sources,
    see,
    widths,
    with_compact,
)

__all__ = ["PerceiveModel"]

FOLD_FROM = 128 * 128


class PerceiveModel(nn.Module):
    """A restoration network that perceives what is wrong with an image; made by :func:`~.wrap`.

    It is called as the backbone is, and gives what the backbone gives. The backbone is frozen:
    ``train()`` leaves its normalisation statistics alone, and what trains are the prompt modules
    and the compact features, see :meth:`trainable_parameters`.

    Without gradients, and with one perception for the whole batch, the gated low-rank branches are
    folded into the weights for the length of the forward pass (by :meth:`restore` always, by a call
    from 128 x 128 pixels on); the parameters themselves are never written to. Calls from several
    threads take turns.

    Args:
        backbone: checked and planned by :func:`~.wrap`; frozen and hooked here.
        injector: prompt modules for it.
        steering: the models that perceive, which are frozen here; None for none.
        image_arg: position or keyword of the image, and the name that position has.
        value_range: of the images that the backbone takes and gives.
    """

    def __init__(
        self,
        backbone: nn.Module,
        injector: PromptInjector,
        steering: Steering | None = None,
        *,
        image_arg: tuple[int | None, str | None] = (0, None),
        value_range: ValueRange | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        steering = steering or Steering()
        self.perceiver = steering.perceiver
        self.perceiver_name = steering.perceiver_name
        self.perceiver_fingerprint = steering.perceiver_fingerprint
        self.semantic = steering.semantic
        self.semantic_fingerprint = steering.semantic_fingerprint
        self.image_arg = image_arg
        self.value_range = value_range or ValueRange()
        self._multiple: int | None = None
        self._folded: Perception | None = None
        self._compiled = False
        for tower in (self.perceiver, self.semantic):
            if tower is not None:
                tower.requires_grad_(False).eval()
        self.adapters = AdapterSet(backbone, "default", injector)  # what may fail came before
        self.frozen = FrozenBackbone(backbone)
        self._tell_hooks()
        self.training = backbone.training  # not train(), which would undo an eval() of its parts
        self.adapters.train(backbone.training)
        hold_in_eval(backbone, self.sites.eval_only, training=backbone.training)

    # Running

    def forward(
        self,
        *args: Any,
        perception: Perception | None = None,
        adapter_names: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Restore, with the backbone's own arguments and result.

        Args:
            *args: as the backbone's.
            perception: what is known of the images, made elsewhere; None perceives the image.
            adapter_names: for each image of the batch the adapter that restores it, None for the
                bare backbone; without the list the active adapter restores all of them. A compiled
                model is compiled anew for each list, so keep to few, sorted ones.
            **kwargs: as the backbone's.

        Raises:
            ImageError: the image is no floating-point (B, C, H, W) tensor on the model's device.
            PerceptionError: the perception does not fit the batch or the adapter.
            ConfigError: an adapter's name is unknown, or there is not one for each image.
            BackboneError: the model was unwrapped, or is traced by ``torch.jit``.
        """
        if torch.compiler.is_compiling():  # no locks there
            return self._run_traced(perception, adapter_names, args, kwargs)
        if torch._C._get_tracing_state() is not None and self.perceiver is not None:
            raise BackboneError(
                "torch.jit.trace cannot follow how an image is cut for the perceiver: use "
                "torch.export, or torch.onnx.export(..., dynamo=True)"
            )
        if getattr(self, "_is_replica", False):
            raise BackboneError(
                "nn.DataParallel copies the model without its hooks' prompt modules: use "
                "nn.parallel.DistributedDataParallel, which takes a wrapped network as any other"
            )
        with self._in_turn() as injector:
            if not injector.enabled:
                self.adapters.check_known(adapter_names or ())
                return self.backbone(*args, **kwargs)
            image = self._image(args, kwargs)
            if self._folded is not None:
                self._check_folded(perception, adapter_names)
                return self.backbone(*args, **kwargs)
            if adapter_names is not None:
                conditions = self._conditions(adapter_names, perception, image)
                with self.adapters.mixed(conditions, adapter_names) as this:
                    output = self.backbone(*args, **kwargs)
                if this is not None:
                    this.watch(output)
                return output
            perception = self._perception(perception, image)
            if self._folds(perception, image):
                with self.fold(perception):
                    return self.backbone(*args, **kwargs)
            with injector.conditioned(perception):
                output = self.backbone(*args, **kwargs)
                injector.state.watch(output)
            return output

    def _run_traced(
        self,
        perception: Perception | None,
        adapter_names: Sequence[str | None] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run under torch.compile or torch.export."""
        self._check_wrapped()
        injector = self.injector
        if torch.compiler.is_dynamo_compiling():  # an exported graph is a copy
            self._compiled = True
        if not injector.enabled:
            return self.backbone(*args, **kwargs)
        if self._folded is not None:
            self._check_folded(perception, adapter_names)
            return self.backbone(*args, **kwargs)
        image = self._image(args, kwargs)
        try:
            if adapter_names is not None:
                self.adapters.arm(self._conditions(adapter_names, perception, image), adapter_names)
            else:
                injector.arm(injector.encoder(self._perception(perception, image)))
            return self.backbone(*args, **kwargs)
        finally:
            if adapter_names is not None:
                self.adapters.disarm()
            else:
                injector.disarm()

    def perceive(self, image: Tensor) -> Perception:
        """Perceive images, in the backbone's value range, once and as a whole.

        Args:
            image: (B, C, H, W). Large images are perceived in evenly spread native views.

        Returns:
            What this model's sources are: compact features (with gradient, as they are trained),
            the perceiver's outputs and semantic vectors (without).

        Raises:
            ImageError: the image is no floating-point (B, C, H, W) tensor on the model's device.
        """
        unit = self.value_range.to_unit(self._checked(image))
        return with_compact(see(self.perceiver, self.semantic, unit), self.injector, unit)

    def restore(
        self,
        image: Image,
        *,
        tile: int | None = None,
        overlap: int = 32,
        batch_size: int = 1,
        perception: Perception | None = None,
    ) -> Any:
        """Restore one image, or a batch, of any common kind and size; without gradients.

        Args:
            image: a path or a PIL image, which are turned upright as EXIF says, an array (H, W),
                (H, W, C) or a tensor (H, W), (C, H, W), (B, C, H, W); C = 1 gray, 3 RGB, 2 or 4
                with alpha; uint8 in [0, 255] or floating-point in [0, 1]. Alpha is passed through.
            tile: side of the tiles in pixels, for images that do not fit into memory; None runs
                the whole image at once. All tiles share the perception of the whole image.
            overlap: how many pixels neighbouring tiles share; of it the outer three eighths
                are discarded and the middle quarter is blended.
            batch_size: tiles per forward pass.
            perception: of the image, or of each of a batch, made elsewhere; None perceives it.

        Returns:
            The restored image, of the same kind and dtype (a path gives a PIL image), and of the
            same size times the backbone's scale. Floating-point images are not clamped.

        Raises:
            ImageError: the image is of another kind, is empty, or has NaN or infinite values.
            PerceptionError: the perception is of another number of images, or lacks what steers
                the adapter.
            ConfigError: a tile that is not larger than twice the overlap, or a number of another
                kind.
            BackboneError: the network needs more than the image, or gives NaN or another size, or
                the model was unwrapped.
        """
        return restore_image(
            self, image, perception, tile=tile, overlap=overlap, batch_size=batch_size
        )

    @contextmanager
    def fold(self, perception: Perception) -> Iterator[None]:
        """Run everything inside the context with one perception, folded into the weights.

        For many forward passes of one image, such as its tiles, without gradients: those of other
        networks inside the context have none either. Other threads wait; coroutines of the same
        thread do not, so leave no ``await`` inside. Inside :meth:`disabled` it does nothing.

        Raises:
            PerceptionError: the perception is of more than one image, or a fold, or a forward pass
                of another perception, is under way.
            BackboneError: the model was unwrapped.
        """
        check_perception(perception)
        if perception.batch != 1:
            raise PerceptionError(
                f"fold() takes the perception of one image, and this is of {perception.batch}"
            )
        with self._in_turn(folded=False) as injector:
            if not injector.enabled:
                yield
                return
            injector.check_idle()
            with torch.no_grad():
                condition = injector.encoder(perception)
            try:
                with folded_weights(injector, condition), torch.no_grad():
                    self._folded = perception
                    injector.state.arm(condition)  # branches that are folded need no more
                    yield
            finally:
                self._folded = None
                injector.disarm()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the bare backbone inside the context. Other threads wait.

        Coroutines of the same thread do not wait: leave no ``await`` inside.

        Raises:
            PerceptionError: a fold is under way.
            BackboneError: the model was unwrapped.
        """
        with self._in_turn(folded=False):
            before, self.injector.enabled = self.injector.enabled, False
            try:
                yield
            finally:
                self.injector.enabled = before  # of the adapter that is active by now

    @contextmanager
    def _in_turn(self, *, folded: bool = True) -> Iterator[PromptInjector]:
        """Wait for other threads, then give the active injector.

        Args:
            folded: whether a fold may be under way.

        Raises:
            BackboneError: the model was unwrapped.
            PerceptionError: a fold is under way, and may not be.
        """
        with self.adapters.lock:
            self._check_wrapped()
            if not folded:
                self._check_unfolded()
            yield self.injector

    def _check_wrapped(self) -> None:
        if not self.injector.attached:
            raise BackboneError("this model was unwrapped; wrap the backbone again")

    def _check_unfolded(self) -> None:
        if self._folded is not None:
            raise PerceptionError("fold() is under way already; leave that context first")

    def _check_folded(
        self, perception: Perception | None, adapter_names: Sequence[str | None] | None
    ) -> None:
        if adapter_names is not None or not (perception is None or perception is self._folded):
            raise PerceptionError(
                "another perception, or names of adapters, were given inside fold(); leave "
                "the context first"
            )

    # State

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the weights, as any module does; waits for other threads.

        Raises:
            PerceptionError: a fold is under way, in which the backbone has other weights.
        """
        with self.adapters.lock:
            self._check_unfolded()
            return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights, as any module does; waits for other threads.

        Raises:
            PerceptionError: a fold is under way, at the end of which they would be lost.

        Warns:
            UserWarning: parts of the backbone are unfrozen, and the weights of the frozen ones are
                of another network, so that :meth:`unwrap` will not put back what was there.
        """
        with self.adapters.lock:
            self._check_unfolded()
            return super().load_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self._check_unfolded()  # a module around this one loads its weights
        start = f"{prefix}backbone."
        weights = {k.removeprefix(start): v for k, v in state_dict.items() if k.startswith(start)}
        self.frozen.warn_of_others(weights)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with self.adapters.lock:  # .to() and the like put other weights in place
            self._check_unfolded()
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> PerceiveModel:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(self._copied(memo))
        copied._tell_hooks()
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._tell_hooks()

    def _tell_hooks(self) -> None:
        """Tell the hooks, which outlive the model, what was done to the backbone."""
        for name in self.adapters:
            injector = self.adapters.named(name)
            if injector.attached:
                injector.state.owner = weakref.ref(injector)
                injector.state.frozen = self.frozen

    def __getstate__(self) -> dict[str, Any]:
        # Modules of its own, of the same tensors: pickle reads them when others may fold again.
        plain = (x for module in self.modules() for x in vars(module).values())
        tensors = chain(self.parameters(), self.buffers(), plain)
        return self._copied({id(x): x for x in tensors if isinstance(x, Tensor)})

    def _copied(self, memo: dict[int, Any]) -> dict[str, Any]:
        """Copy what the model holds; waits for other threads. No context reaches into a copy."""
        with self.adapters.lock:
            self._check_unfolded()
            state = {**super().__getstate__(), "_compiled": False}  # type: ignore[no-untyped-call]
            copied: dict[str, Any] = copy.deepcopy(state, memo)
        copied["_modules"]["adapters"].disarm()
        return copied

    @property
    def injector(self) -> PromptInjector:
        """The active adapter's prompt modules and hooks."""
        return self.adapters.injector

    @property
    def sites(self) -> SitePlan:
        """The active adapter's sites; prints as a table."""
        return self.injector.plan

    @property
    def size_multiple(self) -> int:
        """What the backbone needs height and width to be a multiple of; found at first use."""
        self._check_wrapped()
        if self._multiple is None:
            with self._in_turn(folded=False):
                self._multiple = find_multiple(self)
        return self._multiple

    def status(self) -> AdapterStatus:
        """Tell which adapters and sites there are, which are active, and what trains."""
        plan = self.sites
        return AdapterStatus(
            adapters=tuple(self.adapters),
            active=self.adapters.active,
            enabled=self.injector.enabled,
            levels=tuple(site.name for site in plan.of("level")),
            layers=tuple(site.name for site in plan.of("layer")),
            blocked=plan.blocked,
            trainable=sum(p.numel() for p in self.trainable_parameters()),
            total=plan.backbone_parameters + sum(p.numel() for p in self.injector.parameters()),
            unfrozen=tuple(n for n, p in self.backbone.named_parameters() if p.requires_grad),
            treats=self._treated(),
        )

    def _treated(self) -> tuple[str, ...] | None:
        """What the active adapter treats: columns, where no perceiver names them."""
        columns = self.injector.config.treats
        if columns is None:
            return None
        names = self.perceiver.degradations if self.perceiver is not None else ()
        return tuple(names[c] if c < len(names) else f"column {c}" for c in columns)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over what an optimizer is to be given."""
        return (p for p in self.parameters() if p.requires_grad)

    def print_trainable_parameters(self) -> None:
        """Print one line: how many parameters train, of how many, at how many sites."""
        print(self.status())

    def unfreeze(self, *patterns: str) -> list[str]:
        """Let parameters of the backbone train too, and be saved with the adapter.

        Args:
            *patterns: dotted parameter names or globs; ``"**"`` is everything.

        Returns:
            The names of the parameters that train now. :meth:`unwrap` puts their values back.

        Raises:
            SiteError: a pattern matches no parameter.
            PerceptionError: a fold is under way.
            BackboneError: the model was unwrapped.
        """
        with self._in_turn(folded=False):
            names = self.frozen.unfreeze(patterns)
            hold_in_eval(self.backbone, self.sites.eval_only, training=self.training)
            return names

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Let the active adapter and what :meth:`unfreeze` named train, or not; no others."""
        with self.adapters.lock:
            self.injector.requires_grad_(requires_grad)
            self.frozen.requires_grad_(requires_grad)
        return self

    def treat(self, *degradations: str) -> None:
        """Let the active adapter work only where one of these degradations is perceived.

        On other images the backbone is left alone: its own task stays as it is, and so does
        whatever the adapter has never been trained on. What is perceived to be faint is touched
        faintly. :meth:`save_pretrained` keeps the limit, a ``state_dict`` holds weights alone.

        Args:
            *degradations: of ``model.perceiver.degradations``; none lifts the limit.

        Raises:
            ConfigError: a name is not among them, or nothing tells the adapter of degradations.
            PerceptionError: a fold is under way.
            BackboneError: the model was unwrapped.
        """
        known = self.perceiver.degradations if self.perceiver is not None else ()
        if unknown := [name for name in degradations if name not in known]:
            told = f"tells {', '.join(known)}" if known else "is not there or tells none"
            raise ConfigError(
                f"{', '.join(map(str, unknown))} cannot be told apart: this model's perceiver "
                f'{told}. Name some of these one by one, as in treat("rain", "haze"), or wrap '
                "with a perceiver that tells degradations"
            )
        columns = tuple(known.index(name) for name in dict.fromkeys(degradations))
        with self._in_turn(folded=False):
            self.injector.treat(columns or None)

    def train(self, mode: bool = True) -> PerceiveModel:
        """Set training mode; normalisation statistics and frozen towers stay as they are.

        So do the modules of ``sites.eval_only``.
        """
        with self.adapters.lock:
            self.training = mode
            for part in self.children():
                if part not in (self.perceiver, self.semantic):
                    part.train(mode)
            if self.injector.attached:
                hold_in_eval(self.backbone, self.sites.eval_only, training=mode)
        return self

    # Adapters

    @torch.inference_mode(False)  # what is made there could not be trained
    def add_adapter(
        self,
        name: str,
        adapter: PromptInjector | str | os.PathLike[str] | None = None,
        **hub_options: Unpack[HubOptions],
    ) -> None:
        """Add another adapter, inactive until :meth:`set_adapter`, or named for an image.

        Args:
            name: a new one.
            adapter: a saved one's folder or Hub repository, prompt modules made elsewhere, or None
                for a new one at the active adapter's sites, which works on every image until
                :meth:`treat`.
            **hub_options: of its Hub repository: ``revision``, ``token``, ``cache_dir``,
                ``local_files_only``.

        Raises:
            ConfigError: the name is taken or cannot be one, there are options of no repository, or
                prompt modules expect something else to steer them than this model has.
            SiteError: its sites do not fit the backbone.
            CheckpointError: the saved adapter is missing, damaged, of another backbone, or steered
                by something else than this model has.
            CompiledBackboneError: the model has been compiled, and would ignore it.
            PerceptionError: a fold is under way.
            BackboneError: the model was unwrapped.
        """
        saved = None if isinstance(adapter, PromptInjector) else adapter
        check_options(hub_options, "add_adapter", saved)
        self._check_wrapped()
        self.adapters.check_new(name)
        if self._compiled:
            raise CompiledBackboneError(
                "the model has been compiled, and would ignore the hooks of another "
                "adapter: add adapters before, which costs nothing while they are not active, or "
                "put other weights into one with hotswap_adapter()"
            )
        trains = True
        if isinstance(adapter, PromptInjector):
            check_sources(adapter.encoder.sources, widths(self.perceiver, self.semantic))
        elif adapter is None:
            config = dataclasses.replace(self.injector.config, treats=None)
            with torch.device("cpu"):  # the same weights for one seed, wherever the model is
                adapter = PromptInjector(self.sites, config)
        else:
            adapter = read_beside(self, adapter, **hub_options).injector
            if adapter.config.semantic is not None:  # whose weights are where this model's are
                here = self.injector.config.semantic_weights
                adapter.config = dataclasses.replace(adapter.config, semantic_weights=here)
            trains = self.adapters.trains
        with self._in_turn(folded=False):
            self.adapters.add(self.backbone, name, adapter, trains=trains)
            adapter.to(next(self.injector.parameters()))
            self._tell_hooks()

    def hotswap_adapter(
        self,
        pretrained: str | os.PathLike[str],
        name: str | None = None,
        **hub_options: Unpack[HubOptions],
    ) -> None:
        """Put a saved adapter's weights into an adapter of the same make, in place.

        A compiled model goes on with them without compiling again, unless they treat other
        degradations.

        Args:
            pretrained: folder or Hub repository.
            name: of the adapter that takes them; None for the active one.
            **hub_options: as for :meth:`add_adapter`.

        Raises:
            ConfigError: there is no adapter of that name.
            CheckpointError: the saved adapter is missing or damaged, or has other sites, another
                config, or something else to steer it.
            PerceptionError: a fold is under way.
            BackboneError: the model was unwrapped.
        """
        check_options(hub_options, "hotswap_adapter", pretrained)
        with self._in_turn(folded=False):
            injector = self.adapters.named(self.adapters.active if name is None else name)
        # Meanwhile others may restore.
        file = read_beside(self, pretrained, like=injector, **hub_options)
        with self._in_turn(folded=False):
            injector.load_state_dict(file.injector.state_dict())
            injector.treat(file.record.config.treats)

    def set_adapter(self, name: str) -> None:
        """Make an adapter the one that is used.

        It trains if it is a new one, or is as it was when it was last active; one that was read
        into the model trains if the model's own did.

        Raises:
            ConfigError: there is none of that name.
            PerceptionError: a fold is under way.
            BackboneError: the model was unwrapped.
        """
        with self._in_turn(folded=False):
            self.adapters.activate(name)
            hold_in_eval(self.backbone, self.sites.eval_only, training=self.training)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter that is not active.

        Raises:
            ConfigError: there is none of that name, or it is active.
            PerceptionError: a fold is under way.
            BackboneError: the model was unwrapped.
        """
        with self._in_turn(folded=False):
            self.adapters.remove(name)

    def unwrap(self) -> nn.Module:
        """Give the backbone back with its weights, hooks and ``requires_grad`` as they were.

        The model cannot be run afterwards; values trained after :meth:`unfreeze` are in
        ``backbone.state_dict()`` until then.

        Raises:
            BackboneError: it was unwrapped before.
            PerceptionError: a fold is under way.
        """
        with self._in_turn(folded=False):
            self.adapters.detach()
            net = self.frozen.release()
            del self.backbone  # what is done to this model is to reach it no more
            self.__dict__["backbone"] = net
            return net

    # On disk

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        figures: Mapping[str, float | str] | None = None,
    ) -> None:
        """Save the active adapter: ``adapter_config.json``, ``adapter_model.safetensors``, a card.

        Backbone parameters that were unfrozen are saved with it, the rest of the backbone is not.
        Where FSDP has sharded the model every process must call it, and the first one writes. A
        ``README.md`` that somebody wrote or edited is kept, with a warning.

        Args:
            folder: made if it does not exist.
            figures: what was measured, for the model card.

        Raises:
            CheckpointError: ``folder`` is a file, or cannot be made or written to.
            ConfigError: a figure is not finite, or parameters of the backbone require a gradient
                that :meth:`unfreeze` has not named.
            PerceptionError: a fold is under way, in which the backbone has other weights.
            BackboneError: the model was unwrapped.
        """
        with self._in_turn(folded=False):
            save_adapter(self, folder, figures)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        figures: Mapping[str, float | str] | None = None,
        **options: Unpack[PushOptions],
    ) -> str | None:
        """Save the active adapter and upload it to the Hugging Face Hub.

        Where FSDP has sharded the model every process must call it, and the first one uploads. A
        ``README.md`` of the repository that somebody wrote or edited is kept, with a warning.

        Args:
            repo_id: ``user/name``.
            figures: what was measured, for the model card.
            **options: of :func:`perceive_adapter.hub.push_folder`: private, token, revision, ...

        Returns:
            URL of the commit; None on a process that does not upload.

        Raises:
            As :meth:`save_pretrained`, and CheckpointError where the upload fails.
        """
        with tempfile.TemporaryDirectory() as folder:
            with self._in_turn(folded=False):
                written = save_adapter(self, folder, figures, elsewhere=True)
            # Meanwhile others may restore.
            return push_folder(folder, repo_id, **options) if written else None

    # Helpers

    def _image(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        position, name = self.image_arg
        if position is not None and position < len(args):
            image = args[position]
        elif name in kwargs:
            image = kwargs[name]
        else:
            raise ImageError(
                f"the call has no image: expected it at position {position} or as {name!r}"
            )
        return self._checked(image)

    def _checked(self, given: Any) -> Tensor:
        image = check_image(given, self.sites.image_channels, "the image")
        device = next(self.injector.parameters()).device
        if image.device != device:
            remedy = "load the model's weights" if device.type == "meta" else "move one of them"
            raise ImageError(f"the image is on {image.device} and the model on {device}; {remedy}")
        return image

    def _perception(self, perception: Perception | None, image: Tensor) -> Perception:
        if perception is None:
            # A copy, since some networks write to their input, which backward would refuse.
            seen = self.perceive(image.clone() if torch.is_grad_enabled() else image)
            if not seen.known():
                raise PerceptionError(
                    f"nothing here perceives {', '.join(self.injector.encoder.sources)}, which "
                    "steers this adapter; give perception=Perception(...)"
                )
            return seen
        check_perception(perception, image.shape[0])
        return perception

    def _conditions(
        self, names: Sequence[str | None], perception: Perception | None, image: Tensor
    ) -> dict[str, Tensor]:
        """Return the condition of each adapter that is named for an image of a batch."""
        self.adapters.check_names(names, image.shape[0])
        if perception is None and any(name is not None for name in names):
            # A copy, for the sake of networks that write to their input, as above.
            unit = self.value_range.to_unit(image.clone() if torch.is_grad_enabled() else image)
            shared = see(self.perceiver, self.semantic, unit)
        conditions = {}
        for name in self.adapters:
            if name not in names:
                continue
            injector = self.adapters.named(name)
            seen = with_compact(shared, injector, unit) if perception is None else perception
            conditions[name] = injector.encoder(self._perception(seen, image))
        return conditions

    def _folds(self, perception: Perception, image: Tensor) -> bool:
        """Whether to fold: one perception, no gradient, and an image large enough to pay."""
        return (
            perception.batch == 1
            and not torch.is_grad_enabled()
            and image[:, 0].numel() >= FOLD_FROM
        )
