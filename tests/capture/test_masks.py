"""Where masks belong: the rows of the input that they speak of, wherever these go, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from walks import Batches, reach, replayed, sites_of

from distributed_adaround import quantize
from distributed_adaround.capture.binding import bind
from distributed_adaround.capture.exported import export_model, straight_line
from distributed_adaround.capture.graph import capture
from distributed_adaround.capture.masks import MaskedRows
from distributed_adaround.data.microbatches import ModelInputs

N, T = 3, 6
# The decoder's tokens are as many as the encoder's: shapes say nothing.
MASK = (torch.arange(T) < torch.tensor([[6], [4], [1]])).long()
OTHER = (torch.arange(T) < torch.tensor([[2], [6], [5]])).long()


def masks_found(model: nn.Module, batch: dict[str, Any], mask: Tensor, varying: bool = False) -> dict[str, Any]:
    """Mask of the rows of each layer, by name."""
    inputs = ModelInputs((), batch, mask)
    graph = capture(straight_line(export_model(model.eval(), inputs, varying)))
    rows = MaskedRows(graph.nodes, graph.constant)
    masks = rows.of_microbatch(bind(graph.module, inputs, 0), inputs)
    return {
        found.unit.name: rows.mask_of(found.calls[-1].node, found.unit.sites[0].geometry.channel_dim, masks)
        for found in graph.units
    }


def tokens(*shape: int) -> Tensor:
    return torch.randint(20, shape)


@pytest.mark.parametrize(("varying", "both"), [pytest.param(False, False, marks=pytest.mark.slow), (True, True)])
def test_encoder_and_decoder_of_t5_have_their_own_masks(varying: bool, both: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=20, decoder_start_token_id=0
    )
    batch = {"input_ids": tokens(N, T), "attention_mask": MASK, "decoder_input_ids": tokens(N, T)}
    model = transformers.T5ForConditionalGeneration(config)
    given = batch | ({"decoder_attention_mask": OTHER} if both else {})
    found = masks_found(model, given, MASK, varying)
    assert len(found) == 16
    for name, mask in found.items():
        # Keys and values of the cross-attention are the encoder's tokens.
        of_encoder = name.startswith("encoder.") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert mask is (MASK if of_encoder else given.get("decoder_attention_mask")), name


@pytest.mark.parametrize(
    "kind", ["bert", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "mixtral"))]
)
def test_all_tokens_of_one_sequence_have_its_mask(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=20), add_pooling_layer=False)
        more = {"token_type_ids": tokens(N, T) % 2}
    else:
        name = kind.capitalize()
        config = getattr(transformers, f"{name}Config")(**sizes, num_key_value_heads=1, vocab_size=20)
        model, more = getattr(transformers, f"{name}ForCausalLM")(config), {}
    found = masks_found(model, {"input_ids": tokens(N, T), "attention_mask": MASK} | more, MASK)
    assert len(found) >= 6
    assert all(mask is MASK for name, mask in found.items() if "expert" not in name)


class Crossed(nn.Module):
    """Two sequences; the second looks at a summary of the first, or at all of it. The first goes through shapes."""

    def __init__(self, attends: bool = False) -> None:
        super().__init__()
        self.enc, self.flat, self.turned, self.conv = (
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Conv1d(8, 8, 1),
        )
        self.pooled, self.dec, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.attends = attends

    def forward(self, x: Tensor, attention_mask: Tensor, y: Tensor) -> Tensor:
        x = self.flat(self.enc(x).reshape(-1, 8)).view(x.shape)
        x = self.turned(x.transpose(0, 1)).transpose(0, 1)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        m = attention_mask[..., None].float()
        y = self.dec(y)
        if self.attends:
            scores = (y @ x.transpose(1, 2)).masked_fill(attention_mask[:, None] == 0, -1e9)
            return self.last(y + scores.softmax(-1) @ x)
        context = (x * m).sum(1, keepdim=True) / m.sum(1, keepdim=True)
        return self.last(F.relu(y + self.pooled(context)))


@pytest.mark.parametrize("attends", [False, True])
def test_masks_follow_their_rows_through_shapes_and_stop_where_they_end(attends: bool) -> None:
    batch = {"x": torch.randn(N, T, 8), "attention_mask": MASK, "y": torch.randn(N, T, 8)}
    found = masks_found(Crossed(attends), batch, MASK)
    assert found["enc"] is found["flat"] is found["conv"] is MASK
    assert torch.equal(found["turned"], MASK.t())
    assert found["dec"] is found["last"] is None
    assert attends or found["pooled"] is None


def test_rows_in_another_order_have_no_mask() -> None:
    class Sorted(nn.Module):
        """Tokens sorted by their first number, as for experts, are as many as before."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            flat = self.a(x).reshape(-1, 8)
            order = flat[:, 0].argsort()
            rows = self.b(flat[order])
            back = torch.zeros_like(flat).index_add(0, order, rows)
            return self.c(back.view(x.shape)) * attention_mask[..., None]

    found = masks_found(Sorted(), {"x": torch.randn(N, T, 8), "attention_mask": MASK}, MASK)
    assert found["b"] is None
    assert found["a"] is found["c"] is MASK


def test_a_mask_that_the_model_does_not_take_belongs_to_the_only_input_of_its_shape() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([self.a(x), self.b(y)], 1)

    batch = {"x": torch.randn(N, T, 8), "y": torch.randn(N, T + 2, 8)}
    assert masks_found(Rows(), batch, MASK) == {"a": MASK, "b": None}
    alike = {"x": torch.randn(N, T, 8), "y": torch.randn(N, T, 8)}
    assert masks_found(Rows(), alike, MASK) == {"a": None, "b": None}


@pytest.mark.parametrize("varying", [False, True])
def test_a_mask_of_frames_belongs_to_what_convolutions_make_of_a_waveform(varying: bool) -> None:
    class Frames(nn.Module):
        """Of two samples each, beside other tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(1, 4, 3, padding=1), nn.Conv1d(4, 8, 2, stride=2)
            self.frame, self.beside = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, waveform: Tensor, other: Tensor) -> Tensor:
            frames = self.second(F.relu(self.first(waveform[:, None]))).transpose(1, 2)
            return self.frame(frames).sum(1, keepdim=True) + self.beside(other)

    batch = {"waveform": torch.randn(N, 2 * T), "other": torch.randn(N, T + 1, 8)}
    found = masks_found(Frames(), batch, MASK, varying)
    assert found["second"] is found["frame"] is MASK
    assert found["beside"] is None


def test_padding_changes_nothing_and_rows_of_the_other_input_all_count() -> None:
    torch.manual_seed(0)
    model = Crossed()
    batches = [{"x": torch.randn(N, T, 8), "attention_mask": MASK, "y": torch.randn(N, T, 8)} for _ in range(2)]

    def solved(spoiled: str) -> tuple[dict[str, Tensor], dict[str, float]]:
        given = batches
        if spoiled:
            given = [b | {spoiled: torch.where(MASK[..., None] != 0, b[spoiled], 10 * b[spoiled])} for b in batches]
        quantized, table = quantize(model, given, dtype="int4", solver="gram", progress=False)
        return dict(quantized.state_dict()), {layer["name"]: layer["hard_error"] for layer in table.to_dicts()}

    (weights, errors), x_spoiled, y_spoiled = (solved(name) for name in ("", "x", "y"))
    assert all(torch.equal(weight, x_spoiled[0][name]) for name, weight in weights.items())
    assert errors == x_spoiled[1]
    assert errors["dec"] != y_spoiled[1]["dec"]
    assert errors["enc"] == y_spoiled[1]["enc"]


def test_hooks_use_a_mask_only_where_one_input_can_be_meant() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 4)

        def forward(self, x: Tensor, attention_mask: Tensor, y: Tensor) -> Tensor:
            return self.a(x) * attention_mask[..., None] + y.sum()

    for other, expected in ((torch.randn(N, T, 8), None), (torch.randn(N, T + 1, 8), MASK)):
        inputs = ModelInputs((), {"x": torch.randn(N, T, 8), "attention_mask": MASK, "y": other}, MASK)
        walker = replayed(Two(), Batches([inputs]))
        assert reach(walker, sites_of(walker)[0]).masks[0] is expected
        assert any("mask is not used" in note for note in walker.notes) == (expected is None)
