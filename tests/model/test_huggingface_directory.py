"""HuggingFace directories: what is loaded, from anywhere; what is refused, in one line, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fsspec.implementations.memory import MemoryFileSystem
from hf_directories import llama
from safetensors.torch import load_file, save_file

from distributed_adaround.errors import InputError
from distributed_adaround.files import storage
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.model.huggingface import files_beside
from distributed_adaround.model.source import OpenedModel, open_model
from distributed_adaround.spec.model import ModelSpec

pytestmark = pytest.mark.filterwarnings("ignore")
INDEX = "model.safetensors.index.json"


def opened(uri: Path | str, **fields: Any) -> OpenedModel:
    with LocalFiles.temporary() as files:
        return open_model(ModelSpec(hf=str(uri), **fields), None, files)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = llama(tmp_path_factory.mktemp("sharded"), shard_size="8KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def copied(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "copied"))


@pytest.fixture
def remote(sharded: Path) -> Iterator[str]:
    for path in sharded.iterdir():
        storage.write_bytes(f"memory://models/llama/{path.name}", path.read_bytes())
    yield "memory://models/llama"
    MemoryFileSystem.store.clear()


def test_one_file_and_shards_hold_the_same_model(plain: Path, sharded: Path) -> None:
    found, parts = opened(plain), opened(sharded)
    assert type(found.model) is type(parts.model) is transformers.LlamaForCausalLM
    assert found.digest == parts.digest
    stored = load_file(plain / "model.safetensors")
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in stored.items())
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    assert not found.model.training
    assert found.model.config._attn_implementation == "sdpa"
    assert found.dtype == torch.float32
    # Beside the weights, and of these where each lies, and the size.
    assert found.checkpoint == dict.fromkeys(stored, "model.safetensors")
    assert set(files_beside(plain)) == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert found.shard_bytes == 0
    assert parts.shard_bytes == max(path.stat().st_size for path in sharded.glob("*.safetensors"))


def test_a_directory_in_a_store(remote: str, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    real = MemoryFileSystem.get_file

    def spy(self: MemoryFileSystem, source: str, target: str, **options: Any) -> None:
        fetched.append(source.rpartition("/")[2])
        real(self, source, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", spy)
    assert opened(remote).digest == opened(sharded).digest
    assert sorted(fetched) == sorted(path.name for path in sharded.iterdir())


def test_dtype_class_and_arguments(plain: Path, tmp_path: Path) -> None:
    assert opened(plain, dtype="bfloat16").dtype == torch.bfloat16
    base = opened(plain, hf_class="LlamaModel")
    assert type(base.model).__name__ == "LlamaModel"
    fewer = opened(plain, source_args={"num_hidden_layers": 0})
    assert len(fewer.model.model.layers) == 0
    # Of bfloat16, as config.json says.
    config = json.loads((plain / "config.json").read_text())
    half = Path(shutil.copytree(plain, tmp_path / "half"))
    (half / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert opened(half).dtype == torch.bfloat16


def test_the_auto_classes_know_what_config_json_does_not_name(plain: Path, tmp_path: Path) -> None:
    unnamed = Path(shutil.copytree(plain, tmp_path / "unnamed"))
    config = json.loads((plain / "config.json").read_text())
    (unnamed / "config.json").write_text(json.dumps(config | {"architectures": ["MyOwnLlama"]}))
    assert type(opened(unnamed).model) is transformers.LlamaForCausalLM


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def unfinished(folder: Path) -> None:
    """A weight that the class has, and neither the index nor a shard."""
    edit_index(folder, lambda places: places.pop("model.norm.weight"))
    for shard in shards(folder):
        tensors = load_file(shard)
        if tensors.pop("model.norm.weight", None) is not None:
            save_file(tensors, shard, {"format": "pt"})


def broken(folder: Path) -> None:
    shard = shards(folder)[0]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    tensors[name][0] = float("nan")
    save_file(tensors, shard, {"format": "pt"})


def rewrite_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def to_pickles(folder: Path) -> None:
    for path in (*shards(folder), folder / INDEX):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: shards(d)[1].unlink(), ["model-00002-of-", "is missing", "get it again"]),
        (lambda d: cut(shards(d)[1]), ["model-00002-of-", "is damaged", "get it again"]),
        (lambda d: edit_index(d, lambda m: m.update(more=shards(d)[0].name)), ["lacks", "more", "get both again"]),
        (lambda d: edit_index(d, lambda m: m.update(x="../x.safetensors")), ["'../x.safetensors'", "leaves the dir"]),
        (lambda d: (d / INDEX).write_text("{"), [INDEX, "cannot be read", "get it again"]),
        (lambda d: (d / INDEX).write_text("{}"), ["no weight_map"]),
        (unfinished, ["does not hold all weights of LlamaForCausalLM", "missing model.norm.weight", "model.hf_class"]),
        (broken, ["not finite"]),
        (to_pickles, ["no model.safetensors", "only pytorch_model.bin", "save_pretrained"]),
        (lambda d: (d / "config.json").unlink(), ["has no config.json"]),
        (lambda d: (d / "config.json").write_text("no"), ["config.json cannot be read"]),
        (
            lambda d: rewrite_config(d, architectures=["MyModel"], model_type="mine", auto_map={"AutoModel": "m.M"}),
            ["no class for MyModel", "never run", "model.hf_class"],
        ),
        (lambda d: rewrite_config(d, hidden_size=48), ["cannot be loaded as LlamaForCausalLM"]),
        (lambda d: rewrite_config(d, quantization_config={"quant_method": "awq"}), ["quantized already, by awq"]),
    ],
)
def test_a_bad_directory_is_one_line(damage: Callable[[Path], object], words: list[str], copied: Path) -> None:
    damage(copied)
    with pytest.raises(InputError) as caught:
        opened(copied)
    message = str(caught.value)
    assert "\n" not in message
    for word in ("model.hf", *words):
        assert word in message, message


def test_what_a_job_may_not_ask_for(plain: Path) -> None:
    with pytest.raises(InputError, match="'trust_remote_code' is not for the job to set"):
        opened(plain, source_args={"trust_remote_code": True})
    with pytest.raises(InputError, match=r"'Llama': transformers .* has no model class of this name"):
        opened(plain, hf_class="Llama")
    with pytest.raises(InputError, match="no such folder, or it is empty"):
        opened(plain / "none")


def test_code_in_a_directory_is_never_run(copied: Path, tmp_path: Path) -> None:
    (copied / "modeling_mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    rewrite_config(copied, auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    found = opened(copied)
    assert type(found.model) is transformers.LlamaForCausalLM
    assert not (tmp_path / "ran").exists()
    # Nor carried along to where somebody might run it.
    assert "modeling_mine.py" not in files_beside(copied)
