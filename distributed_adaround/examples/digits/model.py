"""The network of this example, small on purpose: few weights per output channel leave little redundancy, so that the
choice between the two neighbours on a 3-bit grid shows in the accuracy.
"""

from torch import Tensor, nn


def build(width: int = 16) -> nn.Module:
    """The factory that the job file names. Takes images `(N, 1, 8, 8)` in 0..1, returns scores `(N, 10)`."""
    return DigitsNet(width)


class DigitsNet(nn.Module):
    """Seven convolutions (three depthwise, one of them strided, three pointwise) and a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(1, width, kernel_size=3),
            *_block(width, width, kernel_size=3, groups=width),
            *_block(width, 2 * width, kernel_size=1),
            *_block(2 * width, 2 * width, kernel_size=3, groups=2 * width, stride=2),
            *_block(2 * width, 2 * width, kernel_size=1),
            *_block(2 * width, 2 * width, kernel_size=3, groups=2 * width),
            *_block(2 * width, 2 * width, kernel_size=1),
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return scores


def _block(in_channels: int, out_channels: int, kernel_size: int, groups: int = 1, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]
