"""A batch of different perceptions gives every image what it would get by itself."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from wrapping import KINDS, PAIRS, moved, oracle, relative, wrapped
from zoo import CASES, Isotropic

from perceive_adapter import ImageError, Perception, PerceptionError, wrap

ROUNDING = 1e-4


@pytest.mark.parametrize(("case", "kind"), PAIRS)
def test_each_image_is_steered_by_its_own_perception(case: str, kind: str) -> None:
    zoo = CASES[case]
    model, image, seen = wrapped(zoo, config=KINDS[kind]), zoo.images(3), oracle(3)
    with torch.no_grad():
        together = _run(zoo, model, image, seen)
        alone = [_run(zoo, model, image[i : i + 1], seen[i]) for i in range(3)]
        swapped = _run(zoo, model, image, Perception.cat([seen[1], seen[2], seen[0]]))
    assert relative(together, torch.cat(alone)) < ROUNDING
    assert relative(swapped, together) > 10 * ROUNDING or case == "zero_scale"


def _run(zoo, model, image, seen):
    return zoo.read(zoo.call(lambda *a, **k: model(*a, perception=seen, **k), image.clone()))


def test_one_perception_serves_a_whole_batch() -> None:
    model, image, seen = wrapped("windows"), CASES["windows"].images(3), oracle(1)
    expected = model(image, perception=Perception.cat([seen] * 3))
    assert relative(model(image, perception=seen), expected) < ROUNDING


class Convolved(TorchDispatchMode):
    """Notes the dtypes that convolutions run in."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_branches_beside_a_network_in_bfloat16_run_in_it_unless_they_train() -> None:
    model = wrapped("isotropic", config=KINDS["low_rank"])
    model.backbone.to(torch.bfloat16)
    image, seen = CASES["isotropic"].images(2).to(torch.bfloat16), oracle(2)
    with Convolved() as training:
        trained = model(image, perception=seen)
    with Convolved() as restoring, torch.no_grad():
        restored = model(image, perception=seen)
    assert training.dtypes == {torch.bfloat16, torch.float32}
    assert restoring.dtypes == {torch.bfloat16}
    assert relative(restored, trained) < 2e-2


class Mixed(nn.Sequential):
    """Runs its middle layers in single precision."""

    def forward(self, image: Tensor) -> Tensor:
        for layer in self:
            image = layer(image.to(layer.weight.dtype))
        return image


def test_a_layer_of_another_dtype_keeps_its_branch_in_the_adapters() -> None:
    net = Mixed(*(nn.Conv2d(8 if i else 3, 8 if i < 3 else 3, 1) for i in range(4)))
    for layer in (net[0], net[3]):
        layer.to(torch.bfloat16)
    model = wrap(net, perceiver=False, config=KINDS["low_rank"])
    moved(model.injector)
    image, seen = torch.rand(2, 3, 16, 16), oracle(2)
    trained = model(image, perception=seen)
    with torch.no_grad():
        assert relative(model(image, perception=seen), trained) < 2e-2


@pytest.mark.parametrize("batch", [2, 4])
def test_a_perception_of_another_batch_is_refused(batch: int) -> None:
    with pytest.raises(PerceptionError, match=f"of {batch} images and the batch has 3"):
        wrapped("windows")(torch.rand(3, 3, 32, 32), perception=oracle(batch))


def test_a_perception_of_another_width_is_refused() -> None:
    with pytest.raises(PerceptionError, match="compact has width 5; this adapter expects width 64"):
        wrapped("windows")(torch.rand(1, 3, 32, 32), perception=oracle(1, width=5))
    with pytest.raises(PerceptionError, match="compact is missing"):
        wrapped("windows")(torch.rand(1, 3, 32, 32), perception=Perception(tiers=torch.rand(1, 3)))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (torch.rand(3, 32, 32), r"\(3, 32, 32\)"),
        (torch.rand(1, 1, 32, 32), r"\(B, 3, H, W\)"),
        (torch.ones(1, 3, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.rand(1, 3, 0, 32), "empty"),
        (None, "None"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(image: object, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        wrapped("u_shape")(image)


def test_a_call_without_an_image_is_refused() -> None:
    with pytest.raises(ImageError, match="no image"):
        wrapped("keyword")(picture=torch.rand(1, 3, 32, 32))


def test_perceptions_join_and_part() -> None:
    both = oracle(2)
    assert torch.equal(Perception.cat([both[0], both[1]]).compact, both.compact)
    assert torch.equal(both[-1].compact, both.compact[1:])
    with pytest.raises(PerceptionError, match="same fields"):
        Perception.cat([both, Perception(tiers=torch.rand(1, 3))])
    with pytest.raises(PerceptionError, match="disagree"):
        Perception(compact=torch.rand(2, 4), tiers=torch.rand(1, 3))
    with pytest.raises(PerceptionError, match="dimensions"):
        Perception(semantic=torch.rand(2, 4))
    with pytest.raises(PerceptionError, match="empty"):
        _ = Perception().batch


@torch.no_grad()
def test_a_branch_writes_over_features_that_nobody_else_has_seen() -> None:
    model = wrapped("u_shape", config=KINDS["low_rank"])
    layer = model.backbone.get_submodule("intro")
    image, seen = CASES["u_shape"].images(2), oracle(2)
    with torch.enable_grad():
        expected = model(image, perception=seen).detach()
    memory: list[int] = []
    layer.register_forward_pre_hook(lambda *_: memory.clear())
    prompt = model.injector.layers["/intro"].prompt
    prompt.register_forward_hook(
        lambda _, args, output: memory.extend((args[0].data_ptr(), output.data_ptr()))
    )
    torch.testing.assert_close(model(image, perception=seen), expected)
    assert memory[0] == memory[1]
    kept: list[torch.Tensor] = []
    layer.register_forward_hook(lambda *call: kept.append(call[2]), prepend=True)
    torch.testing.assert_close(model(image, perception=seen), expected)
    assert memory[0] != memory[1]
    torch.testing.assert_close(kept[0], F.conv2d(image, layer.weight, layer.bias, padding=1))


class Tiling(Isotropic):
    """Cuts large images into tiles by itself, those of one place side by side in the batch."""

    side = 64

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[-1] <= self.side:
            return super().forward(image)
        halves = torch.cat(image.chunk(2, dim=3))
        return torch.cat(super().forward(halves).chunk(2), dim=3)


def test_a_network_that_cuts_larger_images_than_it_was_tried_on_takes_one_at_a_time() -> None:
    torch.manual_seed(0)
    config = KINDS["low_rank"]
    model = wrap(Tiling(), perceiver=False, config=config)
    moved(model.injector)
    image, seen = torch.rand(2, 3, 64, 128), oracle(2)
    with pytest.raises(PerceptionError, match=r"a site sees 4 rows.*wrap the network with an exam"):
        model(image, perception=seen)
    alone = torch.cat([model(image[i : i + 1], perception=seen[i]) for i in range(2)])
    weights = model.injector.state_dict()
    known = wrap(model.unwrap(), perceiver=False, config=config, example=torch.rand(1, 3, 64, 128))
    known.injector.load_state_dict(weights)
    assert relative(known(image, perception=seen), alone) < ROUNDING
