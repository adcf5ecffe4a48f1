import copy
import math

import pytest
import torch
from torch import nn

from perceive_adapter.errors import ConfigError, LossInputError
from perceive_adapter.losses import DifficultyAdaptiveLoss, FilterPyramid, ModuleFeatures
from perceive_adapter.losses import difficulty as module


class Levels(nn.Module):
    """Three levels of different shapes, with unequal weights."""

    weights = (0.5, 1.0, 2.0)

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.second = nn.Conv2d(5, 4, 3, stride=2, padding=1)

    def forward(self, images):
        first = self.first(images)
        second = self.second(first.relu())
        return [first, second, second.flatten(2).transpose(1, 2)]


def naive_psnr(image, target):
    error = (image.clamp(0, 1) - target.clamp(0, 1)).square().mean().item()
    return -10 * math.log10(max(error, 1e-10))


def naive_loss(levels, weights, images, valid, reference, settings):
    """One image, one level, one distance at a time, straight from the formula."""
    restored, target, degraded, *medium = images
    total = 0.0
    for b in range(len(restored)):
        one = [levels(image[b : b + 1]) for image in (restored, target, degraded)]
        for level, weight in enumerate(weights):
            r, t, q = (item[level] for item in one)
            denominator = settings["degraded_weight"] * (r - q).abs().mean()
            for j, image in enumerate(medium):
                if not valid[b][j]:
                    continue
                hard = naive_psnr(image[b], target[b]) <= reference
                omega = settings["hard_weight"] if hard else settings["easy_weight"]
                m = levels(image[b : b + 1])[level]
                denominator = denominator + omega * (r - m).abs().mean()
            floor = settings["eps"] * max((t - q).abs().mean().item(), settings["min_distance"])
            total = total + weight * (r - t).abs().mean() / (denominator**2 + floor**2).sqrt()
    return total / len(restored)


DEFAULTS = {
    "hard_weight": 1.25,
    "easy_weight": 0.75,
    "degraded_weight": 2.0,
    "eps": 0.5,
    "min_distance": 1 / 255,
}


def images(count, batch=3, size=(9, 7), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, *size)
    target = torch.rand(shape, generator=generator, dtype=dtype)
    noise = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count - 1))
    strengths = (0.1, 0.3, 0.15, 0.05)
    near = [
        (target + s * n).clamp(0, 1) for s, n in zip(strengths[: count - 1], noise, strict=True)
    ]
    return [near[0], target, *near[1:]]


@pytest.fixture(params=[False, True], ids=["one-at-a-time", "one-pass"])
def one_pass(request, monkeypatch):
    monkeypatch.setattr(module, "in_one_pass", lambda device: request.param)


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("medium", [0, 1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        DEFAULTS,
        {
            "hard_weight": 3.0,
            "easy_weight": 0.1,
            "degraded_weight": 0.5,
            "eps": 1e-6,
            "min_distance": 0.5,
        },
    ],
    ids=["defaults", "others"],
)
@pytest.mark.parametrize("reference", [None, 22.0])
def test_value_and_gradient_equal_the_naive_formula(medium, settings, reference):
    torch.manual_seed(0)
    levels = Levels().double()
    loss = DifficultyAdaptiveLoss(levels, **settings)
    given = images(3 + medium, dtype=torch.float64)
    given[0].requires_grad_()
    valid = torch.tensor([[True, True], [False, True], [False, False]])[:, :medium]
    if reference is None:
        used = sum(naive_psnr(r, t) for r, t in zip(given[0], given[1], strict=True)) / 3
    else:
        loss.update_difficulty(reference)
        used = reference
    actual = loss(*given[:3], given[3:], valid if medium else None)
    expected = naive_loss(levels, Levels.weights, given, valid, used, settings)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)
    gradients = [torch.autograd.grad(value, given[0])[0] for value in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


def test_eps_towards_zero_gives_the_papers_ratio():
    restored, target, degraded, medium = (
        torch.full((1, 3, 4, 4), value, dtype=torch.float64) for value in (0.5, 0.6, 0.3, 0.4)
    )
    loss = DifficultyAdaptiveLoss(nn.Identity(), eps=1e-9)
    loss.update_difficulty(0.0)  # the medium image is better than that: easy
    value = loss(restored, target, degraded, [medium]).item()
    assert value == pytest.approx(0.1 / (2 * 0.2 + 0.75 * 0.1), rel=1e-6)
    loss.update_difficulty(99.0)
    value = loss(restored, target, degraded, [medium]).item()
    assert value == pytest.approx(0.1 / (2 * 0.2 + 1.25 * 0.1), rel=1e-6)


def test_targets_of_8_bits_are_refused():
    loss, image = DifficultyAdaptiveLoss(FilterPyramid(1)), torch.rand(1, 3, 16, 16)
    with pytest.raises(LossInputError, match=r"target has values up to 2\d\d.*divide 8-bit"):
        loss(image, 255 * image, image)


def test_a_tie_in_psnr_is_hard():
    target = torch.full((1, 3, 4, 4), 0.5)
    medium, degraded = target + 0.25, target + 0.4
    loss = DifficultyAdaptiveLoss(nn.Identity())
    tied = loss(target + 0.25, target, degraded, [medium]).item()  # estimated from the batch
    loss.update_difficulty(naive_psnr(medium, target) + 1)
    assert tied == loss(target + 0.25, target, degraded, [medium]).item()
    loss.update_difficulty(naive_psnr(medium, target) - 1)
    assert tied == loss(target + 0.25, target, degraded, [medium]).item()  # d(R, M) is 0
    other = target - 0.25  # the same PSNR, another place
    easy = loss(target + 0.25, target, degraded, [other]).item()
    loss.reference_psnr.fill_(math.nan)
    assert loss(target + 0.25, target, degraded, [other]).item() < easy


def test_reference_is_estimated_as_the_mean_psnr_of_the_batch():
    restored, target, degraded, medium = images(4)
    loss = DifficultyAdaptiveLoss()
    psnr = [naive_psnr(r, t) for r, t in zip(restored, target, strict=True)]
    estimated = loss(restored, target, degraded, [medium])
    assert loss.reference_psnr.isnan()
    loss.update_difficulty(sum(psnr) / len(psnr))
    assert torch.equal(loss(restored, target, degraded, [medium]), estimated)


@pytest.mark.usefixtures("one_pass")
def test_gradcheck():
    restored, target, degraded, medium = images(4, batch=2, size=(3, 4), dtype=torch.float64)
    restored.requires_grad_()
    loss = DifficultyAdaptiveLoss().double()
    loss.update_difficulty(20.0)
    assert torch.autograd.gradcheck(lambda x: loss(x, target, degraded, [medium]), restored)


def finite(loss, restored, *rest):
    restored = restored.clone().requires_grad_()
    value = loss(restored, *rest)
    value.backward()
    assert value.ndim == 0
    assert value.isfinite()
    assert restored.grad.isfinite().all()
    return value.item(), restored.grad


def test_identity_at_the_start_of_an_adapter():
    """Restored equals degraded: sum of weights / eps, and the gradient points to the target."""
    _, target, degraded = images(3)
    loss = DifficultyAdaptiveLoss()
    value, gradient = finite(loss, degraded, target, degraded)
    assert value == pytest.approx(2.0 * sum(loss.features.weights), rel=1e-4)
    assert (gradient * (target - degraded)).sum() < 0


@pytest.mark.parametrize("offset", [0.0, 1e-7, 1e-5, 1e-3])
def test_gradient_near_the_identity_is_bounded(offset):
    """In units of d (n times the gradient of an element), at most 4.4 / s at every level."""
    _, target, degraded = images(3)
    restored = degraded + offset * (target - degraded)
    _, gradient = finite(DifficultyAdaptiveLoss(nn.Identity()), restored, target, degraded)
    scale = (target - degraded).abs().mean((1, 2, 3))
    per_distance = gradient.abs().amax((1, 2, 3)) * gradient.numel()
    assert (per_distance <= 4.4 / scale).all()


def test_restored_equals_target():
    _, target, degraded, medium = images(4)
    value, _ = finite(DifficultyAdaptiveLoss(), target, target, degraded, [medium])
    assert value == 0


def test_all_images_identical():
    image = torch.rand(2, 3, 8, 8)
    value, gradient = finite(DifficultyAdaptiveLoss(), image, image, image, [image, image])
    assert value == 0
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_clean_constant_target_and_degraded(constant):
    image = torch.full((1, 3, 8, 8), constant)
    finite(DifficultyAdaptiveLoss(), image + 1e-6, image, image)


def test_restored_equals_medium_and_degraded():
    _, target, degraded = images(3)
    finite(DifficultyAdaptiveLoss(), degraded, target, degraded, [degraded, degraded])


@pytest.mark.usefixtures("one_pass")
@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
def test_masked_out_medium_has_no_effect(junk):
    restored, target, degraded, medium = images(4)
    bad = torch.full_like(medium, junk)
    mixed = torch.cat([medium[:1], bad[1:]])
    valid = torch.tensor([[1, 0], [0, 0], [0, 0]])
    value, gradient = finite(
        DifficultyAdaptiveLoss(), restored, target, degraded, [mixed, bad], valid
    )
    alone = torch.tensor([[1.0], [0.0], [0.0]])
    expected, expected_gradient = finite(
        DifficultyAdaptiveLoss(), restored, target, degraded, [medium], alone
    )
    assert value == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, expected_gradient)


def test_all_mediums_masked_equal_none():
    restored, target, degraded, medium = images(4)
    loss = DifficultyAdaptiveLoss()
    none = loss(restored, target, degraded)
    valid = torch.zeros(3, 1, dtype=torch.bool)
    assert torch.equal(loss(restored, target, degraded, [medium], valid), none)
    assert torch.equal(loss(restored, target, degraded, (), torch.zeros(3, 0)), none)


def test_a_medium_near_the_restored_image_raises_the_loss():
    restored, target, degraded, _ = images(4)
    loss = DifficultyAdaptiveLoss()
    near = loss(restored, target, degraded, [restored + 0.01])
    far = loss(restored, target, degraded, [restored + 0.2])
    assert near > far


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images(dtype):
    given = [image.to(dtype) for image in images(4)]
    loss = DifficultyAdaptiveLoss()
    value = loss(*given[:3], given[3:])
    assert value.dtype == torch.float32
    full = loss(*(image.float() for image in given[:3]), [given[3].float()])
    assert torch.equal(value, full)
    finite(loss, given[2], given[1], given[2])
    finite(loss, given[1], given[1], given[2], given[3:])


def test_autocast_does_not_lower_the_precision():
    given = images(4)
    loss = DifficultyAdaptiveLoss(Levels())
    expected = loss(*given[:3], given[3:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(*given[:3], given[3:]), expected)


def test_features_in_half_precision():
    given = images(4)
    loss = DifficultyAdaptiveLoss(Levels())
    expected = loss(*given[:3], given[3:])
    value, _ = finite(loss.to(torch.bfloat16), *given[:3], given[3:])
    assert value == pytest.approx(expected.item(), rel=0.05)


def test_batch_of_one_is_the_mean_of_batches_of_one():
    given = images(5)
    loss = DifficultyAdaptiveLoss()
    loss.update_difficulty(20.0)
    singles = [loss(*(i[b : b + 1] for i in given[:3])) for b in range(3)]
    torch.testing.assert_close(loss(*given[:3]), torch.stack(singles).mean())


def test_gray_images_are_expanded():
    given = [image[:, :1] for image in images(4)]
    loss = DifficultyAdaptiveLoss()
    expected = loss(*(i.repeat(1, 3, 1, 1) for i in given[:3]), [given[3].repeat(1, 3, 1, 1)])
    assert torch.equal(loss(*given[:3], given[3:]), expected)
    finite(loss, *given[:3])


def test_one_pass_with_gradient_for_the_restored_image_alone():
    calls = []

    class Spy(nn.Module):
        def forward(self, image):
            calls.append((len(image), torch.is_grad_enabled()))
            return image

    given = [image.requires_grad_() for image in images(5)]
    DifficultyAdaptiveLoss(Spy())(*given[:3], given[3:]).backward()
    assert calls[0] == (3, True)
    assert sum(size for size, _ in calls[1:]) == 12
    assert not any(grad for _, grad in calls[1:])
    assert all(image.grad is None for image in given[1:])


def test_accelerators_take_all_references_in_one_pass(monkeypatch):
    assert module.in_one_pass(torch.device("cuda"))
    assert not module.in_one_pass(torch.device("cpu"))
    monkeypatch.setattr(module, "in_one_pass", lambda device: True)
    sizes = []

    class Spy(nn.Module):
        def forward(self, image):
            sizes.append(len(image))
            return image

    given = images(5)
    DifficultyAdaptiveLoss(Spy())(*given[:3], given[3:])
    assert sizes == [3, 12]


def test_references_are_constants():
    """The pyramid's level 0 is its input itself, so no_grad alone would not do."""
    given = [image.requires_grad_() for image in images(4)]
    DifficultyAdaptiveLoss()(*given[:3], given[3:]).backward()
    assert given[0].grad is not None
    assert all(image.grad is None for image in given[1:])


def test_psnr_is_measured_within_the_range():
    """What lies beyond [0, 1] would be clipped on saving, and does not count against an image."""
    target = torch.cat([torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)])
    beyond = target + torch.tensor([-0.5, 0.5]).view(2, 1, 1, 1)
    assert module.psnr(beyond, target).tolist() == pytest.approx([100.0, 100.0])
    assert module.psnr(target * 0.9, target).tolist() == pytest.approx([100.0, 20.0])


@pytest.mark.usefixtures("one_pass")
def test_compiles_as_one_graph():
    given = images(4)
    given[0].requires_grad_()
    loss = DifficultyAdaptiveLoss()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    values = [call(*given[:3], given[3:]) for call in (loss, compiled)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, given[0])[0] for value in values))


def test_reference_survives_state_dict():
    loss = DifficultyAdaptiveLoss(Levels())
    assert set(loss.state_dict()) == {"reference_psnr"}
    loss.update_difficulty(torch.tensor(28.5))
    resumed = DifficultyAdaptiveLoss(Levels())
    resumed.load_state_dict(loss.state_dict())
    assert resumed.reference_psnr.item() == 28.5
    assert copy.deepcopy(resumed).reference_psnr.item() == 28.5
    fresh = DifficultyAdaptiveLoss()
    fresh.load_state_dict(DifficultyAdaptiveLoss().state_dict())
    assert fresh.reference_psnr.isnan()


@pytest.mark.parametrize("psnr", [math.nan, math.inf, -math.inf])
def test_reference_must_be_finite(psnr):
    with pytest.raises(ConfigError, match="finite"):
        DifficultyAdaptiveLoss().update_difficulty(psnr)
    with pytest.raises(ConfigError, match="one number"):
        DifficultyAdaptiveLoss().update_difficulty(torch.tensor([28.5, 30.0]))


def test_nothing_to_train_and_frozen_after_train():
    body = nn.Sequential(Levels(), nn.Identity())
    loss = DifficultyAdaptiveLoss(body).train()
    assert list(loss.parameters()) == []
    assert not any(part.training for part in body.modules())
    assert not any(weight.requires_grad for weight in body.parameters())
    given = images(3)
    given[0].requires_grad_()
    loss(*given).backward()
    assert all(weight.grad is None for weight in body.parameters())
    assert given[0].grad.abs().sum() > 0


def test_a_copy_keeps_its_own_features():
    loss = DifficultyAdaptiveLoss(Levels())
    duplicate = copy.deepcopy(loss)
    given = images(3)
    assert torch.equal(duplicate(*given), loss(*given))
    assert duplicate.features.body.module is not loss.features.body.module


def test_equal_weights_where_the_features_have_none():
    given = images(3)
    twice = DifficultyAdaptiveLoss(ModuleFeatures(Two()))
    once = DifficultyAdaptiveLoss(nn.Identity())
    torch.testing.assert_close(twice(*given), once(*given))


class Two(nn.Module):
    def forward(self, image):
        return image, 3 * image


GOOD = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"restored": torch.zeros(2, 3, 8)}, r"restored must have shape.*\(2, 3, 8\)"),
        ({"restored": torch.zeros(2, 4, 8, 8)}, r"restored must have shape.*\(2, 4, 8, 8\)"),
        ({"restored": torch.zeros(0, 3, 8, 8)}, r"restored is empty: shape \(0, 3, 8, 8\)"),
        ({"restored": GOOD.int()}, "restored must be floating point.*int32"),
        ({"restored": None}, "restored must be a tensor.*NoneType"),
        ({"target": torch.zeros(2, 3, 8, 9)}, r"target has shape \(2, 3, 8, 9\), restored has"),
        ({"target": GOOD.byte()}, "target must be floating point.*divide uint8 by 255"),
        ({"degraded": torch.zeros(1, 3, 8, 8)}, r"degraded has shape \(1, 3, 8, 8\), restored"),
        ({"degraded": torch.zeros(2, 1, 8, 8)}, r"degraded has shape \(2, 1, 8, 8\), restored"),
        ({"degraded": GOOD.to("meta")}, "degraded is on meta, restored is on cpu"),
        ({"restored": GOOD.to("meta")}, r"the loss is on cpu: call loss.to\('meta'\)"),
        ({"medium": [GOOD, torch.zeros(2, 3, 4, 4)]}, r"medium\[1\] has shape \(2, 3, 4, 4\)"),
        ({"medium": GOOD}, r"sequence of tensors.*one tensor of shape \(2, 3, 8, 8\)"),
        ({"medium": [GOOD], "valid": torch.ones(2)}, r"valid.*shape \(2, 1\).*got \(2,\)"),
        ({"medium": [GOOD], "valid": torch.ones(2, 2)}, r"valid.*shape \(2, 1\).*got \(2, 2\)"),
        ({"medium": [GOOD], "valid": [[True], [True]]}, r"valid.*shape \(2, 1\).*got list"),
        ({"valid": torch.ones(2, 1)}, r"valid.*shape \(2, 0\).*got \(2, 1\)"),
    ],
)
def test_inputs_that_do_not_fit(change, message):
    given = {"restored": GOOD, "target": GOOD, "degraded": GOOD} | change
    with pytest.raises(LossInputError, match=message):
        DifficultyAdaptiveLoss()(**given)


def test_features_that_are_on_the_images_device_already():
    there = GOOD.to("meta")
    loss = DifficultyAdaptiveLoss(ModuleFeatures(nn.Conv2d(3, 4, 3)).to("meta"))
    checked, _ = loss._checked([there, there, there], None)
    assert all(image.device == there.device for image in checked)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("hard_weight", -1.0),
        ("easy_weight", math.nan),
        ("degraded_weight", 0.0),
        ("eps", 0.0),
        ("min_distance", math.inf),
    ],
)
def test_settings_that_cannot_work(setting, value):
    with pytest.raises(ConfigError, match=setting):
        DifficultyAdaptiveLoss(**{setting: value})


@pytest.mark.usefixtures("one_pass")
def test_references_are_computed_once_for_several_restored_images():
    calls = []

    class Spy(Levels):
        def forward(self, image):
            calls.append(len(image))
            return super().forward(image)

    first, target, degraded, medium, other = images(5)
    second = 0.9 * first
    valid = torch.tensor([[1, 0], [0, 1], [1, 1]])
    other[0] = math.nan  # and so of no sample that has it
    loss = DifficultyAdaptiveLoss(Spy())
    expected = [loss(x, target, degraded, [medium, other], valid) for x in (first, second)]
    calls.clear()
    references = loss.references(target, degraded, [medium, other], valid)
    assert sum(calls) == 12
    calls.clear()
    for x, value in zip((first, second), expected, strict=True):
        torch.testing.assert_close(loss.compare(x.requires_grad_(), references), value)
    assert calls == [3, 3]
    loss.compare(first, references).backward()
    assert first.grad.isfinite().all()


def test_references_that_do_not_fit_are_refused():
    first, target, degraded = images(3)
    loss = DifficultyAdaptiveLoss()
    with pytest.raises(LossInputError, match=r"degraded has shape .*, target has"):
        loss.references(target, degraded[:2])
    with pytest.raises(LossInputError, match=r"a reference has shape .*, restored has"):
        loss.compare(first[:2], loss.references(target, degraded))
    gray = [image[:, :1] for image in (first, target, degraded)]
    torch.testing.assert_close(loss.compare(gray[0], loss.references(*gray[1:])), loss(*gray))
