"""Which degradations an adapter should treat, told by a real denoiser and the bundled perceiver."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from restoring import Net, data
from torch import nn

from perceive_adapter import PerceiveModel, UnseenTaskWarning, wrap
from perceive_adapter.training.treated import find_treated

DEMO = Path(__file__).parents[2] / "examples" / "demo"


@pytest.fixture(scope="module")
def denoiser() -> PerceiveModel:
    sys.path.insert(0, str(DEMO))
    try:
        from denoiser import load_denoiser
    finally:
        sys.path.remove(str(DEMO))
    return wrap(load_denoiser())


def treated(model: PerceiveModel, *tasks: str, **options: Any) -> set[str]:
    drawn = data(*tasks, **{"context": 128, "patch": 96, **options})
    return set(find_treated(model, drawn, each=8))


def test_what_the_backbone_undoes_by_itself_is_not_treated(denoiser: PerceiveModel) -> None:
    assert treated(denoiser, "gaussian_noise", "rain", "low_light") == {"rain", "low_light"}
    assert treated(denoiser, "gaussian_noise") == set()


def test_noise_is_treated_where_the_backbone_leaves_it() -> None:
    assert treated(wrap(Net()), "gaussian_noise", "rain") == {"noise", "rain"}


def test_of_a_mixture_with_the_backbone_s_own_task_the_rest_is_treated(
    denoiser: PerceiveModel,
) -> None:
    tasks = ("gaussian_noise", "gaussian_noise+rain")
    assert treated(denoiser, *tasks) == {"rain"}


def test_nothing_is_named_where_the_perceiver_does_not_see_what_is_wrong(
    denoiser: PerceiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert denoiser.perceiver is not None
    seen = denoiser.perceiver.forward

    def blind_to_rain(image: torch.Tensor) -> Any:
        perceived = seen(image)
        perceived.degradations[:, denoiser.perceiver.degradations.index("rain")] = 0.0
        return perceived

    monkeypatch.setattr(denoiser.perceiver, "forward", blind_to_rain)
    assert treated(denoiser, "low_light", "gaussian_noise") == {"low_light"}
    with pytest.warns(UnseenTaskWarning, match=r"the task 'rain', only \d+% is where"):
        assert treated(denoiser, "low_light", "rain", "gaussian_noise") == set()


def test_models_that_cannot_tell_are_not_limited() -> None:
    net: nn.Module = Net()
    assert treated(wrap(net, perceiver=False), "rain") == set()


def test_looking_changes_nothing(denoiser: PerceiveModel) -> None:
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    denoiser.backbone.train()
    modes = [part.training for part in denoiser.modules()]
    treated(denoiser, "rain")
    assert denoiser.injector.config.treats is None
    assert [part.training for part in denoiser.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())


@pytest.mark.parametrize("seed", range(4))
def test_the_draw_does_not_decide(denoiser: PerceiveModel, seed: int) -> None:
    tasks = ("gaussian_noise", "rain", "haze", "low_light")
    assert treated(denoiser, *tasks, seed=seed) == {"rain", "haze", "low_light"}
