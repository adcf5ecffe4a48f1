"""Each kind of prompt module against its formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from wrapping import moved

from perceive_adapter import AdapterConfig, PerceptionError, plan_sites
from perceive_adapter.injection.branches import Branches
from perceive_adapter.injection.plan import Geometry, Layout, Site
from perceive_adapter.injection.prompts import build_prompt

CONFIG = AdapterConfig(level="cross_attention", attention_dim=8, attention_heads=2, rank=2)


MAPS = Layout()


def level(config: AdapterConfig = CONFIG, layout: Layout = MAPS, channels: int = 6) -> nn.Module:
    torch.manual_seed(0)
    prompt = build_prompt(Site("x", "level", channels, 1.0, layout), config)
    moved(prompt, scale=0.3)
    return prompt


def test_modulation_scales_and_shifts_each_channel() -> None:
    prompt = level(AdapterConfig())
    features, condition = torch.rand(2, 6, 4, 5), torch.rand(2, 17)
    gamma, beta = prompt.to_scale_shift(condition).chunk(2, dim=1)
    expected = features * (1 + gamma[..., None, None]) + beta[..., None, None]
    torch.testing.assert_close(prompt(features, condition, features), expected)


def test_cross_attention_is_softmax_over_channels_of_normalised_queries_and_keys() -> None:
    prompt = level()
    features, condition = torch.rand(1, 6, 4, 5), torch.rand(1, 17)
    guided = prompt.guide(features, condition, features)
    query = prompt.to_query.weight @ guided.flatten(2)[0]
    key, value = (prompt.to_key_value.weight @ features.flatten(2)[0]).chunk(2)
    heads: list[Tensor] = []
    for q, k, v, t in zip(
        *(x.chunk(2) for x in (query, key, value)), prompt.temperature, strict=True
    ):
        weights = (F.normalize(q, dim=1) @ F.normalize(k, dim=1).T * t).softmax(dim=1)
        heads.append(weights @ v)
    attended = (prompt.to_out.weight @ torch.cat(heads)).view(1, 6, 4, 5)
    expected = guided + condition[0, -1] * attended
    torch.testing.assert_close(prompt(features, condition, features), expected)


@pytest.mark.parametrize("size", [0.0, 1000.0])
def test_cross_attention_in_half_precision(size: float) -> None:
    prompt, condition = level(), torch.rand(1, 17)
    nn.init.zeros_(prompt.guide.to_scale_shift.weight)  # black features stay black
    features = size * torch.rand(1, 6, 300, 300)
    expected = prompt(features, condition, features)
    half = features.half()
    found = prompt.half()(half, condition.half(), half)
    torch.testing.assert_close(found.float(), expected, rtol=0.01, atol=1e-3 * (1 + size))


@pytest.mark.parametrize("kind", ["modulation", "cross_attention"])
def test_layouts_of_one_feature_map_agree(kind: str) -> None:
    config = AdapterConfig(level=kind)
    maps, condition = torch.rand(2, 6, 4, 5), torch.rand(2, 17)
    expected = level(config)(maps, condition, maps)
    nhwc = maps.permute(0, 2, 3, 1)
    actual = level(config, Layout(0, -1))(nhwc, condition, nhwc)
    torch.testing.assert_close(actual.permute(0, 3, 1, 2), expected)
    tokens = nhwc.flatten(1, 2)
    actual = level(config, Layout(0, -1))(tokens, condition, tokens)
    torch.testing.assert_close(actual.transpose(1, 2).view(2, 6, 4, 5), expected)


LAYERS = {
    "plain": nn.Conv2d(4, 6, 3, padding=1),
    "strided, dilated": nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2),
    "reflecting": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "same": nn.Conv2d(4, 6, (3, 5), padding="same"),
    "patches": nn.Conv2d(4, 6, 2, stride=2, bias=False),
    "linear": nn.Sequential(nn.Conv2d(4, 7, 1), nn.Flatten(2), nn.Linear(256, 6)),
}


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.back = layer, nn.LazyConv2d(3, 1)
        self.resize = nn.Upsample((16, 16))

    def forward(self, image: Tensor) -> Tensor:
        features = self.layer(torch.cat([image, image[:, :1]], dim=1))
        return self.back(self.resize(features[..., None] if features.ndim == 3 else features))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_branch_is_the_weight_that_folding_makes(layer: str) -> None:
    net = Net(LAYERS[layer])
    net(torch.rand(1, 3, 16, 16))
    pattern = "layer:layer.2" if layer == "linear" else "layer:layer"
    (site,) = plan_sites(net, sites=pattern, example=torch.rand(1, 3, 16, 16), config=CONFIG)
    module = net.get_submodule(site.name)
    prompt = build_prompt(site, CONFIG)
    moved(prompt, scale=0.3)
    condition = torch.rand(1, 17)
    source = torch.rand(1, 7, 256) if layer == "linear" else torch.rand(1, 4, 16, 16)
    expected = prompt(module(source), condition, source)
    folded = Branches({"x": (prompt, 0.0)}).folded(condition[None], {"x": module.weight.detach()})
    folded = folded["x"]
    assert (folded - module.weight).abs().max() > 0.01
    actual = torch.func.functional_call(module, {"weight": folded}, (source,))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


LAYOUTS = {
    "nchw": (Layout(), lambda x: x),
    "channels last": (Layout(), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "one position": (Layout(), lambda x: x[..., :1, :1].contiguous()),
    "nhwc": (Layout(0, -1), lambda x: x.permute(0, 2, 3, 1).contiguous()),
    "tokens": (Layout(0, -1), lambda x: x.flatten(2).transpose(1, 2).contiguous()),
    "vectors": (Layout(0, -1), lambda x: x[:, :, 0, 0].contiguous()),
    "sequence first": (Layout(1, -1), lambda x: x.flatten(2).permute(2, 0, 1).contiguous()),
    "columns": (Layout(1, -1, "minor"), lambda x: x.permute(2, 3, 0, 1).flatten(1, 2)),
    "rows": (Layout(1, -1, "major"), lambda x: x.permute(2, 0, 3, 1).flatten(1, 2)),
    "windows": (Layout(0, -1, "major"), lambda x: x.permute(0, 3, 2, 1).flatten(0, 1)),
    "alternating": (Layout(0, -1, "minor"), lambda x: x.permute(3, 0, 2, 1).flatten(0, 1)),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_branch_in_any_layout(name: str, batch: int) -> None:
    layout, lay_out = LAYOUTS[name]
    walk = Geometry((1, 1), (0, 0), (1, 1), "zeros") if layout == Layout() else None
    shape = (5, 7, 1, 1) if walk else (5, 7)
    prompt = build_prompt(
        Site("x", "layer", 5, 1.0, layout, rank=2, weight_shape=shape, geometry=walk), CONFIG
    )
    moved(prompt, scale=0.3)
    features, source, condition = (
        torch.rand(2, 5, 4, 3),
        torch.rand(2, 7, 4, 3),
        torch.rand(batch, 17),
    )
    gated = prompt.gated(condition).expand(2, -1, -1)
    down = prompt.down.weight.flatten(1)
    expected = lay_out(features + torch.einsum("bcr,rs,bshw->bchw", gated, down, source))
    features, source = lay_out(features), lay_out(source)
    strides = features.stride()
    for in_place in (False, True):
        with torch.set_grad_enabled(not in_place):
            actual = prompt(features, condition, source, in_place=in_place)
        torch.testing.assert_close(actual, expected)
        assert actual.stride() == strides or actual.shape[2:].numel() == 1


def branches(count: int) -> dict[str, tuple[nn.Module, float]]:
    """Low-rank branches of two shapes, in turn."""
    found = {}
    for i in range(count):
        shape = (5, 7) if i % 2 else (6, 4)
        site = Site(f"{i}", "layer", shape[0], 1.0, Layout(0, -1), rank=2, weight_shape=shape)
        prompt = build_prompt(site, CONFIG)
        moved(prompt, seed=i, scale=0.3)
        found[site.name] = (prompt, i / count)
    return found


@pytest.mark.parametrize("depths", [1, 3])
def test_branches_give_together_what_each_gives_alone(depths: int) -> None:
    modules, condition = branches(7), torch.rand(2, depths, 17)
    together = Branches(modules).ready(condition, torch.bfloat16)
    assert together.keys() == modules.keys()
    for name, (prompt, depth) in modules.items():
        alone = prompt.gated(condition[:, int(depth * depths)])
        torch.testing.assert_close(together[name].gated, alone)
        assert together[name].down is None  # gradients are wanted


@torch.no_grad()
def test_branches_are_cast_to_bfloat16() -> None:
    modules, condition = branches(4), torch.rand(2, 1, 17)
    for name, ready in Branches(modules).ready(condition, torch.bfloat16).items():
        prompt, _ = modules[name]
        assert ready.down is not None
        assert torch.equal(ready.down, prompt.down.weight.to(torch.bfloat16))
        assert torch.equal(ready.gated, prompt.gated(condition[:, 0]).to(torch.bfloat16))
    for own in (torch.float32, torch.float16):  # whose range is smaller
        assert all(r.down is None for r in Branches(modules).ready(condition, own).values())


def test_sharded_branches_stay_apart() -> None:
    class Sharded(torch.Tensor):
        pass

    modules, condition = branches(2), torch.rand(1, 1, 17)
    gate = modules["0"][0].gate
    gate.weight = nn.Parameter(gate.weight.detach().as_subclass(Sharded))
    assert type(gate.weight) is not nn.Parameter
    assert Branches(modules).ready(condition, torch.float32) == {}
    assert Branches(modules).folded(condition, {"0": torch.zeros(6, 4)}) == {}


def test_rows_of_windows_go_to_their_images() -> None:
    values, features = torch.tensor([[1.0], [2.0]]), torch.zeros(6, 5, 1)
    major = Layout(0, -1, "major").spread(values, features).flatten().tolist()
    minor = Layout(0, -1, "minor").spread(values, features).flatten().tolist()
    assert (major, minor) == ([1, 1, 1, 2, 2, 2], [1, 2, 1, 2, 1, 2])
    with pytest.raises(PerceptionError, match="of 4 images, and a site sees 6 rows"):
        Layout(0, -1).spread(torch.rand(4, 1), features)
