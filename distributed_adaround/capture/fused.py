"""Layers that serving engines run as one matrix: they must have one number format, and of some formats one scale.

q_proj, k_proj, v_proj          of one input, in one module
gate_proj, up_proj              likewise
in_proj_weight[0:16], [16:32]   parts of one parameter
experts.0.w1, experts.7.w2      all experts of a block, which one kernel runs; one format, scales of their own
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from distributed_adaround.capture.sites import Site, Walker
from distributed_adaround.errors import SpecError, shorten
from distributed_adaround.formats import LayerFormat

# Names inside one module that vLLM and SGLang pack into one matrix.
_PACKED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
_PACK_OF = {name: pack[0] for pack in _PACKED for name in pack}
_EXPERTS = re.compile(r"(?P<block>(.*\.)?experts)\.")

# The sites of a unit, and their format.
Formatted = tuple[Sequence[Site], LayerFormat | None]


def check_fused(planned: Iterable[Formatted]) -> None:
    """Raises SpecError when layers that are run as one have several formats, or some of them none."""
    first: dict[object, tuple[str, LayerFormat | None]] = {}
    for sites, layer_format in planned:
        for key in _runs_with(sites):
            name, known = first.setdefault(key, (sites[0].name, layer_format))
            if _scheme(known) != _scheme(layer_format):
                pair = f"{shorten(name, 80)!r} is {known or 'float'}, {shorten(sites[0].name, 80)!r} is "
                remedy = "give both one format, by quantize.overrides or quantize.ignore, or set quantize.fused=ignore"
                what = "serving engines run them as one matrix"
                raise SpecError(f"quantize: {pair}{layer_format or 'float'}, but {what}; {remedy}")


def share_tensor_scales(planned: Sequence[Formatted], walker: Walker) -> list[LayerFormat | None]:
    """The formats, with one factor for the scales of layers that are run as one, where their format has such a factor:
    the largest weight of all of them stands for that of each."""
    members: dict[object, dict[int, LayerFormat]] = {}
    for place, (sites, layer_format) in enumerate(planned):
        if layer_format is not None and layer_format.scale.per_tensor and (key := _packed_with(sites)) is not None:
            members.setdefault(key, {})[place] = layer_format
    formats = [layer_format for _, layer_format in planned]
    for together in members.values():
        largest = max(_largest(site, walker) for place in together for site in planned[place][0])
        for place, layer_format in together.items() if len(together) > 1 else ():
            formats[place] = replace(layer_format, tensor_amax=largest)
    return formats


def _largest(site: Site, walker: Walker) -> float:
    return float(site.weight_of(walker.tensor(site.weight_name)).float().abs().max())


def _runs_with(sites: Sequence[Site]) -> list[object]:
    """What a unit has in common with those that run with it: all that must have its format."""
    packed, experts = _packed_with(sites), _EXPERTS.match(sites[0].name)
    # Experts in one parameter are one unit.
    block = experts["block"] if experts else None
    return [key for key in (packed, block) if key is not None]


def _packed_with(sites: Sequence[Site]) -> object | None:
    """What a unit has in common with those that are packed into one matrix with it; None: it is alone."""
    site = sites[0]
    if len(sites) > 1 or site.is_router:
        return None
    if site.part:
        return (site.weight_name,)
    module, _, name = site.name.rpartition(".")
    # Keys and values of a cross-attention have another input than its queries.
    return (module, _PACK_OF[name], site.source) if name in _PACK_OF else None


def _scheme(layer_format: LayerFormat | None) -> object:
    """What must be the same: not how the scales were found."""
    if layer_format is None:
        return None
    return replace(layer_format, observer="minmax", percentile=100.0, tensor_amax=None)
