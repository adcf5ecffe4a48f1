"""Difficulty-adaptive perceptual loss."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perceive_adapter.errors import ConfigError, LossInputError
from perceive_adapter.losses._distances import Level, References, distances, in_one_pass
from perceive_adapter.losses._inputs import check_image, check_number, check_unit_range
from perceive_adapter.losses.features import resolve_features
from perceive_adapter.precision import full_precision

__all__ = ["DifficultyAdaptiveLoss", "psnr"]

_MIN_MSE = 1e-10  # a PSNR of 100 dB stands for identical images


class DifficultyAdaptiveLoss(nn.Module):
    r"""Pull the restored image to the target, push it off the degraded and half-restored ones.

    Per sample, with feature levels l of weights :math:`w_l`, the mean absolute difference d of
    features, the degraded image LQ and the medium images :math:`M_j`, valid where
    :math:`m_j = 1`:

    .. math::
        \sum_l w_l \frac{d_l(R, GT)}{2 d_l(R, LQ) + \sum_j m_j \omega_j d_l(R, M_j)}

    and the mean over the batch. A medium image is *hard*, with :math:`\omega_j` =
    ``hard_weight``, if its PSNR is at most the reference PSNR, that is, if the network has
    overtaken it, and *easy* otherwise. Set the reference with ``update_difficulty``, from a fixed
    probe at the start of each epoch; before that it is estimated from every batch.

    An adapter starts at the identity, where the restored image may equal the degraded one and the
    denominator D would be 0. It is therefore softened to
    :math:`\sqrt{D^2 + (\epsilon s)^2}` with s = max(d(GT, LQ), ``min_distance``), constant in R, so
    that value and gradient do not depend on the scale of the features. With the default
    :math:`\epsilon = 0.5` and no medium image, per unit of level weight, the loss of an exact copy
    of the degraded image is 2, its gradient in units of d is at most 4.3 / s on the way from there
    to the target, and near the target the loss is 3 % below the paper's ratio. Measured on a
    photograph with noise, haze and low light, 0.1 times this loss has a gradient 0.7 to 14 times
    as long as that of L1; with the customary constant of 1e-7 instead, up to six million times.

    All is computed in float32 (float64 for float64 images), also under autocast: the distance of
    two similar images is lost in half precision. So leave the loss itself in float32: features are
    computed in the dtype of their weights. Target, degraded and medium images are constants.

    Sources: Perceive-IR, IEEE TIP 2025, arXiv 2408.15994, restoration stage (the loss); AECR-Net,
    CVPR 2021, contrastive regularization (the ratio of distances).

    Args:
        features: None for the image tower of the bundled perceiver (four levels, at 1/2 to 1/16 of
            the resolution, with weights 1/12, 1/6, 1/3, 1, see ``tiny_features``), a timm name
            (``vgg16``: relu1_2, conv2_2, relu3_1, relu3_3 with those weights, as in the paper), or
            a module (see ``ModuleFeatures``; ``FilterPyramid`` is one without learned weights).
        hard_weight: of medium images that the network has overtaken.
        easy_weight: of medium images that are still better than the network's.
        degraded_weight: of the degraded image.
        eps: softening of the denominator, in units of the distance of degraded and target.
        min_distance: smallest such distance, in units of the features; one gray level.

    Raises:
        ConfigError: a weight that is negative or not finite, ``degraded_weight``, ``eps`` or
            ``min_distance`` not above 0, or features that cannot be had.

    Example:
        >>> loss = DifficultyAdaptiveLoss()
        >>> target = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
        >>> degraded = target / 2
        >>> round(loss(degraded, target, degraded).item(), 4)  # 2, times the weights' sum
        3.1667
        >>> loss(target, target, degraded, medium=[target + 0.1]).item()
        0.0
    """

    reference_psnr: Tensor

    @torch.inference_mode(False)  # a buffer made there could not be written to elsewhere
    def __init__(
        self,
        features: str | nn.Module | None = None,
        *,
        hard_weight: float = 1.25,
        easy_weight: float = 0.75,
        degraded_weight: float = 2.0,
        eps: float = 0.5,
        min_distance: float = 1 / 255,
    ) -> None:
        super().__init__()
        self.hard_weight = check_number("hard_weight", hard_weight)
        self.easy_weight = check_number("easy_weight", easy_weight)
        self.degraded_weight = check_number("degraded_weight", degraded_weight, positive=True)
        self.eps = check_number("eps", eps, positive=True)
        self.min_distance = check_number("min_distance", min_distance, positive=True)
        self.features = resolve_features(features)
        # NaN stands for "not set": it survives state_dict and needs no synchronization to test.
        self.register_buffer("reference_psnr", torch.tensor(math.nan))

    def update_difficulty(self, psnr: float | Tensor) -> None:
        """Set the PSNR in dB that medium images are compared with: the network's own, by now.

        Raises:
            ConfigError: ``psnr`` is not one finite number.
        """
        if isinstance(psnr, Tensor) and psnr.numel() != 1:
            raise ConfigError(
                f"the reference PSNR must be one number, in dB, got a tensor {tuple(psnr.shape)}"
            )
        value = float(psnr)
        if not math.isfinite(value):
            raise ConfigError(f"the reference PSNR must be finite, in dB, got {value}")
        self.reference_psnr.fill_(value)

    def forward(
        self,
        restored: Tensor,
        target: Tensor,
        degraded: Tensor,
        medium: Sequence[Tensor] = (),
        valid: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, a scalar of at least 0.

        Args:
            restored: (B, 3, H, W) or (B, 1, H, W), RGB or gray, in [0, 1]; receives the gradient.
            target: same shape.
            degraded: same shape.
            medium: n tensors of the same shape, n from 0 on.
            valid: (B, n), true or nonzero where a sample has that medium image; None means all.
                Whatever an invalid image holds, NaN included, has no effect.

        Raises:
            LossInputError: shapes, channels, dtypes or devices that do not fit, an empty batch,
                or features of another number of levels than weights.
        """
        images, mask = self._checked([restored, target, degraded, *_listed(medium)], valid)
        with torch.autocast(restored.device.type, enabled=False):
            image, *references = images
            found = distances(self.features(image), self._reference_levels(references))
            return self._loss(image, references, mask, found)

    def references(
        self,
        target: Tensor,
        degraded: Tensor,
        medium: Sequence[Tensor] = (),
        valid: Tensor | None = None,
    ) -> References:
        """Compute the features of images that several restored ones are compared with, once.

        For fixed crops, or for several restored images of one degraded image. Arguments and errors
        are those of the call. The images are not copied: leave them as they are meanwhile.

        Example:
            >>> loss = DifficultyAdaptiveLoss()
            >>> target = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
            >>> references = loss.references(target, target / 2)
            >>> loss.compare(target / 2, references) == loss(target / 2, target, target / 2)
            tensor(True)
        """
        images, mask = self._checked([target, degraded, *_listed(medium)], valid, restored=False)
        with torch.autocast(target.device.type, enabled=False):
            return References(images, mask, self._reference_levels(images))

    def compare(self, restored: Tensor, references: References) -> Tensor:
        """Return the loss of restored images against what ``references`` has computed.

        Args:
            restored: (B, 3, H, W) or (B, 1, H, W), as the references are; receives the gradient.
            references: of this loss.

        Raises:
            LossInputError: the restored images do not fit the references.
        """
        image = self._here("restored", restored)
        check_image("a reference", references.images[0], like=image)
        with torch.autocast(restored.device.type, enabled=False):
            image = full_precision(image)
            found = distances(self.features(image), references.levels)
            return self._loss(image, references.images, references.mask, found)

    def extra_repr(self) -> str:
        """Return the settings, for ``repr``."""
        return (
            f"hard_weight={self.hard_weight}, easy_weight={self.easy_weight}, "
            f"degraded_weight={self.degraded_weight}, eps={self.eps}, "
            f"min_distance={self.min_distance:.3g}"
        )

    def _checked(
        self, images: list[Tensor], valid: Tensor | None, *, restored: bool = True
    ) -> tuple[list[Tensor], Tensor]:
        """Return the images in full precision, all but the restored one constant, and the mask."""
        first = ["restored", "target", "degraded"] if restored else ["target", "degraded"]
        names = [*first, *(f"medium[{i}]" for i in range(len(images) - len(first)))]
        checked = [self._here(names[0], images[0])]
        for name, image in zip(names[1:], images[1:], strict=True):
            checked.append(check_image(name, image, like=images[0], whose=names[0]))
        check_unit_range("target", checked[len(first) - 2])
        mask = _check_valid(valid, len(images) - len(first), checked[0])
        found = [full_precision(image) for image in checked]
        target = len(first) - 2
        found[target:] = map(_constant, found[target:])
        for index, use in enumerate(mask.unbind(1), start=len(first)):
            found[index] = found[index].where(use[:, None, None, None], found[target + 1])
        return found, mask

    def _here(self, name: str, image: Tensor) -> Tensor:
        """Return the first image as (B, 3, H, W), if it is where the features are."""
        image = check_image(name, image)
        here = next(self.features.buffers(), self.reference_psnr).device
        if image.device != here:
            raise LossInputError(
                f"{name} is on {image.device}, the loss is on {here}: "
                f"call loss.to({str(image.device)!r})"
            )
        return image

    def _loss(
        self,
        image: Tensor,
        references: list[Tensor],
        mask: Tensor,
        found: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        pull, push, scale = found
        push_weights = self._push_weights(image.detach(), references, mask)
        denominator = torch.hypot(
            (push * push_weights[:, None]).sum(0), self.eps * scale.clamp_min(self.min_distance)
        )
        ratio = pull / denominator  # (levels, B)
        return (self._level_weights(ratio) * ratio).sum(0).mean()

    def _reference_levels(self, references: list[Tensor]) -> list[Level]:
        """Return the constant levels of all references."""
        if in_one_pass(references[0].device):
            together = self._constant_levels(torch.cat(references))
            images = len(references[0])
            return [level.view(-1, images, *level.shape[1:]) for level in together]
        return list(zip(*map(self._constant_levels, references), strict=True))

    def _constant_levels(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            levels: list[Tensor] = self.features(images)
        return levels

    def _push_weights(self, image: Tensor, references: list[Tensor], mask: Tensor) -> Tensor:
        """Return the weight (1 + n, B) of the degraded and each medium image."""
        target, degraded, *medium = references
        weights = [degraded.new_full((len(degraded),), self.degraded_weight)]
        if medium:
            reference = self.reference_psnr
            reference = torch.where(reference.isnan(), psnr(image, target).mean(), reference)
        for other, use in zip(medium, mask.unbind(1), strict=True):
            hard = psnr(other, target) <= reference
            weights.append(torch.where(hard, self.hard_weight, self.easy_weight) * use)
        return torch.stack(weights)

    def _level_weights(self, ratio: Tensor) -> Tensor:
        """Return the features' level weights (L, 1)."""
        levels = len(ratio)
        weights = self.features.weights
        if weights is None:
            weights = (1 / levels,) * levels
        return ratio.new_tensor(weights).unsqueeze(1)


def _listed(medium: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(medium, Tensor):
        raise LossInputError(
            f"medium must be a sequence of tensors (B, 3, H, W), got one tensor of shape "
            f"{tuple(medium.shape)}; pass [medium], or medium.unbind(1) for (B, n, 3, H, W)"
        )
    return list(medium)


def _constant(image: Tensor) -> Tensor:
    """Return what autograd takes for constant; tensors of inference mode it does not even save."""
    if not torch.compiler.is_compiling() and image.is_inference():
        return image.clone()
    return image.detach()


def _check_valid(valid: Tensor | None, medium: int, like: Tensor) -> Tensor:
    shape = (len(like), medium)
    if valid is None:
        return torch.ones(shape, dtype=torch.bool, device=like.device)
    if not isinstance(valid, Tensor) or tuple(valid.shape) != shape:
        got = tuple(valid.shape) if isinstance(valid, Tensor) else type(valid).__name__
        raise LossInputError(
            f"valid must be a tensor of shape {shape} (batch, medium images), got {got}"
        )
    return valid.to(like.device) != 0


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """Return the PSNR per sample in dB, (B,), of images clamped to [0, 1]; at most 100."""
    error = (image.clamp(0, 1) - target.clamp(0, 1)).square().flatten(1).mean(1)
    return -10 * error.clamp_min(_MIN_MSE).log10()
