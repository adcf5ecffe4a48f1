"""Trains, saves, pushes and reloads an adapter whose parameters FSDP2 shards; run by torchrun."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from restoring import data, model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from perceive_adapter import wrap
from perceive_adapter.losses.difficulty import psnr
from perceive_adapter.training.calling import restored_by


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    wrapped = model()
    for site in wrapped.injector.prompt_sites:
        fully_shard(site.prompt)
    fully_shard(wrapped)
    assert all(isinstance(p, DTensor) for p in wrapped.parameters())
    optimizer = torch.optim.AdamW(wrapped.trainable_parameters(), lr=1e-2)
    drawn = data("low_light")
    probe = data("low_light", seed=5).probe(8)
    for step in range(40):
        first = (2 * step + dist.get_rank()) * 2
        samples = [drawn[index] for index in (first, first + 1)]
        degraded = torch.stack([sample.degraded for sample in samples])
        target = torch.stack([sample.target for sample in samples])
        loss = (wrapped(degraded) - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        trained = wrapped(probe.degraded)
    wrapped.save_pretrained(out)
    pushed = wrapped.push_to_hub("user/sharded", token=True)
    assert (pushed is not None) == (dist.get_rank() == 0)
    dist.barrier()
    reloaded = wrap(model().unwrap(), out)
    with torch.no_grad():
        again = restored_by(reloaded, probe.degraded)
    torch.testing.assert_close(again, trained, rtol=1e-4, atol=1e-5)
    gain = psnr(again, probe.target).mean() - psnr(probe.degraded, probe.target).mean()
    assert gain > 1, gain
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
