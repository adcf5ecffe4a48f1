"""The published Restormer, 26.1 M parameters: the budgets of an adapter."""

from pathlib import Path

import pytest
import torch
from spandrel.architectures.NAFNet import NAFNet
from spandrel_extra_arches.architectures.Restormer import Restormer

from perceive_adapter import AdapterMismatchError, wrap

MAX_SHARE = 0.03
MAX_BYTES = 5e6


def test_an_adapter_of_the_full_restormer_is_small_exact_and_refused_by_others(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    backbone = Restormer()
    image = torch.rand(1, 3, 64, 64)
    bare = backbone(image).detach()
    model = wrap(backbone)
    assert torch.equal(model(image), bare)
    with torch.no_grad():
        assert torch.equal(model(image), bare)
    status = model.status()
    assert status.trainable <= MAX_SHARE * sum(p.numel() for p in backbone.parameters())

    for parameter in model.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    trained = model(image)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= MAX_BYTES

    reloaded = wrap(model.unwrap(), tmp_path)
    assert torch.equal(reloaded(image), trained)
    assert torch.equal(reloaded.unwrap()(image), bare)
    with pytest.raises(AdapterMismatchError, match="made for a Restormer"):
        wrap(NAFNet(width=16, enc_blk_nums=[1], middle_blk_num=1, dec_blk_nums=[1]), tmp_path)
