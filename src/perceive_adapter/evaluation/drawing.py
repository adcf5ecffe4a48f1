"""A wrapped network as a picture: where its prompts are, from input to output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from perceive_adapter.evaluation.report import new_figure, save_figure
from perceive_adapter.injection.model import PerceiveModel
from perceive_adapter.injection.plan import Role, Site
from perceive_adapter.injection.probe import Example, quiet, trace, weight_like_images

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_sites", "in_order"]

_COLOURS: dict[Role, str] = {"level": "#b2182b", "layer": "#92c5de"}
_HATCH = "////"
_NARROWEST, _WIDEST, _GAP, _HEIGHT = 0.4, 2.5, 0.45, 0.36


@torch.no_grad()
def in_order(model: PerceiveModel) -> list[Site]:
    """Return the sites of both roles in the order in which they work.

    Args:
        model: whose backbone takes an image and nothing else.
    """
    plan = model.sites
    weight = weight_like_images(model.backbone)
    image = weight.new_full((1, plan.image_channels, *plan.probe_size), 0.5)
    example = Example((image,), {}, 0)
    with model.disabled(), quiet(model.backbone):
        calls = trace(model.backbone, example, fingerprints=False).calls
    return sorted(plan, key=lambda site: (calls[site.name][0].end, site.role == "level"))


def draw_sites(model: PerceiveModel, file: Path) -> None:
    """Draw the sites from the image on the left to the restored image on the right.

    The height at which a site lies is the resolution of its features, the width follows the number
    of their channels.

    Args:
        model: whose backbone takes an image and nothing else.
        file: to write; its suffix says what, such as ``.png`` or ``.svg``.
    """
    boxes = _boxes(in_order(model))
    end = boxes[-1].right + 1.5
    deepest = max(box.depth for box in boxes)
    figure = new_figure(max(6.5, 1.5 + 0.13 * end), 3.2 + 0.5 * deepest)
    axes = figure.subplots()
    _draw(axes, boxes, model.sites.blocked)
    path = [(-1.0, 0.0), *((x, box.depth) for box in boxes for x in (box.left, box.right))]
    path.append((end, -math.log2(model.sites.scale)))
    axes.plot(*zip(*path, strict=True), color="0.6", linewidth=1, zorder=1)
    axes.set_xlim(-1.5, end + 0.5)
    axes.set_ylim(deepest + 0.6, min(0.0, path[-1][1]) - 0.6)
    axes.set_yticks(range(math.ceil(path[-1][1]), int(deepest) + 1))
    axes.set_yticklabels([f"{2.0**-depth:g}" for depth in axes.get_yticks()])
    axes.set_xticks(
        [-1, *(box.centre for box in boxes), end],
        ["image", *(box.site.name for box in boxes), "restored"],
        rotation=90,
        fontsize=6,
    )
    axes.set_ylabel("resolution")
    axes.set_title(f"{type(model.backbone).__name__}, {model.status()}", fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    save_figure(figure, file, dpi=150)


@dataclass(frozen=True)
class _Box:
    """Where a site is drawn; depth counts halvings of the resolution."""

    site: Site
    left: float
    right: float
    depth: float

    @property
    def centre(self) -> float:
        return (self.left + self.right) / 2


def _boxes(sites: list[Site]) -> list[_Box]:
    widest = max(site.channels for site in sites)
    boxes: list[_Box] = []
    left = depth = 0.0
    for site in sites:
        if site.stride:  # one that is no feature map lies where the one before it does
            depth = math.log2(site.stride)
        width = _NARROWEST + (_WIDEST - _NARROWEST) * site.channels / widest
        boxes.append(_Box(site, left, left + width, depth))
        left += width + _GAP
    return boxes


def _draw(axes: Axes, boxes: list[_Box], blocked: tuple[str, ...]) -> None:
    from matplotlib.patches import Patch, Rectangle

    for box in boxes:
        axes.add_patch(
            Rectangle(
                (box.left, box.depth - _HEIGHT / 2),
                box.right - box.left,
                _HEIGHT,
                facecolor=_COLOURS[box.site.role],
                edgecolor="black",
                linewidth=0.4,
                hatch=_HATCH if box.site.name in blocked else None,
                zorder=2,
            )
        )
    keys = [
        Patch(facecolor=_COLOURS[role], edgecolor="black", label=f"{role} site")
        for role in dict.fromkeys(box.site.role for box in boxes)
    ]
    if blocked:
        keys.append(Patch(facecolor="white", hatch=_HATCH, label="blocked by a zero scale"))
    widest = max(box.site.channels for box in boxes)
    keys.append(Patch(facecolor="none", label=f"width: channels, up to {widest}"))
    axes.legend(handles=keys, fontsize=7, loc="upper center", ncols=len(keys), frameon=False)
