"""Sites and reasons read out of exported programs, against the modules they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from distributed_adaround.capture.exported import export_model, straight_line
from distributed_adaround.capture.graph import CapturedGraph, capture
from distributed_adaround.capture.sites import BatchNormAfter
from distributed_adaround.data.microbatches import ModelInputs
from distributed_adaround.errors import InputError
from distributed_adaround.model.source import OpenedModel, fixed_batch_size

# torch 2.13 warns about a call of its own while it loads a program.
OWN_WARNING = r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning"


def captured(model: nn.Module, *args: object, varying: bool = False, **kwargs: object) -> CapturedGraph:
    return capture(straight_line(export_model(model.eval(), ModelInputs(args, kwargs), varying)))


def reasons(graph: CapturedGraph) -> dict[str, str]:
    return {parameter.name: parameter.reason for parameter in graph.float_parameters}


def names(graph: CapturedGraph) -> list[str]:
    return [site.name for site in graph.sites]


class Calling(nn.Module):
    """forward is a function of the module and its inputs."""

    def __init__(self, forward: Any, **members: Any) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, nn.Parameter(member) if isinstance(member, Tensor) else member)
        self._function = forward

    def forward(self, x: Tensor) -> Any:
        return self._function(self, x)


class Apart(nn.Module):
    """Each module on an input of its own: one export, which takes most of the time, shows them all."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(modules)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [module(x) for module, x in zip(self.each, inputs, strict=True)]


LAYERS: list[tuple[str, nn.Module, tuple[int, ...]]] = [
    ("linear", nn.Linear(6, 5), (4, 6)),
    ("linear over tokens", nn.Linear(6, 5, bias=False), (2, 3, 6)),
    ("conv1d", nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    ("conv1d same, dilated", nn.Conv1d(4, 6, 3, padding="same", dilation=3), (2, 4, 15)),
    ("conv2d", nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 4, 9, 12)),
    ("conv2d grouped", nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 6, 6)),
    ("conv2d depthwise", nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 6, 6)),
    ("conv2d same, uneven", nn.Conv2d(4, 6, (3, 5), padding="same"), (2, 4, 7, 7)),
    ("conv2d valid", nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 7)),
    ("conv3d", nn.Conv3d(2, 4, (2, 3, 3), padding=(0, 1, 1), groups=2), (2, 2, 4, 5, 5)),
    ("transposed 1d", nn.ConvTranspose1d(4, 6, 4, stride=3, output_padding=1, dilation=2), (2, 4, 5)),
    ("transposed 2d", nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 5, 5)),
    ("transposed 3d", nn.ConvTranspose3d(2, 3, 2, stride=(2, 1, 2), padding=(1, 0, 1)), (2, 2, 3, 3, 3)),
]
EVEN_SAME = nn.Conv1d(4, 6, 4, padding="same", dilation=3)


def check_geometries(graph: CapturedGraph, layers: list[nn.Module], inputs: list[Tensor]) -> None:
    """The layers are those of `Apart`."""
    biases = set()
    for index, (site, layer, x) in enumerate(zip(graph.sites, layers, inputs, strict=True)):
        name = f"each.{index}"
        applied = site.geometry.apply(x, layer.weight, layer.bias)
        torch.testing.assert_close(applied, layer(x), rtol=1e-5, atol=1e-6)
        assert (site.name, site.weight_name, site.num_calls) == (name, f"{name}.weight", 1)
        assert site.module_class == type(layer).__name__
        assert site.bias_name == (None if layer.bias is None else f"{name}.bias")
        biases |= set() if layer.bias is None else {f"{name}.bias"}
    assert reasons(graph) == dict.fromkeys(biases, "bias")


def test_the_geometry_of_a_site_is_the_layer() -> None:
    layers, inputs = [layer for _, layer, _ in LAYERS], [torch.randn(shape) for *_, shape in LAYERS]
    check_geometries(captured(Apart(layers), inputs), layers, inputs)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_an_even_kernel_with_padding_same_is_padded_unevenly() -> None:
    x = torch.randn(2, 4, 15)
    check_geometries(captured(Apart([EVEN_SAME]), [x]), [EVEN_SAME], [x])


@pytest.mark.filterwarnings(OWN_WARNING)
def test_convolutions_of_a_decomposed_program(tmp_path: Path) -> None:
    layers, inputs = [layer for _, layer, _ in LAYERS[2:]], [torch.randn(shape) for *_, shape in LAYERS[2:]]
    program = export_model(Apart(layers).eval(), ModelInputs((inputs,), {}))
    torch.export.save(program.run_decompositions(), tmp_path / "model.pt2")
    check_geometries(capture(straight_line(torch.export.load(tmp_path / "model.pt2"))), layers, inputs)


@pytest.mark.filterwarnings(OWN_WARNING)
def test_linear_layers_of_a_decomposed_program(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3, bias=False)).eval()
    program = export_model(model, ModelInputs((torch.randn(2, 4),), {}))
    torch.export.save(program, tmp_path / "whole.pt2")
    graph = capture(straight_line(torch.export.load(tmp_path / "whole.pt2")))
    assert [(site.name, site.module_class, site.activation) for site in graph.sites] == [
        ("0", "Linear", "relu"),
        ("2", "Linear", "identity"),
    ]
    torch.export.save(program.run_decompositions(), tmp_path / "parts.pt2")
    graph = capture(straight_line(torch.export.load(tmp_path / "parts.pt2")))
    assert [(site.name, site.view, site.activation) for site in graph.sites] == [
        ("0", None, "relu"),
        ("2", None, "identity"),
    ]
    assert reasons(graph) == {"0.bias": "bias"}


def test_circular_padding_is_part_of_the_input() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular")
    (site,) = captured(nn.Sequential(layer), torch.randn(2, 4, 7, 7)).sites
    assert site.geometry.padding == ((0, 0), (0, 0))


def test_functional_layers_are_named_after_their_parameters() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.linear(F.conv2d(x, self.kernels, stride=2, padding=1).flatten(1), self.inner.matrix, self.offset)

    inner = nn.Module()
    inner.matrix = nn.Parameter(torch.randn(5, 36))
    model = Calling(forward, kernels=torch.randn(4, 3, 3, 3), offset=torch.randn(5), inner=inner)
    x = torch.randn(2, 3, 6, 6)
    graph = captured(model, x)
    conv, linear = graph.sites
    assert (conv.name, conv.weight_name, conv.bias_name, conv.module_class) == ("kernels", "kernels", None, "Calling")
    assert (linear.name, linear.weight_name, linear.bias_name) == ("inner.matrix", "inner.matrix", "offset")
    y = conv.geometry.apply(x, model.kernels).flatten(1)
    torch.testing.assert_close(linear.geometry.apply(y, inner.matrix, model.offset), model(x))
    assert reasons(graph) == {"offset": "bias"}


def test_sites_come_in_the_order_of_execution_under_the_names_of_the_modules() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for block in reversed(self.blocks):
                x = block(x)
            return self.head(x)

    model = Backwards()
    graph = captured(model, torch.randn(3, 4))
    assert names(graph) == ["blocks.1.0", "blocks.0.0", "head"]
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in names(graph))


def test_a_model_that_is_one_layer_has_a_site_without_a_name() -> None:
    (site,) = captured(nn.Linear(4, 3), torch.randn(2, 4)).sites
    assert (site.name, site.weight_name, site.bias_name) == ("", "weight", "bias")


ACTIVATIONS: list[tuple[str, Any, str]] = [
    ("relu", F.relu, "relu"),
    ("relu in place", lambda y: F.relu_(y), "relu"),
    ("clamp(min=0)", lambda y: y.clamp(min=0), "relu"),
    ("clamp_min", lambda y: y.clamp_min(0.0), "relu"),
    ("relu6", F.relu6, "relu6"),
    ("relu6 in place", nn.ReLU6(inplace=True), "relu6"),
    ("clamp(0, 6)", lambda y: y.clamp(0, 6), "relu6"),
    ("hardtanh(0, 6)", lambda y: F.hardtanh(y, 0.0, 6.0), "relu6"),
    ("hardtanh", F.hardtanh, "identity"),
    ("clamp(max=6)", lambda y: y.clamp(max=6), "identity"),
    ("clamp(1, 6)", lambda y: y.clamp(1, 6), "identity"),
    ("clamp by a tensor", lambda y: y.clamp(min=torch.zeros(4)), "identity"),
    ("leaky relu", F.leaky_relu, "identity"),
    ("residual", lambda y: F.relu(y) + y, "identity"),
]


def test_the_activation_after_a_layer() -> None:
    def model(function: Any) -> nn.Module:
        def forward(self: Any, x: Tensor) -> Tensor:
            return function(self.first(x)) + function(self.norm(self.second(x)))

        return Calling(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 4), norm=nn.BatchNorm1d(4))

    inputs = [torch.randn(3, 4) for _ in ACTIVATIONS]
    sites = captured(Apart([model(function) for _, function, _ in ACTIVATIONS]), inputs).sites
    for (name, _, found), plain, normed in zip(ACTIVATIONS, sites[::2], sites[1::2], strict=True):
        assert plain.activation == normed.activation == found, name
        assert plain.batch_norm is None, name
        assert normed.batch_norm is not None, name


def test_the_batch_norm_after_a_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.25), nn.ReLU(), nn.Conv2d(4, 4, 1))
    first, last = captured(model, torch.randn(2, 3, 6, 6)).sites
    assert first.batch_norm == BatchNormAfter("1.weight", "1.bias", "1.running_mean", "1.running_var", 0.25)
    assert (last.batch_norm, last.activation) == (None, "identity")


def test_a_batch_norm_without_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
    (site,) = captured(model, torch.randn(3, 4)).sites
    assert site.batch_norm == BatchNormAfter(None, None, "1.running_mean", "1.running_var", 1e-5)


def test_a_batch_norm_that_cannot_be_inside_the_loss() -> None:
    def normed(self: Any, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.layer(x)))

    cases: list[tuple[nn.Module, Any, tuple[int, ...]]] = [
        # Dimension 1 is the token, not the channel.
        (nn.BatchNorm1d(4), normed, (3, 4, 4)),
        # Its numbers are those of the batch.
        (nn.BatchNorm1d(4, track_running_stats=False), normed, (3, 4)),
        # Somebody else reads the layer's output too.
        (nn.BatchNorm1d(4), lambda self, x: self.norm(y := self.layer(x)) + y, (3, 4)),
    ]
    models = [Calling(forward, layer=nn.Linear(4, 4), norm=norm) for norm, forward, _ in cases]
    sites = captured(Apart(models), [torch.randn(shape) for *_, shape in cases]).sites
    assert [(site.batch_norm, site.activation) for site in sites] == [(None, "identity")] * 3


def tied_with_embedding() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(self.table(x.long().clamp(0, 3)))

    model = Calling(forward, table=nn.Embedding(4, 4), head=nn.Linear(4, 4, bias=False))
    model.head.weight = model.table.weight
    return model


def weight_normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4, bias=False)))


FLOAT: list[tuple[str, nn.Module, dict[str, str]]] = [
    ("tied with an embedding", tied_with_embedding(), {"table.weight": "shared with embedding"}),
    (
        "weight norm",
        weight_normed(),
        {
            "0.parametrizations.weight.original0": "used by weight_norm, not the weight of a layer",
            "0.parametrizations.weight.original1": "used by weight_norm, not the weight of a layer",
        },
    ),
    (
        "layers of different kinds",
        Calling(
            lambda s, x: F.conv1d(x[:, :, None], s.w) + F.conv_transpose1d(x[:, :, None], s.w),
            w=torch.ones(4, 4, 1),
        ),
        {"w": "used by layers of different kinds"},
    ),
    (
        "also a layer's input",
        Calling(lambda s, x: F.linear(x, s.a) + F.linear(s.a, s.b).sum(), a=torch.randn(4, 4), b=torch.randn(4, 4)),
        {"a": "shared with linear", "b": "the input of its layer does not depend on the data"},
    ),
    (
        "applied to a learned query",
        Calling(lambda s, x: s.q(s.query) @ x.T, q=nn.Linear(4, 4), query=torch.randn(2, 4)),
        {
            "query": "used by linear, not the weight of a layer",
            "q.weight": "the input of its layer does not depend on the data",
            "q.bias": "bias",
        },
    ),
    (
        "computed bias",
        Calling(lambda s, x: F.linear(x, s.w, s.b * 2), w=torch.randn(4, 4), b=torch.randn(4)),
        {"w": "the bias of its layer is computed from other tensors", "b": "used by mul, not the weight of a layer"},
    ),
    (
        "never used",
        Calling(lambda s, x: x * 2, layer=nn.Linear(4, 4), extra=torch.randn(2)),
        dict.fromkeys(("layer.weight", "layer.bias", "extra"), "not used in the forward pass"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "expected"), [case[1:] for case in FLOAT], ids=[case[0] for case in FLOAT])
def test_parameters_left_in_float_have_a_reason(model: nn.Module, expected: dict[str, str]) -> None:
    graph = captured(model, torch.randn(3, 4))
    assert names(graph) == []
    assert reasons(graph) == expected
    assert {p.name: p.shape for p in graph.float_parameters} == {n: tuple(p.shape) for n, p in model.named_parameters()}


def test_every_parameter_is_a_weight_or_has_a_reason() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    graph = captured(model, torch.randn(3, 5, 8), varying=True)
    weights = [site.weight_name for site in graph.sites]
    listed = [*weights, *reasons(graph)]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())
    assert "layers.0.linear1.weight" in weights


def test_constants_and_buffers_are_no_sites() -> None:
    class Blur(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kernel", torch.randn(3, 1, 3, 3))
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.conv2d(x, self.kernel, groups=3)) + F.conv2d(x, torch.ones(4, 3, 3, 3))

    assert names(captured(Blur(), torch.randn(2, 3, 6, 6))) == ["conv"]


def test_a_parameter_under_two_names_is_one_site() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    graph = captured(model, torch.randn(3, 4))
    (site,) = graph.sites
    assert (site.name, site.num_calls) == ("0", 2)
    (found,) = graph.units
    assert [call.node.target for call in found.calls] == [torch.ops.aten.linear.default] * 2
    assert reasons(graph) == {"0.bias": "bias", "2.bias": "bias"}


def test_padding_that_depends_on_the_input_leaves_the_layer_in_float() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.up(self.down(x), output_size=x.shape[-2:])

    model = Calling(forward, down=nn.Conv2d(3, 4, 3, stride=2), up=nn.ConvTranspose2d(4, 3, 3, stride=2))
    assert names(captured(model, torch.randn(2, 3, 8, 9))) == ["down", "up"]
    graph = captured(model, torch.randn(2, 3, 8, 9), varying=True)
    assert names(graph) == ["down"]
    assert reasons(graph)["up.weight"] == "the padding of its layer depends on the size of the input"


def test_the_graph_holds_the_models_own_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    graph = captured(model, torch.randn(3, 4))
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert graph.module.get_parameter(name) is tensor if isinstance(tensor, nn.Parameter) else True
        assert graph.module.state_dict()[name].data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_the_batch_stays_dynamic_whatever_it_equals(size: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(12, 2)).eval()
    program = export_model(model, ModelInputs((torch.randn(size, 3, 4),), {}))
    assert fixed_batch_size(program) is None
    assert OpenedModel(program).parameters == ["input"]
    module = straight_line(program)
    for n in (1, 2, 3, 4, 7):
        x = torch.randn(n, 3, 4)
        torch.testing.assert_close(module(x), model(x))


@pytest.mark.parametrize("shape", [(2, 2, 4), (3, 2, 4), (2, 3, 4)])
def test_equal_sizes_of_the_example_stay_apart(shape: tuple[int, ...]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        samples, tokens, _ = x.shape
        y = self.layer(x).reshape(tokens * samples, -1).sum(1).reshape(samples, tokens)
        return y * 2 if samples == tokens else y

    model = Calling(forward, layer=nn.Linear(4, 4)).eval()
    module = straight_line(export_model(model, ModelInputs((torch.randn(shape),), {}), varying=True))
    for other in ((5, 7, 4), (7, 5, 4), (1, 3, 4)):
        x = torch.randn(other)
        torch.testing.assert_close(module(x), model(x))


def test_inputs_of_starred_arguments_are_dynamic() -> None:
    class Starred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, *args: Tensor) -> Tensor:
            return self.layer(args[0]) + args[1]

    graph = captured(Starred(), torch.randn(3, 4), torch.randn(3, 4))
    assert graph.module(torch.ones(5, 4), torch.ones(5, 4)).shape == (5, 4)


def test_a_baked_in_batch_size_is_refused() -> None:
    model = Calling(lambda self, x: torch.stack([self.layer(row) for row in x]), layer=nn.Linear(4, 4))
    with pytest.raises(InputError, match="only takes batches of 2 samples"):
        export_model(model.eval(), ModelInputs((torch.randn(3, 4),), {}))


def test_control_flow_in_the_graph_is_refused() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.layer(torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,)))

    program = export_model(Calling(forward, layer=nn.Linear(4, 4)).eval(), ModelInputs((torch.randn(3, 4),), {}))
    with pytest.raises(InputError, match="control flow"):
        straight_line(program)


def test_nodes_are_sorted_by_what_they_depend_on() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(self.a(x.cos() + self.shift.exp()).sin())

    graph = captured(Calling(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), shift=torch.randn(4)), torch.randn(3, 4))

    def operations(nodes: Any) -> set[str]:
        return {str(node.target) for node in nodes if node.op == "call_function"}

    assert operations(graph.constant) == {"aten.exp.default"}
    assert operations(graph.common) == {"aten.cos.default", "aten.add.Tensor"}
    assert operations(set(graph.nodes) - graph.constant - graph.common) == {"aten.linear.default", "aten.sin.default"}


@pytest.mark.slow
def test_tiny_transformers_keep_their_cache_setting() -> None:
    """test_huggingface.py sees the same of whole jobs."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=50, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(50, (3, 7))
    graph = captured(model, input_ids=tokens, attention_mask=torch.ones_like(tokens), varying=True)
    assert config.use_cache is True
    assert len(graph.sites) == 7
    assert reasons(graph)["model.embed_tokens.weight"] == "shared with embedding"
    config = transformers.BertConfig(**sizes, vocab_size=50)
    graph = captured(transformers.BertModel(config), input_ids=tokens, attention_mask=torch.ones_like(tokens))
    assert [site.name for site in graph.sites][-2:] == ["encoder.layer.0.output.dense", "pooler.dense"]
    assert len(graph.sites) == 6 + 1
