"""How long the walk through a graph keeps each value.

A value goes after its last reader. Two things prolong that. A layer that runs several times is learned at its last
call, so inputs and outputs of all its calls stay until then. And the quantized stream then runs again from the first
call on, so what it reads from before stays too:

    ── a ──── A₁ ──── b ──── A₂ ── c ──►      learned at A₂, with Â the quantized stream runs A₁ ... A₂ again:
       └─ kept for the second run ──┘         a stays, b is made again
"""

from collections.abc import Container, Sequence

from torch.fx import Node

from distributed_adaround.capture.find_sites import UnitCalls

FLOAT, QUANTIZED, COMMON = "float", "quantized", "common"


class Lifetimes:
    def __init__(self, nodes: Sequence[Node], units: Sequence[UnitCalls], shared: Container[Node]) -> None:
        """shared: nodes with one value for both streams, constant or common, which no second run makes again."""
        self._order = {node: position for position, node in enumerate(nodes)}
        self._shared = shared
        self._spans = [
            (self._order[unit.calls[0].node], self._order[unit.calls[-1].node]) for unit in units if unit.repeats
        ]
        last_float: dict[Node, int] = {}
        last_quantized: dict[Node, int] = {}
        for position, node in enumerate(nodes):
            for source in node.all_input_nodes:
                last_float[source] = position
                last_quantized[source] = max(last_quantized.get(source, 0), self._again(source, position))
        for unit in units:
            end = self._order[unit.calls[-1].node]
            for call in unit.calls:
                for source in (*call.reads, call.node):
                    last_float[source] = max(last_float.get(source, 0), end)
                for source in call.reads:
                    last_quantized[source] = max(last_quantized[source], end)
        self._last_reads = {
            FLOAT: _by_position(nodes, last_float),
            QUANTIZED: _by_position(nodes, last_quantized),
        }
        self._last_reads[COMMON] = self._last_reads[QUANTIZED]

    def _again(self, source: Node, position: int) -> int:
        """The last time that the quantized stream runs the node at `position` with this value of its source."""
        produced = self._order[source]
        ends = (
            last
            for first, last in self._spans
            if first <= position <= last and (produced < first or source in self._shared)
        )
        return max(ends, default=position)

    def ends(self, stream: str, node: Node) -> Sequence[Node]:
        """Nodes whose values in a stream nothing reads after `node`, the last time that the stream runs it. Common and
        constant values go with the quantized stream."""
        return self._last_reads[stream].get(node, ())


def _by_position(nodes: Sequence[Node], last: dict[Node, int]) -> dict[Node, list[Node]]:
    reads: dict[Node, list[Node]] = {}
    for source, position in last.items():
        reads.setdefault(nodes[position], []).append(source)
    return reads
