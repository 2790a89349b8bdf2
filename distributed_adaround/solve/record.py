"""The result of one layer as it is committed, exported and shown."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from distributed_adaround.errors import AdaRoundError, InputError
from distributed_adaround.files import jsontext
from distributed_adaround.formats import SCALE_FORMATS, FloatFormat, LayerFormat, ScaleFormat, small_float
from distributed_adaround.numerics.grid import Grid, decode, encode, round_scale
from distributed_adaround.numerics.layers import LayerGeometry

_CODE_KEYS = frozenset({"dtype", "qscheme", "group_size", "quant_min", "quant_max", "element_format"})
FORMAT_KEYS = _CODE_KEYS | {"scale_format", "tensor_scale", "groups", "transposed"}


@dataclass(frozen=True)
class LayerFigures:
    """What became of one layer, for people.

    kind: class of the module ("Conv2d"). shape: of the weight in torch. format: as in "int4 per_channel_symmetric".
    solver: the one that rounded it. nearest_error, soft_error, hard_error: sum of squared output errors over sum of
    squared outputs on the calibration data; NaN where there is none. flipped, unsettled: shares from 0 to 1.
    kept_nearest: learning did not beat nearest rounding, so that is the result. seconds: wall time. resumed: from an
    earlier run. note: more to say. held_out_error: hard_error on data that the solver did not see, NaN where there are
    none. rows: of calibration data, over all ranks; 0 where unknown. warning: what a user should look at.
    effective_rows: how many independent rows they are worth; NaN where that is not known.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    format: str
    solver: str
    nearest_error: float
    soft_error: float
    hard_error: float
    flipped: float
    unsettled: float
    kept_nearest: bool
    seconds: float
    resumed: bool = False
    note: str = ""
    held_out_error: float = math.nan
    rows: int = 0
    warning: str = ""
    effective_rows: float = math.nan

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise of the layer's output in dB; inf without error, NaN where that is unknown."""
        if self.hard_error == 0:
            return math.inf
        return -10 * math.log10(self.hard_error) if self.hard_error > 0 else math.nan

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)

    def to_dict(self) -> dict[str, object]:
        """JSON values with `sqnr_db`; a figure that is not finite becomes None."""
        return {key: jsontext.json_safe(value) for key, value in {**asdict(self), "sqnr_db": self.sqnr_db}.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "LayerFigures":
        """Inverse of `to_dict`; None becomes NaN. Raises InputError when fields are missing or unknown."""
        names = {field.name for field in fields(cls)}
        given = {key: value for key, value in values.items() if key != "sqnr_db"}
        if given.keys() != names:
            wrong = ", ".join(sorted(given.keys() ^ names))
            raise InputError(f"the report of layer {values.get('name')} lacks or has unknown fields: {wrong}; redo it")
        floats = {field.name for field in fields(cls) if field.type is float}
        given |= {key: math.nan for key in floats if given[key] is None}
        given["shape"] = tuple(given["shape"])  # type: ignore[arg-type]
        return cls(**given)  # type: ignore[arg-type]


def format_entries(layer_format: LayerFormat, geometry: LayerGeometry) -> dict[str, Any]:
    """FORMAT_KEYS of a layer before it is solved: the factor of the whole tensor is not known yet."""
    number = layer_format.number
    whole = number.element is None
    return {
        "dtype": number.name,
        "qscheme": layer_format.qscheme,
        "group_size": layer_format.group_size,
        "quant_min": layer_format.quant_min if whole else None,
        "quant_max": layer_format.quant_max if whole else None,
        "element_format": None if number.element is None else number.element.name,
        "scale_format": layer_format.scale.name,
        "tensor_scale": None,
        "groups": geometry.groups,
        "transposed": geometry.transposed,
    }


@dataclass(frozen=True)
class LayerRecord:
    """The result of one layer, as it is stored.

    codes: in the storage dtype of the number format and in the shape the weight has in torch. scale: in the storage
    dtype of the scale format, of shape `()` per tensor, `(O,)` per channel, `(O, n)` per group. zero_point: int32, same
    shape as scale. format: FORMAT_KEYS; groups and transposed of a convolution (1 and False for any other layer),
    without which a scale cannot be laid over the codes; element_format ("e4m3", "e2m1") of floats, None of integers;
    scale_format; tensor_scale, the float32 number times which e4m3 scales make up `scale`, None with other scales.
    shift: float32 `(O,)`, what is added to the layer's outputs by its bias (or the batch norm after it), or None.

    Raises AdaRoundError when these do not fit together: that is a defect of this program.
    """

    name: str
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    format: dict[str, Any]
    figures: LayerFigures | None = None
    shift: Tensor | None = None

    @classmethod
    def of(
        cls,
        figures: LayerFigures,
        geometry: LayerGeometry,
        layer_format: LayerFormat,
        codes: Tensor,
        grid: Grid,
        shift: Tensor | None,
    ) -> "LayerRecord":
        """The record of a solved layer, on the host. codes: `(G, R, J)` of the grid; shift: `(O,)` or None."""
        number, scales = layer_format.number, layer_format.scale
        grid = grid.to(torch.float32, torch.device("cpu"))
        shape = {"tensor": (), "channel": (-1,), "group": (geometry.out_channels, -1)}[layer_format.strategy]
        codes = geometry.from_channels(codes).cpu()
        return cls(
            name=figures.name,
            codes=codes.to(getattr(torch, number.storage)) if number.element is None else encode(codes, number.element),
            scale=grid.scale.reshape(shape).to(getattr(torch, scales.storage)),
            zero_point=grid.zero_point.reshape(shape).to(torch.int32),
            format=format_entries(layer_format, geometry)
            | {"tensor_scale": None if grid.tensor_scale is None else grid.tensor_scale.item()},
            figures=figures,
            shift=None if shift is None else shift.float().cpu(),
        )

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise AdaRoundError(f"layer {self.name}: {problem}; this is a defect of distributed_adaround, report it")

    def _problem(self) -> str | None:
        if self.format.keys() != FORMAT_KEYS:
            return f"format has the keys {sorted(self.format)}, needed are {sorted(FORMAT_KEYS)}"
        element_name, scale_name = self.format["element_format"], self.format["scale_format"]
        element, scales = small_float(element_name), SCALE_FORMATS.get(scale_name)
        if scales is None or (element is None and element_name is not None):
            return f"element_format {element_name} or scale_format {scale_name} is not known"
        names = ["groups"] if element is not None else ["quant_min", "quant_max", "groups"]
        if not all(isinstance(self.format[name], int) for name in names) or type(self.format["transposed"]) is not bool:
            return f"format {self.format} has a value of the wrong type"
        shift, shape = self.shift, (self.geometry.out_channels,)
        if shift is not None and (shift.dtype != torch.float32 or shift.shape != shape):
            return f"shift is {shift.dtype} of shape {tuple(shift.shape)}, not one float32 for each output"
        return self._scale_problem(scales) or self._codes_problem(element)

    def _scale_problem(self, scales: ScaleFormat) -> str | None:
        dtype = getattr(torch, scales.storage)
        if self.scale.dtype != dtype or self.zero_point.dtype != torch.int32:
            return f"scale is {self.scale.dtype} and zero point {self.zero_point.dtype}, not {dtype} and torch.int32"
        if self.scale.shape != self.zero_point.shape:
            return f"scale has shape {tuple(self.scale.shape)}, zero point {tuple(self.zero_point.shape)}"
        if not bool(torch.isfinite(self.scale).all()):
            return "a scale is not finite"
        num_outputs, num_inputs = self.geometry.out_channels, self.geometry.inputs_per_output
        shape = tuple(self.scale.shape)
        per_group = len(shape) == 2 and shape[0] == num_outputs and shape[1] > 0 and num_inputs % shape[1] == 0
        if shape not in ((), (num_outputs,)) and not per_group:
            return f"scale of shape {shape} does not fit {num_outputs} outputs of {num_inputs} inputs"
        factor = self.format["tensor_scale"]
        if isinstance(factor, float) != scales.per_tensor:
            return f"tensor_scale is {factor}, with scale_format {scales.name}"
        grid = self._grid
        if not torch.equal(round_scale(grid.scale, scales, grid.tensor_scale), grid.scale):
            return f"a scale is not of the format {scales.name}"
        return None

    def _codes_problem(self, element: FloatFormat | None) -> str | None:
        if element is not None:
            try:
                decode(self.codes, element)
            except ValueError as error:
                return str(error)
            return "a float format has a zero point" if bool(self.zero_point.any()) else None
        if self.codes.dtype not in (torch.int8, torch.uint8, torch.int16, torch.int32):
            return f"codes are {self.codes.dtype}, not whole numbers"
        low, high = (int(code) for code in self.codes.aminmax())
        least, most = self.format["quant_min"], self.format["quant_max"]
        if least <= low and high <= most:
            return None
        return f"codes reach from {low} to {high}, allowed are {least} to {most}"

    @property
    def geometry(self) -> LayerGeometry:
        """Enough of the layer's geometry to see the codes as `(G, R, J)`; strides and padding are not kept."""
        return LayerGeometry(
            tuple(self.codes.shape), groups=self.format["groups"], transposed=self.format["transposed"]
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The one definition of what a committed layer weighs, in torch's shape: `(codes - zero_point) * scale` in
        float32, of float formats the value of each code times the scale, then cast to dtype."""
        element = small_float(self.format["element_format"])
        codes = self.codes if element is None else decode(self.codes, element)
        return self.geometry.from_channels(self._grid.dequantize(self.geometry.to_channels(codes))).to(dtype)

    @property
    def _grid(self) -> Grid:
        own, groups = self.scale.dim() > 0, self.format["groups"]
        shape = (groups, self.scale.shape[0] // groups, -1) if own else (1, 1, 1)
        scale, zero_point = (part.float().reshape(shape) for part in (self.scale, self.zero_point))
        scales, element = SCALE_FORMATS[self.format["scale_format"]], small_float(self.format["element_format"])
        if element is None:
            return Grid(scale, zero_point, self.format["quant_min"], self.format["quant_max"], scales, per_channel=own)
        values = torch.tensor(element.values, device=scale.device)
        factor = self.format["tensor_scale"]
        tensor_scale = None if factor is None else torch.full((1, 1, 1), factor, device=scale.device)
        return Grid(scale, zero_point, 0, len(values) - 1, scales, values, tensor_scale, own)
