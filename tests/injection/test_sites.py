"""Where prompts go: discovery, names, layouts, budgets, and a backbone that stays as it was."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from wrapping import state
from zoo import CASES

from perceive_adapter import (
    AdapterConfig,
    AlreadyWrappedError,
    BackboneError,
    CheckpointError,
    CompiledBackboneError,
    ConfigError,
    ImageError,
    Layout,
    PerceiveModel,
    PerceptionError,
    SiteError,
    SitePlan,
    plan_sites,
    wrap,
)
from perceive_adapter.config import from_dict, to_dict
from perceive_adapter.injection.discovery import dry_run


def plan(case: str, seed: int = 0, **options: Any) -> SitePlan:
    return plan_sites(CASES[case].net(seed), **{**CASES[case].wrap, **options})


def names(found: SitePlan, role: Any) -> list[str]:
    return [site.name for site in found.of(role)]


@pytest.mark.parametrize(
    ("case", "levels"),
    [
        ("u_shape", ["middle", "dec2", "dec1"]),
        ("u_interpolate", ["middle", "dec2", "dec1"]),
        ("nafnet", ["middle_blks", "decoders.0", "decoders.1"]),
        ("restormer", ["latent", "decoder_level3", "decoder_level2", "refinement"]),
        ("five_channels", ["middle", "dec2", "dec1"]),
        ("isotropic", ["body.0", "body.1", "body.2", "body.3"]),
        ("swinir", ["layers.0", "layers.1", "conv_after_body"]),
        ("tokens", ["blocks.0", "blocks.1", "blocks.2", "out"]),
        ("padded", ["middle", "dec2", "dec1"]),
        ("cut_short", ["downs.2", "decoder.dec2", "decoder.dec1"]),
    ],
)
def test_levels_are_the_bottleneck_and_every_decoder_level(case: str, levels: list[str]) -> None:
    assert names(plan(case), "level") == levels


def test_a_long_isotropic_body_has_eight_evenly_spaced_groups() -> None:
    found = plan_sites(zoo.Isotropic(blocks=20))
    numbers = [int(name.removeprefix("body.")) for name in names(found, "level")]
    assert len(numbers) == 8
    assert numbers[-1] == 19
    assert {b - a for a, b in pairwise(numbers)} <= {2, 3}


@pytest.mark.parametrize("case", ["u_shape", "padded"])
def test_levels_tell_channels_stride_and_reason(case: str) -> None:
    levels = plan(case).of("level")
    assert [(s.channels, s.stride) for s in levels] == [(32, 4), (16, 2), (8, 1)]
    assert [s.reason for s in levels] == ["bottleneck", "decoder level", "last features"]


@pytest.mark.parametrize(
    ("case", "site", "layout"),
    [
        ("u_shape", "level:middle", Layout(0, 1)),
        ("u_shape", "middle.a", Layout(0, 1)),
        ("tokens", "level:blocks.1", Layout(0, -1)),
        ("nhwc", "level:blocks.1", Layout(0, -1)),
        ("nhwc", "blocks.1.a", Layout(0, -1)),
        ("windows", "qkv", Layout(0, -1, "major")),
        ("windows_alternating", "qkv", Layout(0, -1, "minor")),
        ("sequence_first", "a", Layout(1, -1)),
        ("shared", "block.a", Layout(0, 1)),
        ("swinir", "layers.0.residual_group.blocks.1.attn.qkv", Layout(0, -1, "major")),
    ],
)
def test_layout_is_told_by_changing_batch_and_size(case: str, site: str, layout: Layout) -> None:
    (found,) = plan(case, sites=site)
    assert found.layout == layout


@pytest.mark.parametrize("case", ["u_shape", "windows", "windows_alternating", "noise_level"])
def test_the_plan_depends_on_the_architecture_and_not_on_the_weights(case: str) -> None:
    assert plan(case, 1) == plan(case, 2)


@pytest.mark.parametrize(
    ("case", "layer"),
    [
        ("mixed", "layers.0"),  # grouped
        ("attention", "mha.out_proj"),  # never called as a module
        ("writes_features", "part"),  # its input is overwritten
        ("u_shape", "enc1"),  # not dense
    ],
)
def test_layers_that_cannot_carry_a_branch_are_left_out(case: str, layer: str) -> None:
    assert layer not in names(plan(case), "layer")


@pytest.mark.parametrize(
    ("sites", "levels", "layers"),
    [
        ("middle", ["middle"], []),
        ("middle.a", [], ["middle.a"]),
        (["dec?"], ["dec2", "dec1"], []),
        ("dec1.*", [], ["dec1.a", "dec1.b"]),
        ("**.a", [], ["enc1.a", "enc2.a", "middle.a", "dec2.a", "dec1.a"]),
        ("level:dec1.a", ["dec1.a"], []),
        (["layer:dec1.**", "middle"], ["middle"], ["dec1.a", "dec1.b"]),
        (["middle", "middle"], ["middle"], []),
    ],
)
def test_sites_by_name(sites: Any, levels: list[str], layers: list[str]) -> None:
    found = plan("u_shape", sites=sites)
    assert (names(found, "level"), names(found, "layer")) == (levels, layers)


@pytest.mark.parametrize(
    ("case", "sites", "said"),
    [
        ("u_shape", "midle", ["'midle'", "middle", "named_modules()"]),
        ("u_shape", "stage:middle", ["'stage:middle'", "'stage'", "level: or layer:"]),
        ("u_shape", "layer:middle", ["'layer:middle'", "no ungrouped Conv2d and no Linear"]),
        ("mixed", "layer:layers.0", ["'layer:layers.0'", "no ungrouped Conv2d"]),
        ("attention", "mha.out_proj", ["mha.out_proj", "never fires"]),
        ("attention", "mha", ["mha", "not a single real tensor"]),
        ("mixed", "layers", ["layers", "never fires"]),
        ("shared", "block", ["block", "runs 3 times"]),
        ("writes_features", "part", ["part", "changed in place"]),
        ("writes_features", "level:head", ["head", "backward pass", "leave these sites out"]),
        ("sequence_first", "level:a", ["a:", "no feature map"]),
        ("u_shape", "level:ending", ["ending", "an image, not features"]),
        ("u_shape", [], ["sites=[]: expected dotted names", "None finds the sites"]),
        ("u_shape", [3], ["sites=[3]: expected dotted names"]),
    ],
)
def test_unusable_names_are_refused_with_the_reason(case: str, sites: Any, said: list[str]) -> None:
    with pytest.raises(SiteError) as error:
        plan(case, sites=sites)
    assert [part for part in said if part not in str(error.value)] == []


class OneSize(nn.Module):
    """Takes 8 x 8 only, where 8 channels first or last look the same."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail = zoo.conv(3, 8), zoo.conv(8, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        assert image.shape[-2:] == (8, 8)
        return self.tail(self.head(image))


def test_an_ambiguous_layout_is_refused() -> None:
    with pytest.raises(SiteError, match="ambiguous, NCHW or NHWC"):
        plan_sites(OneSize(), sites="level:head", example=torch.rand(1, 3, 8, 8))


def test_a_noise_map_is_resized_with_the_image() -> None:
    (site,) = plan("noise_level", sites="level:head")
    assert (site.layout, site.stride) == (Layout(0, 1), 1)


def test_the_plan_prints_as_a_table() -> None:
    lines = str(plan("u_shape", sites=["middle", "dec1.a"])).splitlines()
    assert lines[0].split() == "site role channels stride layout rank parameters why".split()  # noqa: SIM905
    assert lines[1].split()[:5] == ["middle", "level", "32", "4", "NCHW"]
    assert "1 level and 1 layer sites" in lines[-1]


def test_the_plan_survives_json() -> None:
    for case in ("u_shape", "windows_alternating", "upscaler", "zero_scale"):
        found = plan(case)
        assert from_dict(SitePlan, json.loads(json.dumps(to_dict(found))), "plan") == found


def test_a_frozen_zero_scale_is_reported() -> None:
    assert plan("zero_scale").blocked == ("hidden",)
    assert plan("isotropic").blocked == ()


def test_a_network_that_draws_random_numbers_always_gets_the_same_plan() -> None:
    plans = []
    for seed in range(3):
        torch.manual_seed(seed)
        plans.append(plan_sites(zoo.Noisy()))
    assert plans[0] == plans[1] == plans[2]
    assert "body.0.a" in names(plans[0], "layer")


# Other layers in training mode


def test_the_module_that_leaves_sites_out_in_training_mode_is_held() -> None:
    assert plan("reparametrized").eval_only == ("body.0", "body.1", "body.2")
    assert "body.0.merged" in names(plan("reparametrized"), "layer")
    assert plan("mixed").eval_only == plan("u_shape").eval_only == ()


class Deploys(nn.Module):
    """The network itself leaves a layer out, and gives something else, in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.last, self.aside = zoo.conv(3, 8), zoo.conv(8, 3), zoo.conv(8, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.head(image))
        return self.aside(x) if self.training else self.last(x)


def test_only_the_flag_of_the_module_that_decides_is_held() -> None:
    net = Deploys()
    assert plan_sites(net).eval_only == ("",)
    model = wrap(net, perceiver=False).train()
    assert (model.backbone.training, model.backbone.drop.training) == (False, True)


def test_a_network_that_overwrites_features_in_eval_mode_is_tried_in_training_mode() -> None:
    found = plan_sites(zoo.WritesInEval().eval())
    assert names(found, "layer") == ["head", "first", "mix", "last"]
    assert names(plan("writes_features"), "layer") == ["last"]


# Budget


def test_small_networks_get_at_most_120_000_parameters() -> None:
    for case in ("u_shape", "restormer"):
        found = plan(case)
        assert found.parameters <= 120_000
        assert found.parameters == wrap(CASES[case].net(), perceiver=False).status().trainable


def test_large_networks_get_at_most_three_percent() -> None:
    found = plan_sites(zoo.UShape(width=192), example=torch.rand(1, 3, 16, 16))
    assert found.backbone_parameters > 4_000_000
    assert 0.02 < found.parameters / found.backbone_parameters <= 0.03
    assert {site.rank for site in found.of("layer")} < set(range(1, 17))


def test_the_rank_falls_with_the_budget_and_then_the_dearest_layers_go() -> None:
    whole = plan("u_shape")
    for budget, all_layers in ((60_000, True), (whole.encoder_parameters + 4_000, False)):
        found = plan("u_shape", config=AdapterConfig(budget=budget))
        assert found.parameters <= budget
        assert max(s.rank for s in found.of("layer")) < 16
        assert (len(found.of("layer")) == len(whole.of("layer"))) is all_layers


def test_a_named_rank_stays_unless_a_named_budget_forbids() -> None:
    found = plan("u_shape", config=AdapterConfig(rank=16, max_rank=4))
    assert max(site.rank for site in found.of("layer")) == 16
    budget = found.parameters - 1
    smaller = plan("u_shape", config=AdapterConfig(rank=16, budget=budget))
    assert smaller.parameters <= budget
    assert len(smaller) < len(found)


@pytest.mark.parametrize("options", [{}, {"sites": "**"}])
def test_an_impossible_budget_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SiteError, match=r"budget is 1,000;.*AdapterConfig\(budget=...\)"):
        plan("u_shape", config=AdapterConfig(budget=1_000), **options)


def test_a_rank_never_exceeds_what_the_layer_can_use() -> None:
    found = {site.name: site.rank for site in plan("u_shape").of("layer")}
    assert found["ending"] == 3
    assert found["intro"] == 8


# The backbone stays as it was


@pytest.mark.parametrize("case", CASES)
def test_planning_leaves_no_trace(case: str) -> None:
    net = CASES[case].net().train()
    next(net.parameters()).requires_grad_(False)
    before = state(net)
    plan_sites(net, **CASES[case].wrap)
    assert state(net) == before


class Fails(zoo.Isotropic):
    """Counts its calls in a buffer, draws random numbers, and gives up late."""

    def __init__(self, when: str = "always") -> None:
        super().__init__()
        self.when = when
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        restored = super().forward(image + 0 * torch.rand(()))
        if self.when == "always" or (self.when == "grad" and restored.requires_grad):
            raise RuntimeError("out of cheese")
        return restored


FAILURES: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "raises": (Fails, {}, BackboneError, "out of cheese"),
    "raises in backward": (lambda: Fails("grad"), {}, SiteError, "out of cheese"),
    "returns None": (lambda: zoo.Packed(None), {}, BackboneError, "returned None"),
    "no match": (zoo.UShape, {"sites": "nothing"}, SiteError, "'nothing'"),
    "no budget": (zoo.UShape, {"config": AdapterConfig(budget=9)}, SiteError, "budget"),
    "nothing to inject": (nn.Identity, {}, SiteError, "no injection site"),
    "batch": (zoo.UShape, {"example": torch.rand(2, 3, 64, 64)}, BackboneError, "batch of one"),
    "size": (zoo.Multiple, {"example": torch.rand(1, 3, 9, 9)}, BackboneError, "multiples of 8"),
    "uint8": (zoo.UShape, {"example": torch.ones(1, 3, 8, 8).byte()}, ImageError, "uint8"),
    "no image": (zoo.UShape, {"example": ()}, BackboneError, "image_arg=0"),
    "argument": (zoo.UShape, {"image_arg": "picture"}, BackboneError, "picture"),
    "position": (zoo.NoiseLevel, {"image_arg": -1}, ConfigError, "image_arg=-1"),
    "value range": (zoo.UShape, {"value_range": (1, 0)}, ConfigError, "low < high"),
    "perceiver": (zoo.UShape, {"perceiver": 3}, ConfigError, "expected a QualityPerceiver"),
    "semantic": (zoo.UShape, {"config": AdapterConfig(semantic="no_vit")}, ConfigError, "no_vit"),
    "unsteered": (
        zoo.UShape,
        {"config": AdapterConfig(compact_dim=0), "perceiver": False},
        ConfigError,
        "sources",
    ),
    "adapter": (zoo.UShape, {"pretrained": "/no/folder"}, CheckpointError, "/no/folder"),
    "both": (zoo.UShape, {"pretrained": "a/b", "sites": "middle"}, ConfigError, "leave out"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_wrap_leaves_no_trace(failure: str) -> None:
    build, options, kind, said = FAILURES[failure]
    net = build().train()
    before = state(net)
    with pytest.raises(kind, match=said):
        wrap(net, **options)
    assert state(net) == before


def test_a_module_that_is_no_network_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"expected a torch\.nn\.Module"):
        wrap("restormer")
    with pytest.raises(BackboneError, match="meta"):
        wrap(zoo.UShape().to("meta"))


def test_lazy_modules_are_to_run_once_before() -> None:
    net = nn.Sequential(nn.LazyConv2d(8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1))
    with pytest.raises(BackboneError, match="run it once"):
        wrap(net)
    net(torch.rand(1, 3, 8, 8))
    wrap(net)


def test_a_guessed_image_lies_where_the_network_is() -> None:
    net = zoo.UShape()
    with torch.device("meta"):
        example, _ = dry_run(net, None, 0)
    assert example.image.device == torch.device("cpu")


def test_compiled_scripted_and_wrapped_networks_are_refused() -> None:
    in_place = zoo.Isotropic()
    in_place.compile(backend="eager")
    for compiled in (torch.compile(zoo.Isotropic(), backend="eager"), in_place):
        with pytest.raises(CompiledBackboneError, match=r"torch.compile\(wrap\(backbone\)\)"):
            wrap(compiled)
    scripted = torch.jit.trace(zoo.Isotropic(), torch.rand(1, 3, 8, 8))
    with pytest.raises(CompiledBackboneError, match="scripted"):
        wrap(scripted)
    model = wrap(zoo.Isotropic())
    for again in (model, model.backbone):
        before = state(again)
        with pytest.raises(AlreadyWrappedError, match=r"unwrap\(\)"):
            wrap(again)
        assert state(again) == before


def test_plans_are_values() -> None:
    found = plan("u_shape")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.scale = 2.0  # type: ignore[misc]
    assert len(found) == len(list(found)) == len(found.of("level")) + len(found.of("layer"))


class PadsByItself(nn.Conv2d):
    """Pads its input to keep its size, as timm's Conv2dSame does."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(image, (1, 1, 1, 1)))


def test_convolutions_that_pad_by_themselves_take_no_branch() -> None:
    net = nn.Sequential(PadsByItself(3, 8, 3), nn.GELU(), nn.Conv2d(8, 3, 3, padding=1))
    assert names(plan_sites(net), "layer") == ["2"]
    with pytest.raises(SiteError, match="0: it pads its input by itself"):
        plan_sites(net, sites="layer:0")


class Splits(nn.Conv2d):
    """Gates one half of its output by the other."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        value, gate = super().forward(image).chunk(2, 1)
        return value * gate.sigmoid()


def test_layers_that_give_other_channels_than_their_weight_take_no_branch() -> None:
    net = nn.Sequential(Splits(3, 16, 3, padding=1), nn.GELU(), zoo.conv(8, 3))
    assert names(plan_sites(net), "layer") == ["2"]
    with pytest.raises(SiteError, match="0: its output has other channels than its weight"):
        plan_sites(net, sites="layer:0")


class OneByOne(nn.Module):
    """Restores the images of a batch in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.body = zoo.Isotropic()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.body(one[None]) for one in image])


def test_a_network_that_takes_a_batch_apart_is_refused() -> None:
    with pytest.raises(SiteError, match="sees each image of a batch"):
        plan_sites(OneByOne())


class InPairs(zoo.Isotropic):
    """Runs two images at a time."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([super(InPairs, self).forward(part) for part in image.split(2)])


def test_a_network_that_takes_a_batch_in_parts_says_how_many() -> None:
    model = wrap(InPairs(), perceiver=False)
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 3, 16, 16)
    with pytest.raises(PerceptionError, match="call with 2 images"):
        model(torch.rand(4, 3, 16, 16))


class Spectral(nn.Module):
    """Has a layer that works on frequencies, and a weight of its own that comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.ones(8, dtype=torch.cfloat))
        self.head, self.last = zoo.conv(3, 8), zoo.conv(8, 3)
        self.mix = nn.Linear(8, 8, dtype=torch.cfloat)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.head(image)
        frequencies = self.mix(torch.fft.rfft2(x).movedim(1, -1)) * self.gains
        return self.last(x + torch.fft.irfft2(frequencies.movedim(-1, 1), s=x.shape[-2:]))


def test_complex_layers_take_no_branch_and_can_be_unfrozen() -> None:
    model = wrap(Spectral(), perceiver=False)
    assert names(model.sites, "layer") == ["head", "last"]
    assert {"gains", "mix.weight"} < set(model.unfreeze("**"))
    assert model.restore(torch.rand(3, 20, 20)).shape == (3, 20, 20)


class KeptInFloat(nn.Module):
    """A network in half precision beside parameters that are not."""

    def __init__(self, first: torch.Tensor) -> None:
        super().__init__()
        self.first = nn.Parameter(first, requires_grad=False)
        self.body = zoo.Isotropic().bfloat16()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.body(image)


@pytest.mark.parametrize("first", [torch.ones(1), torch.arange(4)], ids=["float32", "int64"])
def test_images_have_the_precision_of_the_layers(first: torch.Tensor) -> None:
    model = wrap(KeptInFloat(first), perceiver=False)
    assert model.size_multiple == 1
    assert model.restore(torch.rand(3, 20, 20)).shape == (3, 20, 20)


def test_nothing_is_unfrozen_where_one_parameter_cannot_train() -> None:
    model = wrap(KeptInFloat(torch.arange(4)), perceiver=False)
    with pytest.raises(SiteError, match=r"'first' is torch\.int64; it cannot train"):
        model.unfreeze("body.**", "first")
    assert model.status().unfrozen == ()


def _untrained(model: PerceiveModel) -> set[str]:
    """Names of the backbone's parameters that get no gradient."""
    model(torch.rand(1, 3, 32, 32)).square().mean().backward()
    return {name for name, p in model.backbone.named_parameters() if p.grad is None}


@pytest.mark.parametrize("order", ["unfreeze", "train, unfreeze", "unfreeze, train"])
def test_unfrozen_modules_that_were_held_in_eval_mode_train(order: str, tmp_path: Path) -> None:
    model = wrap(zoo.Reparametrized(), perceiver=False)
    for step in order.split(", "):
        model.train() if step == "train" else model.unfreeze("**")
    merged = {name for name, _ in model.backbone.named_parameters() if ".merged." in name}
    assert _untrained(model) == merged  # which are made of the others
    model.save_pretrained(tmp_path)
    assert _untrained(wrap(model.unwrap(), tmp_path, is_trainable=True)) == merged


def test_named_sites_of_a_role_without_prompts_are_refused() -> None:
    config = AdapterConfig(level=None)
    with pytest.raises(SiteError, match=r"AdapterConfig\(level=None\) puts no prompts at levels"):
        plan_sites(zoo.Isotropic(), sites=["level:body.1", "layer:head"], config=config)
    everything = plan_sites(zoo.Isotropic(), sites="**", config=config)
    assert not everything.of("level")


class TakesSigma(zoo.Isotropic):
    def forward(self, lq: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return super().forward(lq) + 0 * sigma


def test_examples_and_image_arguments_may_be_named_or_placed() -> None:
    lq, sigma = torch.rand(1, 3, 32, 32), torch.rand(1, 1, 1, 1)
    plans = [
        plan_sites(TakesSigma(), example=example, image_arg=image_arg)
        for example in ((lq, sigma), {"lq": lq, "sigma": sigma})
        for image_arg in (0, "lq")
    ]
    assert plans[0] == plans[1] == plans[2] == plans[3]


def test_a_network_without_gradients_is_told_so() -> None:
    net = CASES["u_shape"].net()
    forward = net.forward
    net.forward = torch.no_grad()(forward)  # type: ignore[method-assign]
    with pytest.raises(SiteError, match=r"no gradient of the output.*turn gradients off"):
        wrap(net, perceiver=False)
