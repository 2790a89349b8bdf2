"""Settings of other programs and papers, for fields that a job does not give."""

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "pytorch": {
        "quantize": {
            "dtype": "qint8",
            "qscheme": "per_tensor_symmetric",
            "quant_min": -128,
            "quant_max": 127,
            "observer": "minmax",
        },
        "rounding": {
            "solver": "minibatch",
            "max_iter": 10000,
            "batch_size": 256,
            "batch_unit": "samples",
            "lr": 1e-3,
            "warm_start": 0.2,
            "beta": (20.0, 2.0),
            "reg_param": 0.001,
            "normalization": "mean",
            "asymmetry": 1.0,
            "activation_in_loss": False,
        },
    },
    "paper": {
        "quantize": {"observer": "mse"},
        "rounding": {
            "solver": "minibatch",
            "max_iter": 10000,
            "batch_size": 32,
            "batch_unit": "samples",
            "lr": 1e-3,
            "warm_start": 0.2,
            "beta": (20.0, 2.0),
            "reg_param": 0.01,
            "normalization": "sum",
            "asymmetry": 1.0,
        },
    },
}
