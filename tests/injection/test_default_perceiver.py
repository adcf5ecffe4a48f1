"""What ``wrap`` does when nobody says what is to perceive: the bundled perceiver steers."""

import dataclasses
from pathlib import Path

import pytest
import timm
import torch
import zoo
from safetensors.torch import save_file
from wrapping import moved, wrapped

from perceive_adapter import AdapterConfig, PerceiveModel, Perception, QualityPerceiver, wrap
from perceive_adapter.errors import BackboneError, ConfigError, PerceptionError

IMAGE = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def perceiver() -> QualityPerceiver:
    return QualityPerceiver.from_pretrained("perceive-tiny")


@pytest.fixture
def model() -> PerceiveModel:
    model = wrap(zoo.UShape().eval())
    moved(model.injector)
    return model


def test_prompts_are_steered_by_what_is_told_of_the_damage(
    model: PerceiveModel, perceiver: QualityPerceiver
) -> None:
    kinds = len(perceiver.degradations)
    assert model.injector.config.sources == {
        "compact": 64,
        "tiers": 3,
        "degradations": kinds,
        "severity": kinds,
    }
    assert model.status().trainable <= 120_000
    expected, actual = perceiver(IMAGE), model.perceive(IMAGE)
    for name in ("tiers", "degradations", "severity", "embedding"):
        assert torch.equal(getattr(actual, name), getattr(expected, name))


def test_what_is_perceived_changes_the_output(model: PerceiveModel) -> None:
    perception = model.perceive(IMAGE).known()
    output = model(IMAGE)
    assert torch.equal(model(IMAGE, perception=Perception(**perception)), output)
    for name in ("tiers", "degradations", "severity"):
        other = Perception(**{**perception, name: perception[name].flip(1)})
        assert not torch.equal(model(IMAGE, perception=other), output)


def test_two_models_share_no_perceiver() -> None:
    first, second = wrap(zoo.UShape()), wrap(zoo.UShape())
    assert first.perceiver is not second.perceiver
    assert first.perceiver.fingerprint() == second.perceiver.fingerprint()
    assert not any(p.requires_grad for p in first.perceiver.parameters())


def test_a_saved_adapter_names_it_and_finds_it_again(model: PerceiveModel, tmp_path: Path) -> None:
    expected = model(IMAGE)
    model.save_pretrained(tmp_path)
    assert '"perceive-tiny"' in (tmp_path / "adapter_config.json").read_text()
    assert torch.equal(wrap(model.unwrap(), tmp_path)(IMAGE), expected)


def test_gray_images_are_perceived() -> None:
    case = zoo.CASES["gray"]
    model = wrap(case.net(), **case.wrap)
    assert "degradations" in model.injector.config.sources


def test_other_channels_are_left_to_the_compact_features() -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(5, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 5, 3, padding=1)
    )
    for asked in (
        {"perceiver": "perceive-tiny"},
        {"config": AdapterConfig(semantic="perceive-tiny")},
    ):
        with pytest.raises(ConfigError, match="have 5 channels, and a perceiver"):
            wrap(net, **asked)
    model = wrap(net)
    assert model.perceiver is None
    assert model.injector.config.sources == {"compact": 64}


def test_named_sources_are_the_callers_own() -> None:
    model = wrap(zoo.UShape().eval(), config=AdapterConfig(sources={"degradations": 2}))
    assert model.perceiver is None
    with pytest.raises(PerceptionError, match="degradations"):
        model(IMAGE)
    two = Perception(degradations=torch.eye(2))
    assert model(IMAGE, perception=two).shape == IMAGE.shape


def test_sources_that_are_told_otherwise_are_refused() -> None:
    net = zoo.UShape()
    config = AdapterConfig(sources={"compact": 64, "tiers": 5})
    with pytest.raises(ConfigError, match="tiers has width 5, and what perceives here tells 3"):
        wrap(net, config=config, perceiver="perceive-tiny")
    assert not any(module._forward_hooks for module in net.modules())


def test_tiles_share_the_perception_of_the_whole(model: PerceiveModel) -> None:
    photo = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(1))
    seen = []
    model.perceiver.register_forward_hook(lambda *_: seen.append(1))
    restored = model.restore(photo, tile=80, overlap=16)
    assert restored.shape == photo.shape
    assert len(seen) == 1


def test_compiles_and_exports_with_the_perceiver_inside(model: PerceiveModel) -> None:
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = model(IMAGE)
        torch.testing.assert_close(compiled(IMAGE), expected, rtol=1e-4, atol=1e-5)
        exported = torch.export.export(model, (IMAGE,)).module()
        torch.testing.assert_close(exported(IMAGE), expected, rtol=1e-4, atol=1e-5)


def test_the_semantic_tower_needs_no_download() -> None:
    config = AdapterConfig(semantic="perceive-tiny")
    model = wrap(zoo.UShape().eval(), config=config)
    semantic = model.perceive(IMAGE).semantic
    assert semantic.shape == (2, 1, 192)
    assert semantic.norm(dim=-1).tolist() == [[pytest.approx(1)], [pytest.approx(1)]]
    moved(model.injector)
    seen = model.perceive(IMAGE)
    steered = model(IMAGE, perception=seen)
    other = dataclasses.replace(seen, semantic=seen.semantic.roll(1, 0))
    assert not torch.allclose(steered, model(IMAGE, perception=other))


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_mambaout", "test_coatnet"])
def test_any_image_model_of_timm_may_guide(name: str, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model(name, num_classes=0).state_dict(), weights)
    config = AdapterConfig(semantic=name, semantic_weights=str(weights))
    model = wrap(zoo.UShape().eval(), config=config, perceiver=False)
    semantic = model.perceive(IMAGE).semantic
    assert semantic.shape == (2, model.semantic.levels, model.semantic.dim)
    assert semantic.norm(dim=-1).flatten().tolist() == pytest.approx([1] * semantic[..., 0].numel())
    model(IMAGE)


def test_treat_names_degradations_that_the_perceiver_tells(
    model: PerceiveModel, tmp_path: Path
) -> None:
    model.treat("rain", "low_light")
    columns = tuple(model.perceiver.degradations.index(name) for name in ("rain", "low_light"))
    assert model.injector.config.treats == columns
    clean = torch.full((1, 3, 64, 64), 0.5)
    seen = dataclasses.replace(model.perceive(clean), severity=torch.zeros(1, 6))
    with model.disabled():
        bare = model(clean)
    assert torch.equal(model(clean, perception=seen), bare)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"fog cannot be told apart: .* tells haze, rain"):
        model.treat("rain", "fog")
    assert model.injector.config.treats == columns
    model.treat()
    assert not torch.equal(model(clean, perception=seen), bare)
    with pytest.raises(ConfigError, match="is not there or tells none"):
        wrapped("u_shape").treat("rain")
    again = wrap(model.unwrap(), tmp_path)
    assert torch.equal(again(clean, perception=seen), bare)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_semantics_guide_in_half_precision(dtype: torch.dtype) -> None:
    model = wrap(zoo.UShape(), config=AdapterConfig(semantic="perceive-tiny"))
    image = torch.rand(2, 3, 32, 32)
    expected = model.perceive(image).semantic
    found = model.to(dtype).perceive(image.to(dtype)).semantic
    assert found.dtype == dtype
    assert torch.cosine_similarity(found.float(), expected, dim=-1).min() > 0.99


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_old_way_of_tracing_names_the_new_one(model: PerceiveModel) -> None:
    with pytest.raises(BackboneError, match=r"use torch\.export, or torch\.onnx\.export"):
        torch.jit.trace(model, (IMAGE,))
    bare = wrap(zoo.UShape(), perceiver=False).eval()
    traced = torch.jit.trace(bare, (IMAGE,), check_trace=False)
    torch.testing.assert_close(traced(IMAGE), bare(IMAGE))
