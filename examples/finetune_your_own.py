"""Your own network and your own training loop: all that `wrap` adds is a few lines.

    python examples/finetune_your_own.py --out my-adapter

The network here removes noise, is trained for that first, and is then taught haze while it stays
frozen. The photographs are those that scikit-image carries.
"""

import argparse
from pathlib import Path

import skimage.data
import torch
from torch import Tensor, nn

from perceive_adapter import wrap
from perceive_adapter.data import degrade


class YourNetwork(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU()) for _ in range(4)
        )
        self.tail = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        features = self.head(image)
        for block in self.body:
            features = features + block(features)
        return image + self.tail(features)


def draw(photo: Tensor, task: str, step: int, side: int) -> tuple[Tensor, Tensor]:
    """Eight clean crops and the same ones degraded, (8, 3, side, side) in [0, 1]."""
    generator = torch.Generator().manual_seed(step)
    places = torch.randint(photo.shape[-1] - side, (8, 2), generator=generator).tolist()
    clean = torch.stack([photo[:, y : y + side, x : x + side] for y, x in places])
    severity = torch.rand(8, generator=generator)
    return clean, degrade(clean, task, severity, generator)


def train(network: nn.Module, photo: Tensor, task: str, steps: int, side: int) -> float:
    """Minimise L1 with Adam over what is trainable; return the last loss."""
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 2e-3)
    for step in range(steps):
        clean, degraded = draw(photo, task, step, side)
        loss = (network(degraded) - clean).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--side", type=int, default=96, help="pixels of a crop")
    arguments = parser.parse_args()

    photo = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1) / 255
    network = YourNetwork()
    print(f"noise: {train(network, photo, 'gaussian_noise', arguments.steps, arguments.side):.3f}")
    model = wrap(network)  # frozen from here on
    model.treat("haze")  # images without haze are restored as before
    print(f"haze: {train(model, photo, 'haze', arguments.steps, arguments.side):.3f}")
    model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
