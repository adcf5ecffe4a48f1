"""Adapters saved and loaded: exact, small, strict, and safe to read from strangers."""

import copy
import json
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from wrapping import KINDS, moved, relative, wrapped
from zoo import CASES

from perceive_adapter import (
    AdapterConfig,
    AdapterMismatchError,
    CheckpointError,
    ConfigError,
    PerceiveError,
    QualityPerceiver,
    UntrainedPerceiverWarning,
    wrap,
)

IMAGE = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    wrapped("isotropic").save_pretrained(folder)
    return folder


def net(seed: int = 0) -> nn.Module:
    return CASES["isotropic"].net(seed)


def edited(saved: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Copy a saved adapter and change its config."""
    config = json.loads((saved / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / TENSORS).write_bytes((saved / TENSORS).read_bytes())
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["u_shape", "windows_alternating", "tokens"])
def test_a_loaded_adapter_gives_the_same_output(case: str, kind: str, tmp_path: Path) -> None:
    model = wrapped(case, config=KINDS[kind])
    model.save_pretrained(tmp_path)
    loaded = wrap(CASES[case].net(), str(tmp_path), is_trainable=True)
    assert torch.equal(loaded(IMAGE), model(IMAGE))
    assert loaded.sites == model.sites
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trainable
    frozen = wrap(CASES[case].net(), tmp_path)
    assert not list(frozen.trainable_parameters())
    assert relative(frozen(IMAGE), model(IMAGE)) < 1e-6  # torch rounds frozen matrices differently


def test_the_folder_is_small_and_holds_a_card(saved: Path) -> None:
    assert {file.name for file in saved.iterdir()} == {CONFIG, TENSORS, "README.md"}
    trainable = wrapped("isotropic").status().trainable
    assert (saved / TENSORS).stat().st_size < 4 * trainable + 20_000
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: perceive_adapter")
    assert "body.3" in card


def test_a_fresh_process_gives_the_same_output(saved: Path, tmp_path: Path) -> None:
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from zoo import CASES
from perceive_adapter import wrap
torch.set_num_threads({torch.get_num_threads()})  # rounding depends on it
image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
torch.save(wrap(CASES["isotropic"].net(), sys.argv[1])(image), sys.argv[2])
"""
    output = tmp_path / "output.pt"
    subprocess.run([sys.executable, "-c", code, str(saved), str(output)], check=True)
    assert torch.equal(torch.load(output), wrap(net(), saved)(IMAGE))


def test_unfrozen_weights_are_saved_loaded_and_taken_back(tmp_path: Path) -> None:
    model = wrapped("isotropic")
    model.unfreeze("tail.*")
    with torch.no_grad():
        model.backbone.tail.weight += 0.1
    model.save_pretrained(tmp_path)
    fresh = net()
    original = fresh.tail.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the fingerprint is of the weights before training
        loaded = wrap(fresh, tmp_path)
    assert torch.equal(loaded(IMAGE), model(IMAGE))
    assert loaded.status().unfrozen == ()
    assert wrap(net(), tmp_path, is_trainable=True).status().unfrozen == (
        "tail.weight",
        "tail.bias",
    )
    assert torch.equal(loaded.unwrap().tail.weight, original)


def test_range_and_image_argument_are_kept(tmp_path: Path) -> None:
    case = CASES["keyword"]
    model = wrapped(case, value_range=(-1, 1))
    model.save_pretrained(tmp_path)
    loaded = wrap(case.net(), tmp_path)
    assert torch.equal(loaded(image=IMAGE), model(image=IMAGE))
    assert loaded.value_range == model.value_range
    assert torch.equal(loaded.restore(IMAGE), model.restore(IMAGE))
    wrap(case.net(), tmp_path, value_range=(-1, 1), image_arg="image")
    for other in ((0, 255), (0, 1)):
        with pytest.raises(ConfigError, match="value_range="):
            wrap(case.net(), tmp_path, value_range=other)
    with pytest.raises(ConfigError, match="image_arg="):
        wrap(case.net(), tmp_path, image_arg=1)


def test_saving_again_replaces(saved: Path, tmp_path: Path) -> None:
    wrapped("u_shape").save_pretrained(tmp_path)
    model = wrapped("isotropic", config=AdapterConfig(rank=1))
    model.save_pretrained(tmp_path)
    assert torch.equal(wrap(net(), tmp_path)(IMAGE), model(IMAGE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adapters(dtype: torch.dtype, tmp_path: Path) -> None:
    model = wrapped("isotropic").to(dtype)
    model.save_pretrained(tmp_path)
    loaded = wrap(net().to(dtype), tmp_path)
    assert torch.equal(loaded(IMAGE.to(dtype)), model(IMAGE.to(dtype)))


# Other backbones


@pytest.mark.parametrize("kind", ["modulation", "low_rank", "all"])
@pytest.mark.parametrize(
    ("made_for", "given"),
    [("restormer", "nafnet"), ("isotropic", "u_shape"), ("isotropic", "gray"), ("mixed", "tuple")],
)
def test_another_network_is_refused(made_for: str, given: str, kind: str, tmp_path: Path) -> None:
    model = wrapped(made_for, config=KINDS[kind])
    model.save_pretrained(tmp_path)
    other = CASES[given].net()
    before = [id(p) for p in other.parameters()]
    with pytest.raises(AdapterMismatchError, match=type(model.backbone).__name__):
        wrap(other, tmp_path)
    assert [id(p) for p in other.parameters()] == before
    assert not any(module._forward_hooks for module in other.modules())
    assert all(p.requires_grad for p in other.parameters())


def test_weights_that_a_network_writes_itself_do_not_warn(tmp_path: Path) -> None:
    model = wrapped("reparametrized")
    assert "body.1.merged.weight" in model.sites.rewritten
    model.save_pretrained(tmp_path)
    net = CASES["reparametrized"].net()
    net.body[1].merged.weight.data.zero_()  # it has not run yet
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(net, tmp_path)
    net = CASES["reparametrized"].net()
    net.body[1].wide.weight.data.zero_()
    with pytest.warns(UserWarning, match="other weights"):
        wrap(net, tmp_path)


def test_other_weights_warn(saved: Path) -> None:
    model = wrap(net(seed=1))
    for call in (lambda: wrap(net(seed=1), saved), lambda: model.add_adapter("other", saved)):
        with pytest.warns(UserWarning, match="other weights") as told:
            call()
        assert [one.filename for one in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(net(), saved)


# Damage


def test_an_adapter_that_diverged_is_refused(tmp_path: Path) -> None:
    model = wrapped("u_shape")
    with torch.no_grad():
        next(model.injector.layers.parameters())[0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"NaN or infinite values in 1 of its tensors"):
        wrap(CASES["u_shape"].net(), tmp_path)


def _truncate(folder: Path) -> None:
    file = folder / TENSORS
    file.write_bytes(file.read_bytes()[:-100])


def _flip(folder: Path) -> None:
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS).write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_truncate, "truncated or changed"),
        (_flip, "truncated or changed"),
        (lambda folder: (folder / TENSORS).unlink(), "is missing"),
        (lambda folder: (folder / CONFIG).unlink(), "is missing"),
        (lambda folder: (folder / CONFIG).write_text("{"), "is not JSON"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "expected an object"),
    ],
)
def test_damage_is_told(damage: Callable[[Path], Any], said: str, saved: Path, tmp_path: Path):
    damage(edited(saved, tmp_path, lambda config: None))
    with pytest.raises(CheckpointError, match=said):
        wrap(net(), tmp_path)


def test_paths_that_are_no_adapter_are_refused(saved: Path, tmp_path: Path) -> None:
    for path in (saved / CONFIG, tmp_path, tmp_path / "nowhere", "no-such-folder", ""):
        with pytest.raises(CheckpointError):
            wrap(net(), path)
    with pytest.raises(CheckpointError, match="is a file"):
        wrapped("isotropic").save_pretrained(saved / CONFIG)


# Configs from strangers

HUGE = 10**9
HOSTILE: list[tuple[str, Any]] = [
    ("format_version", 2),
    ("format_version", "1"),
    ("format_version", None),
    ("config", None),
    ("config.rank", -1),
    ("config.rank", "4"),
    ("config.rank", True),
    ("config.level", "evil"),
    ("config.level", None),
    ("config.condition_dim", HUGE),
    ("config.condition_dim", 10**18),
    ("config.sources", {"evil": 3}),
    ("config.sources", {"compact": HUGE}),
    ("config.sources", []),
    ("plan.sites", "sites"),
    ("plan.sites", []),
    ("plan.sites.0.name", ""),
    ("plan.sites.0.name", "body"),
    ("plan.sites.0.role", "layer"),
    ("plan.sites.0.role", "evil"),
    ("plan.sites.0.channels", HUGE),
    ("plan.sites.0.channels", -1),
    ("plan.sites.0.layout.batch_axis", 7),
    ("plan.sites.0.layout.channel_axis", 0),
    ("plan.sites.0.layout.order", "evil"),
    ("plan.sites.5.rank", HUGE),
    ("plan.sites.5.rank", 0),
    ("plan.sites.5.weight_shape", [HUGE, HUGE, 3, 3]),
    ("plan.sites.5.weight_shape", [8, 8, 3]),
    ("plan.sites.5.weight_shape", [8]),
    ("plan.sites.5.geometry", None),
    ("plan.sites.5.geometry.stride", [0, 0]),
    ("plan.sites.5.geometry.padding_mode", "evil"),
    ("plan.image_channels", 0),
    ("plan.image_channels", 10**12),
    ("plan.scale", 1e300),
    ("plan.scale", 1e4),
    ("plan.scale", -1.0),
    ("plan.probe_size", [10**6, 10**6]),
    ("plan.probe_size", [0, 0]),
    ("backbone", None),
    ("backbone.parameters", 3),
    ("perceiver", {"fingerprint": "0" * 64, "name": None}),
    ("perceiver", {"fingerprint": "0" * 64, "name": "/nowhere"}),
    ("value_range.std", [0.0]),
    ("value_range.std", [-1.0]),
    ("value_range.std", []),
    ("value_range.std", [1.0, 2.0]),
    ("image_position", -1),
    ("config.semantic", "evil"),
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("where", "value"), HOSTILE)
def test_hostile_values_are_refused(where: str, value: Any, saved: Path, tmp_path: Path) -> None:
    *path, last = where.split(".")

    def change(config: Any) -> None:
        for key in path:
            config = config[int(key) if key.isdigit() else key]
        config[last] = value

    with pytest.raises(CheckpointError):
        wrap(net(), edited(saved, tmp_path, change))


def test_a_huge_config_costs_no_memory(saved: Path, tmp_path: Path) -> None:
    def change(config: Any) -> None:
        config["config"]["condition_dim"] = 4_000_000  # a gigabyte in the encoder alone

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"the plan is of .* there are 8\d\d,"):
        wrap(net(), edited(saved, tmp_path, change))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_a_newer_format_names_the_remedy(saved: Path, tmp_path: Path) -> None:
    folder = edited(saved, tmp_path, lambda config: config.update(format_version=2))
    with pytest.raises(CheckpointError, match="upgrade perceive_adapter"):
        wrap(net(), folder)


@pytest.mark.parametrize("part", ["", "config", "plan"])
def test_unknown_keys_warn_and_load(part: str, saved: Path, tmp_path: Path) -> None:
    def change(config: Any) -> None:
        (config[part] if part else config)["from_the_future"] = 1

    with pytest.warns(UserWarning, match="unknown keys from_the_future"):
        loaded = wrap(net(), edited(saved, tmp_path, change))
    assert torch.equal(loaded(IMAGE), wrap(net(), saved)(IMAGE))


def test_a_missing_key_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="plan"):
        wrap(net(), edited(saved, tmp_path, lambda config: config.pop("plan")))


# With a perceiver

CLIP: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1},
}


def perceiver(seed: int = 0) -> QualityPerceiver:
    made = QualityPerceiver.create(CLIP, pretrained=None, context_length=4, seed=seed)
    with torch.no_grad():
        made.prompts.context += 0.1
    return made


def test_a_perceiver_steers_and_is_frozen() -> None:
    model = wrapped("isotropic", perceiver=perceiver())
    seen = model.perceive(IMAGE)
    assert {n for n, v in seen.known().items() if v.numel()} == {"compact", "tiers", "embedding"}
    assert not seen.tiers.requires_grad
    assert not any(p.requires_grad for p in model.perceiver.parameters())
    assert not model.train().perceiver.training
    sources = {"compact": 64, "tiers": 3, "embedding": 24}
    assert model.injector.encoder.sources == sources
    unsteered = wrapped("isotropic", perceiver=False)
    assert unsteered.perceiver is None


def test_a_perceiver_on_a_gray_backbone() -> None:
    model = wrapped("gray", perceiver=perceiver())
    assert model(CASES["gray"].images()).isfinite().all()


def test_a_perceiver_named_by_its_folder_comes_back(tmp_path: Path) -> None:
    perceiver().save_pretrained(tmp_path / "perceiver")
    model = wrapped("isotropic", perceiver=tmp_path / "perceiver")
    model.save_pretrained(tmp_path / "adapter")
    loaded = wrap(net(), tmp_path / "adapter")
    assert torch.equal(loaded(IMAGE), model(IMAGE))
    tensors = (tmp_path / "adapter" / TENSORS).read_bytes()
    assert b"towers" not in tensors


def test_a_perceiver_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    perceiver().save_pretrained(tmp_path / "perceiver")
    monkeypatch.chdir(tmp_path)
    model = wrapped("isotropic", perceiver="perceiver")
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(wrap(net(), tmp_path / "adapter")(IMAGE), model(IMAGE))
    shutil.move(tmp_path / "perceiver", tmp_path / "moved")
    perceiver(seed=1).save_pretrained(tmp_path / "perceiver")
    with pytest.raises(AdapterMismatchError, match="another one is there now"):
        wrap(net(), tmp_path / "adapter")
    shutil.rmtree(tmp_path / "perceiver")
    with pytest.raises(AdapterMismatchError, match=r"is not here; give that one as perceiver="):
        wrap(net(), tmp_path / "adapter")
    loaded = wrap(net(), tmp_path / "adapter", perceiver=tmp_path / "moved")
    assert torch.equal(loaded(IMAGE), model(IMAGE))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of weights of a small image model."""
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), file)
    return file


def test_a_semantic_model_is_the_one_of_the_training(weights: Path, tmp_path: Path) -> None:
    config = AdapterConfig(semantic="test_vit", semantic_weights=str(weights))
    model = wrapped("isotropic", config=config)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(wrap(net(), tmp_path / "adapter")(IMAGE), model(IMAGE))
    moved_to = tmp_path / "moved.safetensors"
    weights.rename(moved_to)
    with pytest.raises(CheckpointError, match=r"cannot be loaded .* as semantic_weights="):
        wrap(net(), tmp_path / "adapter")
    loaded = wrap(net(), tmp_path / "adapter", semantic_weights=moved_to)
    assert torch.equal(loaded(IMAGE), model(IMAGE))
    loaded.add_adapter("same", tmp_path / "adapter")
    loaded.set_adapter("same")
    loaded.hotswap_adapter(tmp_path / "adapter")
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(wrap(net(), tmp_path / "again")(IMAGE), model(IMAGE))
    backbone = net()
    torch.set_default_dtype(torch.float64)
    try:
        wrap(backbone, tmp_path / "again")
    finally:
        torch.set_default_dtype(torch.float32)
    save_file({k: v + 0.1 for k, v in load_file(moved_to).items()}, weights)
    for give in ({}, {"semantic_weights": weights}):
        with pytest.raises(AdapterMismatchError, match=r"fingerprint .*, and others are here"):
            wrap(net(), tmp_path / "adapter", **give)
    other = wrapped("isotropic", config=config)
    with pytest.raises(AdapterMismatchError, match="another semantic model"):
        other.add_adapter("same", tmp_path / "adapter")


def test_weights_of_no_semantic_model_are_refused(saved: Path, weights: Path) -> None:
    with pytest.raises(ConfigError, match="would steer nothing"):
        wrap(net(), saved, semantic_weights=weights)
    with pytest.raises(ConfigError, match=r"config=AdapterConfig\(semantic="):
        wrap(net(), semantic_weights=weights)


def test_a_perceiver_given_as_an_object_has_to_be_given_again(tmp_path: Path) -> None:
    model = wrapped("isotropic", perceiver=perceiver())
    model.save_pretrained(tmp_path)
    loaded = wrap(net(), tmp_path, perceiver=perceiver())
    assert torch.equal(loaded(IMAGE), model(IMAGE))
    for wrong in (None, False, perceiver(seed=1)):
        with pytest.raises(AdapterMismatchError, match="fingerprint"):
            wrap(net(), tmp_path, perceiver=wrong)
    untouched = net()
    with pytest.raises(PerceiveError):
        wrap(untouched, tmp_path)
    assert not any(module._forward_hooks for module in untouched.modules())


@pytest.mark.filterwarnings("error")
def test_an_untrained_perceiver_warns_and_works() -> None:
    untrained = QualityPerceiver.create(CLIP, pretrained=None, context_length=4)
    model = wrap(net(), perceiver=untrained)
    with pytest.warns(UntrainedPerceiverWarning):
        restored = model(IMAGE)
    assert relative(restored, net()(IMAGE)) == 0


# Backbones whose weights come later


def test_an_adapter_waits_for_the_weights_of_a_backbone_on_the_meta_device(tmp_path: Path) -> None:
    model, image = wrapped("u_shape"), CASES["u_shape"].images()
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = CASES["u_shape"].net()
    loaded = wrap(empty, tmp_path)
    assert all(p.is_meta for p in loaded.backbone.parameters())
    loaded.backbone.load_state_dict(CASES["u_shape"].net().state_dict(), assign=True)
    assert torch.equal(loaded(image), model(image))
    assert not any(p.requires_grad for p in loaded.parameters())
    model.unfreeze("ending.bias")
    model.save_pretrained(tmp_path / "more")
    with torch.device("meta"):
        empty = CASES["u_shape"].net()
    with pytest.raises(AdapterMismatchError, match="load them first"):
        wrap(empty, tmp_path / "more")


@pytest.mark.filterwarnings("ignore:.*with other weights")  # rounded ones
def test_a_perceiver_in_another_precision_is_the_same_one(tmp_path: Path) -> None:
    model = wrap(net())
    model.save_pretrained(tmp_path / "float32")
    model = wrap(model.unwrap(), tmp_path / "float32").to(torch.bfloat16)
    model.add_adapter("rain", tmp_path / "float32")
    model.hotswap_adapter(tmp_path / "float32")
    model.save_pretrained(tmp_path / "bfloat16")
    again = wrap(model.unwrap(), tmp_path / "bfloat16")
    assert again.perceiver_fingerprint == model.perceiver_fingerprint


class Recurrent(nn.Module):
    """Runs one layer under three names, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, step, self.last = (nn.Conv2d(c, d, 3, padding=1) for c, d in SHAPES)
        self.steps = nn.ModuleList([step, step, step])
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        x = self.first(image)
        for step in self.steps:
            x = step(x).relu()
        return self.last(x)


SHAPES = ((3, 8), (8, 8), (8, 3))


def test_layers_of_several_names_and_counters_do_not_warn(tmp_path: Path) -> None:
    original = Recurrent()
    model = wrap(copy.deepcopy(original), perceiver=False)
    model.unfreeze("**")
    moved(model.backbone)
    model(torch.rand(1, 3, 32, 32))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(original, tmp_path)
    with pytest.warns(UserWarning, match="other weights"):
        wrap(Recurrent(), tmp_path)
