"""The 1,797 images of this example, and how they are split.

`digits.npz` holds `images` `(1797, 8, 8)` uint8 in 0..16 and `labels` `(1797,)` uint8, in the order of
`sklearn.datasets.load_digits`. It was made by `python -m distributed_adaround.examples.digits.data`.

Source: the test set of "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, 1998, UCI Machine
Learning Repository, https://doi.org/10.24432/C50P49, licence CC BY 4.0; from scikit-learn (BSD-3-Clause), as uint8.

The first 1,257 images (70 %) are for training, the first 512 of these for calibration. The other 540 are held out.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent
IMAGES = FOLDER / "digits.npz"

NUM_TRAINING = 1257
NUM_CALIBRATION = 512


def load() -> tuple[Tensor, Tensor]:
    """All images `(1797, 1, 8, 8)` float32 in 0..1, and their labels `(1797,)` int64."""
    with np.load(IMAGES, allow_pickle=False) as archive:
        images = torch.from_numpy(archive["images"]).to(torch.float32) / 16
        return images.unsqueeze(1), torch.from_numpy(archive["labels"]).to(torch.int64)


def training() -> tuple[Tensor, Tensor]:
    images, labels = load()
    return images[:NUM_TRAINING], labels[:NUM_TRAINING]


def held_out() -> tuple[Tensor, Tensor]:
    images, labels = load()
    return images[NUM_TRAINING:], labels[NUM_TRAINING:]


def write_calibration(path: Path) -> None:
    """The field has the name of the model's input."""
    np.savez(path, images=training()[0][:NUM_CALIBRATION].numpy())


if __name__ == "__main__":
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit("scikit-learn is missing; run: pip install scikit-learn") from error
    digits = load_digits()
    np.savez_compressed(IMAGES, images=digits.images.astype(np.uint8), labels=digits.target.astype(np.uint8))
