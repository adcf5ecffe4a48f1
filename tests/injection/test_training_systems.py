"""Wrapped models in what others train with: Lightning, averaging, peft, Accelerate."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning
import peft
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from wrapping import relative, wrapped
from zoo import CASES

from perceive_adapter import PerceiveModel, wrap

IMAGES = CASES["u_shape"].images(8)
DARK = IMAGES * 0.3


def loader(batch: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(DARK, IMAGES), batch_size=batch)


def error(model: nn.Module) -> float:
    with torch.no_grad():
        return float(F.l1_loss(model(DARK), IMAGES))


def of_the_backbone(model: PerceiveModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.backbone.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


class Restoring(lightning.LightningModule):
    def __init__(self, model: PerceiveModel) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        degraded, target = batch
        return F.l1_loss(self.model(degraded), target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.trainable_parameters(), 1e-2)


def test_a_lightning_module_trains_and_comes_back(tmp_path: Path) -> None:
    model = wrapped("u_shape", trained=False)
    before, backbone = error(model), of_the_backbone(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning, about workers and loggers
        trainer = lightning.Trainer(
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
        )
        trainer.fit(Restoring(model), loader(2))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert error(model) < 0.9 * before
    assert same(of_the_backbone(model), backbone)
    other = Restoring(wrapped("u_shape", trained=False))
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)
    other.load_state_dict(state["state_dict"])
    assert torch.equal(other.model(DARK), model(DARK))


def test_an_average_of_the_weights_runs_by_itself() -> None:
    model = wrapped("u_shape", trained=False)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.AdamW(model.trainable_parameters(), 1e-2)
    states = []
    for _ in range(3):
        F.l1_loss(model(DARK), IMAGES).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        states.append({n: p.detach().clone() for n, p in model.named_parameters()})
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in expected.named_parameters():
            value.copy_(0.5 * (0.5 * (states[0][name] + states[1][name]) + states[2][name]))
    torch.testing.assert_close(average(DARK), expected(DARK), rtol=1e-4, atol=1e-5)
    assert relative(average(DARK), model(DARK)) > 1e-4


def test_passes_that_add_up_are_one_step_of_the_whole_batch() -> None:
    whole, parts = wrapped("u_shape", trained=False), wrapped("u_shape", trained=False)
    for model, size in ((whole, 8), (parts, 2)):
        optimizer = torch.optim.SGD(model.trainable_parameters(), 0.1)
        for _ in range(2):
            for degraded, target in loader(size):
                (F.l1_loss(model(degraded), target) * size / 8).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(whole(DARK), parts(DARK), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("no_accelerator_yet")
def test_accelerate_prepares_it_as_any_module() -> None:
    model = wrapped("u_shape", trained=False)
    before, backbone = error(model), of_the_backbone(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
    optimizer = torch.optim.AdamW(model.trainable_parameters(), 1e-2)
    prepared, optimizer, batches = accelerator.prepare(model, optimizer, loader(2))
    for degraded, target in [batch for _ in range(3) for batch in batches]:
        with accelerator.accumulate(prepared):
            accelerator.backward(F.l1_loss(prepared(degraded), target))
            optimizer.step()
            optimizer.zero_grad()
    model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert error(model) < 0.9 * before
    assert same(of_the_backbone(model), backbone)


@pytest.mark.parametrize("lora_first", [True, False])
def test_lora_of_peft_trains_on_the_same_backbone(lora_first: bool) -> None:
    net = CASES["u_shape"].net()
    config = peft.LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights="gaussian")
    if lora_first:
        model = wrap(peft.inject_adapter_in_model(config, net), perceiver=False)
        model.unfreeze("**.lora_*.**")
    else:
        model = wrap(net, perceiver=False)
        peft.inject_adapter_in_model(config, model.backbone)
    before = error(model)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), 1e-2)
    for _ in range(5):
        F.l1_loss(model(DARK), IMAGES).backward()
        optimizer.step()
        reached = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
        optimizer.zero_grad()
    assert reached == {"adapters", "backbone"}
    assert error(model) < 0.9 * before
