import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from perceive_adapter.errors import ConfigError, LossInputError, MissingDependencyError
from perceive_adapter.losses import (
    DifficultyAdaptiveLoss,
    FeatureExtractor,
    FilterPyramid,
    ModuleFeatures,
    resolve_features,
    timm_features,
    tiny_features,
)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def naive_dct_response(image):
    """AC responses of one gray image (H, W) by explicit loops, edges replicated."""
    basis = [
        [1 / math.sqrt(3)] * 3,
        [1 / math.sqrt(2), 0.0, -1 / math.sqrt(2)],
        [1 / math.sqrt(6), -2 / math.sqrt(6), 1 / math.sqrt(6)],
    ]
    height, width = image.shape
    maps = []
    for u in range(3):
        for v in range(3):
            if u == v == 0:
                continue
            response = torch.zeros_like(image)
            for row in range(height):
                for column in range(width):
                    for i in range(3):
                        for j in range(3):
                            y = min(max(row + i - 1, 0), height - 1)
                            x = min(max(column + j - 1, 0), width - 1)
                            response[row, column] += basis[u][i] * basis[v][j] * image[y, x]
            maps.append(response)
    return torch.stack(maps)


def test_pyramid_equals_explicit_loops():
    image = torch.rand(1, 3, 4, 6, dtype=torch.float64)
    pyramid = FilterPyramid(scales=2).double()
    level_0, level_1, level_2 = pyramid(image)
    half = image.reshape(1, 3, 2, 2, 3, 2).mean((3, 5))
    assert torch.equal(level_0, image)
    for level, source in ((level_1, image), (level_2, half)):
        expected = torch.cat([naive_dct_response(channel) for channel in source[0]])
        torch.testing.assert_close(level[0], expected, rtol=1e-6, atol=1e-6)


def test_filters_are_orthonormal_and_blind_to_brightness():
    filters = FilterPyramid().filters[:8].flatten(1)
    torch.testing.assert_close(filters @ filters.T, torch.eye(8), rtol=0, atol=1e-6)
    torch.testing.assert_close(filters.sum(1), torch.zeros(8), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2), (3, 5), (16, 16), (17, 15)])
def test_pyramid_takes_any_size(size):
    image = torch.rand(2, 3, *size, requires_grad=True)
    levels = FilterPyramid()(image)
    expected = size
    for level in levels[1:]:
        assert tuple(level.shape) == (2, 24, *expected)
        expected = tuple((side + 1) // 2 for side in expected)
    sum(level.square().sum() for level in levels).backward()
    assert image.grad.isfinite().all()
    assert image.grad.abs().sum() > 0


def test_pyramid_has_nothing_to_train_or_save():
    pyramid = FilterPyramid()
    assert list(pyramid.parameters()) == []
    assert pyramid.state_dict() == {}
    assert isinstance(pyramid, FeatureExtractor)
    assert sum(pyramid.weights) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scales": 0}, "at least 1"),
        ({"scales": 2, "weights": (1.0, 1.0)}, "2 feature weights given for 3 levels"),
        ({"scales": 1, "weights": (1.0, -1.0)}, "at least 0"),
        ({"scales": 1, "weights": (0.0, 0.0)}, "above 0"),
    ],
)
def test_pyramid_refuses_bad_settings(arguments, message):
    with pytest.raises(ConfigError, match=message):
        FilterPyramid(**arguments)


@pytest.fixture(scope="module")
def vgg():
    torch.manual_seed(0)
    return timm_features("vgg16", pretrained=False)


@pytest.fixture(scope="module")
def plain_vgg():
    import timm

    torch.manual_seed(0)
    return timm.create_model("vgg16", pretrained=False).eval()


def named_vgg_layers(features):
    """Name a VGG's layers as the literature does: block, then place in the block."""
    names, block, place = {}, 1, 0
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            place += 1
            names[f"conv{block}_{place}"] = layer
        elif isinstance(layer, nn.ReLU):
            names[f"relu{block}_{place}"] = layer
        else:
            block, place = block + 1, 0
    return names


def test_vgg16_levels_are_the_papers(vgg, plain_vgg):
    """Hooks that copy on the untouched network, in-place ReLUs and all, give the same levels."""
    layers = named_vgg_layers(plain_vgg.features)
    seen, handles = {}, []
    for name in ("relu1_2", "conv2_2", "relu3_1", "relu3_3"):

        def copy(_module, _inputs, output, name=name):
            seen[name] = output.clone()

        handles.append(layers[name].register_forward_hook(copy))
    image = torch.rand(1, 3, 32, 40)  # five poolings in the untouched network
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in IMAGENET)
    with torch.no_grad():
        plain_vgg.features((image - mean) / std)
        levels = vgg(image)
    for handle in handles:
        handle.remove()
    assert (seen["conv2_2"] < 0).any()
    assert len(levels) == 4
    for level, expected in zip(levels, seen.values(), strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-5)
    assert vgg.weights == (1 / 12, 1 / 6, 1 / 3, 1.0)


def test_vgg16_is_truncated_after_the_last_level(vgg, plain_vgg):
    expected = sum(
        parameter.numel()
        for name, layer in named_vgg_layers(plain_vgg.features).items()
        if name in {"conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1", "conv3_2", "conv3_3"}
        for parameter in layer.parameters()
    )
    assert sum(parameter.numel() for parameter in vgg.body.module.parameters()) == expected


def test_vgg16_smallest_image(vgg):
    assert [tuple(level.shape[2:]) for level in vgg(torch.rand(1, 3, 4, 4))][-1] == (1, 1)
    with pytest.raises(LossInputError, match=r"4 x 4.*\(1, 3, 3, 9\)"):
        vgg(torch.rand(1, 3, 3, 9))


def test_vgg16_gradient_reaches_the_image_only(vgg):
    image = torch.rand(1, 3, 8, 8, requires_grad=True)
    vgg(image)[-1].sum().backward()
    assert image.grad.abs().sum() > 0
    assert all(not weight.requires_grad for weight in vgg.body.module.parameters())


def test_other_timm_names_weigh_levels_equally():
    features = timm_features("resnet10t", pretrained=False)
    assert features.weights == (0.2,) * 5
    assert len(features(torch.rand(1, 3, 32, 32))) == 5
    torch.testing.assert_close(features.mean.flatten(), torch.tensor(IMAGENET[0]))
    torch.testing.assert_close(features.std.flatten(), torch.tensor(IMAGENET[1]))
    assert not any(getattr(m, "inplace", False) for m in features.body.module.modules())


def test_unknown_timm_name():
    with pytest.raises(ConfigError, match=r"no model 'vgg1600'.*list_models"):
        resolve_features("vgg1600")


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"pass it as an nn\.Module") as caught:
        timm_features("resnet10t")
    assert caught.value.__cause__ is not None


def test_missing_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependencyError, match="install timm"):
        timm_features("vgg16")


def test_import_is_lazy():
    code = (
        "import sys, perceive_adapter.losses\n"
        "heavy = {'timm', 'torchvision', 'open_clip', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


class Outputs(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, images):
        return self.make(images)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: (x,),
        lambda x: [x],
        lambda x: {"level": x},
    ],
)
def test_module_outputs_become_a_list(make):
    image = torch.rand(2, 3, 4, 4)
    levels = resolve_features(Outputs(make))(image)
    assert isinstance(levels, list)
    assert torch.equal(levels[0], image)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: None, "NoneType"),
        (lambda x: [], "not empty"),
        (lambda x: "levels", "level 0 must be a floating tensor, got str"),
        (lambda x: [x, x.argmax(1)], r"level 1 must be a floating tensor, got torch.int64"),
        (lambda x: x.mean(), r"shape \(\) for a batch of 2"),
        (lambda x: x.mean((1, 2, 3)), r"shape \(2,\) for a batch of 2"),
        (lambda x: x[0], r"shape \(3, 4, 4\) for a batch of 2"),
    ],
)
def test_module_outputs_that_are_not_features(make, message):
    with pytest.raises(LossInputError, match=message):
        ModuleFeatures(Outputs(make))(torch.rand(2, 3, 4, 4))


def test_module_with_another_number_of_levels_than_weights():
    features = ModuleFeatures(Outputs(lambda x: [x, x]), weights=(1.0, 1.0, 1.0))
    with pytest.raises(LossInputError, match="returned 2 feature levels for 3 weights"):
        features(torch.rand(1, 3, 4, 4))
    module = Outputs(lambda x: [x, x])
    module.weights = (1.0,)  # its own are no better than those that are given
    with pytest.raises(LossInputError, match=r"2 feature levels for 1 weights: give weights="):
        ModuleFeatures(module)(torch.rand(1, 3, 4, 4))
    assert len(ModuleFeatures(module, (0.5, 0.5))(torch.rand(1, 3, 4, 4))) == 2


def test_modules_own_weights_are_kept():
    module = Outputs(lambda x: [x, x])
    assert ModuleFeatures(module).weights is None
    module.weights = (0.25, 0.75)
    assert ModuleFeatures(module).weights == (0.25, 0.75)
    assert ModuleFeatures(module, weights=(1.0, 2.0)).weights == (1.0, 2.0)


def test_module_is_frozen_for_good():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    features = ModuleFeatures(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    image = torch.rand(2, 3, 8, 8, requires_grad=True)
    expected = features(image)[0]
    features.train().requires_grad_(True)
    assert not any(part.training for part in module.modules())
    module.train()  # as another owner of the same module would
    assert torch.equal(features(image)[0], expected)
    expected.sum().backward()
    assert image.grad.abs().sum() > 0
    assert all(weight.grad is None and not weight.requires_grad for weight in module.parameters())
    assert list(features.parameters()) == []
    assert features.state_dict() == {}
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_module_moves_with_its_owner():
    module = nn.Conv2d(3, 4, 3)
    features = nn.Sequential(ModuleFeatures(module)).double()
    assert module.weight.dtype == torch.float64
    assert features(torch.rand(1, 3, 8, 8))[0].dtype == torch.float64


def test_in_place_module_leaves_the_image_alone():
    image = torch.rand(1, 3, 4, 4) - 0.5
    before = image.clone()
    ModuleFeatures(nn.ReLU(inplace=True))(image)
    assert torch.equal(image, before)


def test_modules_see_normalized_images():
    features = ModuleFeatures(nn.Identity(), mean=(0.5, 0.0, 1.0), std=(0.5, 1.0, 2.0))
    level = features(torch.ones(1, 3, 1, 1))[0]
    assert level.flatten().tolist() == [1.0, 1.0, 0.0]
    with pytest.raises(ConfigError, match="std must be finite and above 0"):
        ModuleFeatures(nn.Identity(), std=(1.0, 0.0, 1.0))


def test_resolving():
    pyramid = FilterPyramid()
    assert resolve_features(pyramid) is pyramid
    image = torch.rand(1, 3, 32, 32)
    for given, expected in zip(resolve_features(None)(image), tiny_features()(image), strict=True):
        assert torch.equal(given, expected)
    with pytest.raises(ConfigError, match=r"nn\.Module, got int"):
        resolve_features(3)


def test_losses_made_in_inference_mode_train_elsewhere():
    with torch.inference_mode():
        losses = [DifficultyAdaptiveLoss(), DifficultyAdaptiveLoss(FilterPyramid())]
    for loss in losses:
        loss.update_difficulty(20.0)
        restored = torch.rand(1, 3, 16, 16, requires_grad=True)
        loss(restored, torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)).backward()
        assert restored.grad.any()


def test_references_made_in_inference_mode_serve_in_a_loss_with_gradient():
    with torch.inference_mode():
        target, degraded = torch.rand(2, 1, 3, 16, 16)
    for features in (None, FilterPyramid()):
        restored = torch.rand(1, 3, 16, 16, requires_grad=True)
        DifficultyAdaptiveLoss(features)(restored, target, degraded).backward()
        assert restored.grad.any()


def test_default_features_made_in_inference_mode_and_on_a_default_device():
    with torch.inference_mode():
        features = resolve_features(None)
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    features(image)[-1].sum().backward()
    assert image.grad.any()
    with torch.device("meta"):
        features = resolve_features(None)
    weight = next(features.body.module.parameters())
    assert weight.device == features.mean.device == torch.device("meta")
