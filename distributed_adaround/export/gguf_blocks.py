"""Blocks of 32 weights as GGUF stores them: a scale, then the codes.

Q4_0    float16 d, 16 bytes of two codes, i in the low and i + 16 in the high half       w = d (q - 8)
Q5_0    float16 d, the fifth bits of 32 codes, 16 bytes as in Q4_0                       w = d (q - 16)
Q8_0    float16 d, 32 bytes                                                              w = d q
MXFP4   the scale's exponent + 127 in a byte, 16 bytes of e2m1 patterns as in Q4_0       w = 2^e value(q)

From ggml-common.h and ggml-quants.c of llama.cpp, MIT license; read again by the package gguf.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distributed_adaround.export.stored import QuantizedLayer
from distributed_adaround.solve.record import LayerRecord

BLOCK = 32
Bytes = npt.NDArray[np.uint8]
# By the range of codes that they hold, the smallest first.
_INTEGERS = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}


def block_type(layer: QuantizedLayer) -> str | None:
    """The smallest type that holds a layer's codes: symmetric integers, or mxfp4; None: none does."""
    if layer.number.name == "mxfp4":
        return "MXFP4"
    if layer.number.element is not None or not layer.symmetric:
        return None
    low, high = int(layer.format["quant_min"]), int(layer.format["quant_max"])
    zero_point = 0 if layer.number.signed else (low + high + 1) // 2
    fitting = (
        name for name, (least, most) in _INTEGERS.items() if least <= low - zero_point and high - zero_point <= most
    )
    return next(fitting, None)


def pack(record: LayerRecord, kind: str) -> Bytes:
    """uint8 `(O, bytes)` of a layer `(O, I)` with a scale for each 32 inputs. kind: as `block_type` says."""
    shape = (*record.scale.shape, BLOCK)
    codes = record.codes.reshape(shape)
    if kind == "MXFP4":
        # A power of two has its exponent, + 127, in the bits after the sign.
        exponents = (record.scale.float().view(torch.int32) >> 23).to(torch.uint8)
        parts = [exponents[..., None], _halves(codes)]
    else:
        levels = codes.short() - record.zero_point[..., None].short()
        scales = record.scale.to(torch.float16)[..., None].contiguous().view(torch.uint8)
        if kind == "Q8_0":
            parts = [scales, levels.to(torch.int8).view(torch.uint8)]
        elif kind == "Q5_0":
            shifted = levels + 16
            high = torch.from_numpy(np.packbits((shifted >> 4).to(torch.uint8).numpy(), axis=-1, bitorder="little"))
            parts = [scales, high, _halves(shifted & 15)]
        else:
            parts = [scales, _halves(levels + 8)]
    packed: Bytes = torch.cat(parts, dim=-1).reshape(shape[0], -1).numpy()
    return packed


def _halves(codes: Tensor) -> Tensor:
    """Codes of 4 bits `(.., 32)` as bytes `(.., 16)`."""
    codes = codes.to(torch.uint8)
    return codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
