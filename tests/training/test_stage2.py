"""Stage 2: it restores better, leaves what is frozen, and goes on after a kill to the last bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from restoring import FULL, L1, Net, Recording, Stopped, data, model, recipe
from small import photos
from torch import Tensor, nn

from perceive_adapter import AdapterConfig, Perception, wrap
from perceive_adapter.data import FAMILIES
from perceive_adapter.data.restoration import CleanPhotos, RestorationData
from perceive_adapter.data.samples import CropSampler
from perceive_adapter.errors import BackboneError, CheckpointError, ConfigError, TrainingError
from perceive_adapter.losses import DifficultyAdaptiveLoss, FilterPyramid, RestorationObjective
from perceive_adapter.losses.difficulty import psnr
from perceive_adapter.training.calling import restored_by
from perceive_adapter.training.loop import Schedule
from perceive_adapter.training.restoration import RestorationStep
from perceive_adapter.training.stage2 import Stage2, objective_for, train_restoration


def train(trained: nn.Module, **options: Any) -> nn.Module:
    steps = options.pop("steps", 12)
    settings = {"recipe": recipe(steps), **options}
    train_restoration(trained, settings.pop("data", data()), **settings)
    return trained


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


def quality(trained: nn.Module) -> float:
    with torch.no_grad():
        probe = data("low_light", seed=5).probe(8)
        return psnr(restored_by(trained, probe.degraded), probe.target).mean().item()


# Training


@pytest.mark.parametrize("mode", [True, False])
def test_a_wrapped_network_learns_and_its_backbone_stays(mode: bool) -> None:
    trained = model().train(mode)
    before, untrained = bits(trained.backbone), quality(trained)
    train(trained, steps=60, data=data("low_light"))
    assert quality(trained) > untrained + 1
    assert all(torch.equal(value, before[name]) for name, value in bits(trained.backbone).items())
    assert trained.training == mode


def test_a_plain_network_learns_too() -> None:
    torch.manual_seed(0)
    trained = Net()
    untrained = quality(trained)
    train(trained, recipe=Stage2(Schedule(60, 3e-3), batch=4, weights=L1), data=data("low_light"))
    assert quality(trained) > untrained + 1


def test_accumulated_passes_make_one_step() -> None:
    whole = train(model(), recipe=recipe(6))
    halves = train(model(), recipe=recipe(6, accumulate=2))
    for name, value in whole.injector.state_dict().items():
        torch.testing.assert_close(halves.injector.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    assert not same(train(model(), recipe=recipe(6, batch=2)), whole)


def test_a_contrastive_loss_is_told_of_fewer_negatives() -> None:
    contrastive = replace(recipe(2, accumulate=2), weights=replace(L1, contrastive=0.1))
    with pytest.warns(UserWarning, match=r"compares the 2 images of a pass, and not the 4"):
        train(model(), recipe=contrastive)
    with pytest.raises(ConfigError, match=r"4 accumulated passes for a batch of 4.*here there is"):
        train(model(), recipe=replace(contrastive, accumulate=4))


def test_an_average_of_the_weights_is_what_remains() -> None:
    raw, mean = train(model(), steps=2), train(model(), recipe=recipe(2, ema=0.5))
    first = train(model(), recipe=replace(recipe(2), schedule=replace(recipe(2).schedule)))
    assert same(raw, first)
    start, half = model().injector.state_dict(), train_to(1).injector.state_dict()
    for name, value in raw.injector.state_dict().items():
        first_mean = torch.lerp(half[name], start[name], 1 / 10)
        expected = torch.lerp(value, first_mean, 2 / 11)
        torch.testing.assert_close(mean.injector.state_dict()[name], expected)


def test_an_average_keeps_no_graph(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    train(model(), recipe=recipe(2, ema=0.5), checkpoint=file)
    assert not any(mean.requires_grad for mean in torch.load(file, weights_only=True)["ema"])


def test_gradients_of_before_do_not_count(tmp_path: Path) -> None:
    def left_over() -> Any:
        trained = model()
        sum(p.square().sum() for p in trained.trainable_parameters()).backward()
        return trained

    whole = train(model(), steps=4)
    assert same(train(left_over(), steps=4), whole)
    settings: dict[str, Any] = {"recipe": recipe(4), "checkpoint": tmp_path / "s.pt", "every": 2}
    train_to(3, **settings)
    assert same(train(left_over(), **settings), whole)


def test_a_loop_that_stopped_while_it_accumulated_is_forgotten() -> None:
    whole = train(model(), recipe=recipe(4, accumulate=2))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    prepared = accelerator.prepare(nn.Linear(2, 2))
    with accelerator.accumulate(prepared):
        accelerator.backward(prepared(torch.ones(1, 2)).sum())
    assert not accelerator.sync_gradients
    assert same(train(model(), recipe=recipe(4, accumulate=2)), whole)


class InPlace(nn.Module):
    """Writes into the image that it is given, or does the same beside it."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes, self.shift = writes, nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return (image.mul_(0.9) if self.writes else image * 0.9) + self.shift


def test_networks_that_write_into_their_input_spoil_nothing() -> None:
    objectives = [Seeing(FULL), Seeing(FULL)]
    first, second = (
        train(InPlace(writes), objective=objective, recipe=recipe(4, weights=FULL, probe_every=1))
        for writes, objective in zip((True, False), objectives, strict=True)
    )
    assert same(first, second)
    assert objectives[0].losses == objectives[1].losses


def test_a_run_that_diverges_says_so_whatever_its_objective() -> None:
    trained = model(perceiver="perceive-tiny")
    with pytest.raises(TrainingError, match=r"at a learning rate .* [Ll]ower the learning rate"):
        train(trained, recipe=Stage2(Schedule(12, 1e30), batch=2, probe=1, probe_every=3))


def train_to(step: int, trained: Any = None, **options: Any) -> Any:
    """Train until a step of the usual run, and no further."""
    trained = trained or model()
    settings = {"recipe": recipe(2), **options}
    with pytest.raises(Stopped):
        train_restoration(
            trained, data(), objective=Recording(settings["recipe"].weights, step), **settings
        )
    return trained


@pytest.mark.parametrize("dies_at", [0, 4, 6, 11])
def test_goes_on_bit_for_bit_after_a_kill(tmp_path: Path, dies_at: int) -> None:
    settings: dict[str, Any] = {
        "recipe": recipe(12, weights=FULL, ema=0.9),
        "checkpoint": tmp_path / "run" / "state.pt",
        "every": 3,
    }
    train_to(dies_at, **settings)
    objective = Recording(FULL)
    resumed = train(model(), objective=objective, **settings)
    assert len(objective.losses) == 12 - dies_at // 3 * 3
    whole = train(model(), objective=Recording(FULL), recipe=settings["recipe"])
    assert same(resumed, whole)
    assert not same(resumed, model())
    again = train(model(), objective=Recording(FULL), **settings)  # finished: nothing left to do
    assert same(again, whole)


def test_batch_statistics_are_kept_with_a_plain_network(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1))

    settings: dict[str, Any] = {"recipe": recipe(8), "checkpoint": tmp_path / "s.pt", "every": 3}
    train_to(5, net(), **settings)
    assert same(train(net(), **settings), train(net(), recipe=recipe(8)))


def test_the_difficulty_is_that_of_the_probe() -> None:
    objective = Recording(FULL)
    trained = model()
    expected = RestorationStep(trained, objective)(data().probe(2), measure=True)["psnr"].mean()
    train(trained, recipe=recipe(1, weights=FULL), objective=objective)
    torch.testing.assert_close(objective.difficulty_adaptive.reference_psnr, expected)


# What the model is told and given


def test_an_oracle_may_stand_in_for_perception() -> None:
    config = AdapterConfig(sources={"severity": len(FAMILIES)})
    steered = model(config=config)
    told: list[Tensor] = []

    def truth(wrapped: Any, samples: Any) -> Perception:
        assert wrapped is steered
        told.append(samples.severity)
        return Perception(severity=samples.severity)

    train(steered, steps=3, perceive=truth)
    assert len(told) == 5  # three steps, and a look at the probe in the first and in the last
    assert (told[1] > 0).sum(dim=1).eq(1).all()


class Named(Net):
    """Takes its image by name, in [-1, 1], after another argument."""

    def forward(self, sigma: float = 0.0, *, lq: Tensor) -> tuple[Tensor, float]:  # type: ignore[override]
        return super().forward(lq), sigma


def test_images_go_where_the_backbone_takes_them() -> None:
    trained = wrap(
        Named(),
        perceiver=False,
        image_arg="lq",
        value_range=(-1, 1),
        example={"lq": torch.rand(1, 3, 32, 32)},
    )
    image = torch.rand(2, 3, 24, 24)
    seen = restored_by(trained, image)
    torch.testing.assert_close(seen, (trained(lq=2 * image - 1)[0] + 1) / 2)
    before = bits(trained.injector)
    train(trained, steps=2)
    assert any(
        not torch.equal(value, before[name]) for name, value in bits(trained.injector).items()
    )


# What cannot be


def test_recipes_that_cannot_work() -> None:
    for name in ("batch", "accumulate", "probe", "probe_every"):
        with pytest.raises(ConfigError, match=f"{name}=0"):
            Stage2(**{name: 0})
    for decay in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="ema="):
            Stage2(ema=decay)
    with pytest.raises(ConfigError, match=r"batch of 4 .* 1 processes and 3 .*multiple of 3"):
        train(model(), recipe=recipe(accumulate=3))
    with pytest.raises(ConfigError, match="nothing in the model is trainable"):
        train(model(is_trainable=False))


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    train(model(), checkpoint=file, recipe=recipe(2))
    tasks = ("rain", "low_light")
    severe, others = (
        RestorationData([source], context=32, patch=24)
        for source in (
            CleanPhotos(CropSampler(photos()), tasks, (0.5, 1.0)),
            CleanPhotos(CropSampler(photos()[:3]), tasks),
        )
    )
    cases: list[tuple[dict[str, Any], str]] = [
        ({"recipe": recipe(3)}, r"recipe\.schedule\.steps=2: expected .*steps=3"),
        ({"recipe": recipe(2), "data": data(seed=1)}, r"data\.seed=0: expected data\.seed=1"),
        ({"recipe": recipe(2), "data": data("haze")}, r"data\.tasks=.*rain.*: expected .*haze"),
        (
            {"recipe": recipe(2), "data": severe},
            r"severity=\[0\.0, 1\.0\]: expected .*severity=\[0\.5, 1\.0\]",
        ),
        ({"recipe": recipe(2), "data": others}, r"sources\.0\.photographs='\w+': expected"),
    ]
    for options, message in cases:
        with pytest.raises(CheckpointError, match=message):
            train(model(), checkpoint=file, **options)
    for other in (model(config=AdapterConfig(rank=2)), model(config=AdapterConfig(level=None))):
        untouched = copy.deepcopy(other)
        with pytest.raises(CheckpointError, match="is of another model"):
            train(other, checkpoint=file, recipe=recipe(2))
        assert same(other, untouched)
    other = model()
    with torch.no_grad():
        other.backbone.tail.weight.add_(0.1)
    with pytest.raises(CheckpointError, match=r"frozen='\w+': expected frozen="):
        train(other, checkpoint=file, recipe=recipe(2))
    file.write_bytes(file.read_bytes()[:999])
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        train(model(), checkpoint=file, recipe=recipe(2))


def test_a_run_keeps_the_precision_that_accelerate_chose(
    no_accelerator_yet: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "state.pt"
    train(model(), checkpoint=file, recipe=recipe(2))
    no_accelerator_yet()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(CheckpointError, match=r"precision='no': expected precision='bf16'"):
        train(model(), checkpoint=file, recipe=recipe(2), accelerator=Accelerator(cpu=True))


def test_a_run_keeps_its_objective(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"

    def objective(eps: float = 0.5, scales: int = 1) -> RestorationObjective:
        loss = DifficultyAdaptiveLoss(FilterPyramid(scales), eps=eps)
        return RestorationObjective(FULL, difficulty_adaptive=loss)

    train(model(), objective=objective(), checkpoint=file, steps=2)
    train(model(), objective=objective(), checkpoint=file, steps=2)  # the same one goes on
    with pytest.raises(CheckpointError, match=r"eps=0\.5.*: expected .*eps=0\.25"):
        train(model(), objective=objective(eps=0.25), checkpoint=file, steps=2)
    with pytest.raises(CheckpointError, match=r"scales=1.*: expected .*scales=2"):
        train(model(), objective=objective(scales=2), checkpoint=file, steps=2)
    with pytest.raises(CheckpointError, match=r"objective\.weights\.contrastive=0\.1"):
        train(model(), objective=RestorationObjective(L1), checkpoint=file, steps=2)


class Poisoned(Recording):
    """Its third loss is finite, and its gradient is not."""

    def forward(self, *images: Tensor, **options: Any) -> Any:
        terms = super().forward(*images, **options)
        if len(self.losses) == 3:
            spoilt = (images[0] - images[0].detach()).abs().sum().sqrt()  # 0, its slope infinite
            terms = replace(terms, total=terms.total + spoilt)
        return terms


def test_a_gradient_that_is_not_finite_stops_before_its_weights_are_saved(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    with pytest.raises(TrainingError, match=r"norm of the gradient of step 2 is nan"):
        train(model(), objective=Poisoned(L1), checkpoint=file, every=1)
    assert torch.load(file, weights_only=True)["step"] == 2
    with pytest.raises(TrainingError, match="norm of the gradient"):  # without a checkpoint too
        train(model(), objective=Poisoned(L1), steps=3)


class Dropping(Net):
    """Drops features while it trains, in a module and in a function."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout2d(0.5)

    def forward(self, image: Tensor) -> Tensor:
        image = super().forward(self.drop(image) * 0.5 + 0.5 * image)
        return image + 0.1 * nn.functional.dropout(image, 0.5, self.training)


def test_randomness_in_the_network_is_repeated_after_a_kill(tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return Dropping()

    settings: dict[str, Any] = {"recipe": recipe(8), "checkpoint": tmp_path / "s.pt", "every": 3}
    train_to(5, fresh(), **settings)
    torch.manual_seed(99)
    resumed = train(fresh(), **settings)
    assert same(resumed, train(fresh(), recipe=recipe(8)))


def test_images_and_weights_may_be_channels_last() -> None:
    plain, other = train(model(), steps=4), train(model(), steps=4, channels_last=True)
    weight = other.backbone.head.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    for name, value in plain.injector.state_dict().items():
        torch.testing.assert_close(other.injector.state_dict()[name], value, rtol=1e-2, atol=1e-4)


class Gray(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.body(image)


class Upscaler(Net):
    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.interpolate(super().forward(image), scale_factor=2)


class Multiple(Net):
    def forward(self, image: Tensor) -> Tensor:
        assert image.shape[-1] % 16 == 0
        return super().forward(image)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Gray, r"images of 1 channels.*trains restoration of RGB images"),
        (Upscaler, r"scales them by 2"),
        (Multiple, r"multiples of 16, and the patches have 24"),
    ],
)
def test_networks_that_cannot_be_trained_like_this_are_told_before(
    net: type[nn.Module], message: str
) -> None:
    wrapped = wrap(net(), perceiver=False)
    with pytest.raises(BackboneError, match=message):
        train(wrapped)


def test_a_plain_network_that_gives_another_size_is_told() -> None:
    with pytest.raises(BackboneError, match=r"restores \(4, 3, 24, 24\) to \(4, 3, 48, 48\)"):
        train(Upscaler())


def test_a_loss_that_is_not_finite_stops_and_writes_nothing(tmp_path: Path) -> None:
    trained = model()
    with torch.no_grad():
        next(trained.trainable_parameters()).fill_(math.nan)
    with pytest.raises(TrainingError, match=r"loss of step 0 is nan.*Lower the learning rate"):
        train(trained, checkpoint=tmp_path / "state.pt")
    assert not list(tmp_path.iterdir())


def test_schedules_reach_the_optimizer() -> None:
    still = Schedule(3, 1e-30, 0.0)
    trained = model()
    before = bits(trained.injector)
    train(trained, recipe=Stage2(still, batch=2, weights=L1))
    for name, value in bits(trained.injector).items():
        torch.testing.assert_close(value, before[name])


# Medium images


class Half(nn.Module):
    """A restorer that goes half of the way to white."""

    def forward(self, image: Tensor) -> Tensor:
        return (image + 1) / 2


class Seeing(Recording):
    """Remembers the medium images."""

    def forward(self, *images: Tensor, **options: Any) -> Any:
        self.mediums = [medium.clone() for medium in options["medium"]]
        self.valid = options["valid"]
        return super().forward(*images, **options)


@pytest.mark.parametrize("mediums", ["earlier", ["latest"], [lambda image: image]])
def test_mediums_that_nothing_makes(mediums: Any) -> None:
    with pytest.raises(ConfigError, match=r"makes no medium images|expected several sources"):
        train(model(), recipe=recipe(2, weights=FULL), mediums=mediums)


def test_mediums_come_from_proxies_and_from_the_model_s_earlier_state() -> None:
    objective, proxy = Seeing(FULL), Half()
    trained = model().train()
    with torch.no_grad():
        next(trained.injector.prompt_sites[0].prompt.parameters()).add_(0.1)
    step = RestorationStep(trained, objective, None, [proxy, "earlier"])
    samples = data().probe(2)
    step(samples)
    before = restored_by(trained, samples.degraded, trained.perceive(samples.context)).detach()
    torch.testing.assert_close(objective.mediums[0], (samples.degraded + 1) / 2)
    torch.testing.assert_close(objective.mediums[1], before.clamp(0, 1))
    with torch.no_grad():
        for parameter in trained.injector.prompt_sites[0].parameters():
            parameter.add_(0.1)
    step(samples)  # the earlier state stays as it was until it is refreshed
    perception = trained.perceive(samples.context).detach()
    now = restored_by(trained, samples.degraded, perception).detach().clamp(0, 1)
    assert not torch.allclose(objective.mediums[1], now, atol=1e-4)
    torch.testing.assert_close(objective.mediums[1], before.clamp(0, 1), atol=1e-5, rtol=1e-4)
    step.mediums.refresh(trained)
    step(samples)
    torch.testing.assert_close(objective.mediums[1], now)


def normalised() -> nn.Sequential:
    """A plain network with batch statistics, one of them frozen by its user."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)]
    return nn.Sequential(*layers, nn.Conv2d(8, 3, 1))


def test_the_earlier_state_has_its_own_batch_statistics_and_leaves_the_model_s() -> None:
    trained, alone, samples = normalised(), normalised(), data().probe(2)
    for net in (trained, alone):
        net.train()[2].eval()
    earlier = copy.deepcopy(trained).eval()
    objective = Seeing(FULL)
    step = RestorationStep(trained, objective, None, ["earlier"])
    for _ in range(2):
        step(samples)
        alone(samples.degraded)
        expected = earlier(samples.degraded).clamp(0, 1)
        torch.testing.assert_close(objective.mediums[0], expected)
    assert same(trained, alone)
    assert trained.training
    assert not trained[2].training
    step.mediums.refresh(trained)
    expected = copy.deepcopy(trained).eval()(samples.degraded).clamp(0, 1)
    step(samples)
    torch.testing.assert_close(objective.mediums[0], expected)


def test_mediums_that_come_with_the_samples() -> None:
    objective, samples = Seeing(FULL), data().probe(2)
    read = torch.full((len(samples.task), 1, 3, 24, 24), 0.4)
    read[1] = torch.nan
    step = RestorationStep(model().train(), objective, None, [Half()])
    total = step(samples._replace(mediums=read))["total"]
    assert total.isfinite()
    torch.testing.assert_close(objective.mediums[1][0], read[0, 0])
    assert objective.valid.tolist() == [[True, index != 1] for index in range(len(read))]
    other = step(samples._replace(mediums=read + 0.2))["total"]
    assert not torch.equal(total, other)
    plain = RestorationStep(model().train(), Recording(L1), None)
    assert plain(samples._replace(mediums=read))["total"].isfinite()


def test_goes_on_with_the_same_earlier_state(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "recipe": recipe(12, weights=FULL),
        "mediums": ["earlier"],
        "checkpoint": tmp_path / "state.pt",
        "every": 4,
    }
    train_to(9, **settings)
    resumed = train(model(), objective=Recording(FULL), **settings)
    del settings["checkpoint"]
    assert same(resumed, train(model(), objective=Recording(FULL), **settings))
    settings["mediums"] = []
    assert not same(resumed, train(model(), objective=Recording(FULL), **settings))
    with pytest.raises(ConfigError, match="mediums are for the difficulty-adaptive loss"):
        train(model(), mediums=["earlier"])


@pytest.mark.parametrize("compile", [False, True])
def test_a_refused_checkpoint_leaves_the_model_as_it_was(tmp_path: Path, compile: bool) -> None:
    file = tmp_path / "state.pt"
    train(model(), checkpoint=file, recipe=recipe(1))
    trained = model().train()
    trained.injector.eval()
    modes = [module.training for module in trained.modules()]
    with pytest.raises(CheckpointError, match="steps"):
        train(trained, checkpoint=file, recipe=recipe(2), compile=compile)
    assert trained._compiled_call_impl is None
    assert [module.training for module in trained.modules()] == modes


@pytest.mark.slow
def test_a_compiled_step_trains_as_well() -> None:
    plain, compiled = train(model(), steps=4), train(model(), steps=4, compile=True)
    for name, value in plain.injector.state_dict().items():
        torch.testing.assert_close(
            compiled.injector.state_dict()[name], value, rtol=1e-2, atol=1e-4
        )
    compiled.add_adapter("another")  # which a compiled model refuses


class Comparing(Recording):
    """Remembers whether each medium image is what the bare backbone gives."""

    def forward(self, *images: Tensor, **options: Any) -> Any:
        bare = Net.forward(self.backbone, options["degraded"]).detach().clamp(0, 1)
        self.bare = [*getattr(self, "bare", []), torch.allclose(options["medium"][0], bare)]
        return super().forward(*images, **options)


def test_the_earlier_state_is_that_of_the_last_look_at_the_probe() -> None:
    objective = Comparing(FULL)
    objective.backbone = model().unwrap()
    train(
        model(),
        recipe=recipe(5, weights=FULL, probe_every=3),
        objective=objective,
        mediums=["earlier"],
    )
    assert objective.bare == [True, True, True, False, False]


def test_the_paper_s_recipe_has_the_clip_aware_loss() -> None:
    aware = replace(L1, clip_aware=0.05)
    perceiving = wrap(Net())
    assert objective_for(perceiving, aware).clip_aware is not None
    assert objective_for(perceiving, L1).clip_aware is None
    for blind in (wrap(Net(), perceiver=False), Net()):
        with pytest.raises(ConfigError, match=r"CLIP-aware loss, whose weight is 0\.05"):
            train(blind, recipe=recipe(1, weights=aware))


def test_a_checkpoint_is_named_by_a_string_too(tmp_path: Path) -> None:
    train(model(), recipe=recipe(2), checkpoint=str(tmp_path / "state.pt"))
    assert (tmp_path / "state.pt").exists()
    with pytest.raises(ConfigError, match="every=0"):
        train(model(), recipe=recipe(2), checkpoint=tmp_path / "other.pt", every=0)
