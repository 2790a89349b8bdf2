"""`python -m distributed_adaround.examples.digits.train` trains the network and writes `digits.safetensors`.

On a CPU, in less than a minute, with a fixed seed and one thread. The held-out images are not read here.
"""

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from distributed_adaround.examples.digits import data
from distributed_adaround.examples.digits.model import build

WEIGHTS = data.FOLDER / "digits.safetensors"

SEED = 0
NUM_EPOCHS = 60
BATCH_SIZE = 64
LR = 3e-3


def train() -> nn.Module:
    """A trained network in eval mode; the same weights on every run on one machine."""
    torch.manual_seed(SEED)
    images, labels = data.training()
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=1e-4)
    num_steps = NUM_EPOCHS * -(-len(images) // BATCH_SIZE)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, num_steps)
    for _ in range(NUM_EPOCHS):
        for batch in torch.split(torch.randperm(len(images)), BATCH_SIZE):
            loss = F.cross_entropy(model(_distorted(images[batch])), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            scheduler.step()
    return model.eval()


def _distorted(images: Tensor) -> Tensor:
    """Images `(N, 1, 8, 8)`, each a little moved, scaled, rotated and sheared."""
    identity = torch.eye(2, 3)
    spread = torch.tensor([0.08, 0.08, 0.06])
    grid = F.affine_grid(identity + spread * torch.randn(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    save_file(train().state_dict(), WEIGHTS)
