"""Data as a job deals them: what its encoder knows of the model, and what its ranks agree on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hf_directories import llama, text
from rank_pool import RankPool

from distributed_adaround.data.deal import deal_data
from distributed_adaround.errors import InputError, PeerError
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.job import find_directories
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.runtime.context import RankContext, process_group
from distributed_adaround.spec.data import DataSpec
from distributed_adaround.spec.job import JobSpec

pytestmark = pytest.mark.filterwarnings("ignore")


def split(folder: Path) -> tuple[Path, Path]:
    """A model without its tokenizer, and the tokenizer alone."""
    model = llama(folder / "model", max_position_embeddings=12)
    alone = folder / "tokenizer"
    alone.mkdir()
    for path in model.glob("*token*"):
        path.rename(alone / path.name)
    return model, alone


def test_a_tokenizer_alone_goes_by_the_configuration_of_the_model(tmp_path: Path) -> None:
    model, tokenizer = split(tmp_path)
    section = {"uri": str(text(tmp_path / "words.txt", 60)), "text": {}, "processor": str(tokenizer)}
    spec = JobSpec(model={"hf": str(model)}, data=section, output={"uri": "unused"})
    with LocalFiles.temporary() as files:
        for said in (None, {"architectures": ["BertModel"], "max_position_embeddings": 8}):
            if said is not None:
                (tokenizer / "config.json").write_text(json.dumps(said))
            dealt = deal_data(spec.data, files, SoloComm(), find_directories(spec, spec.data, files), "the data")
            # The model continues texts, so they are in windows, as long as it takes.
            assert [info.shape for info in dealt.manifest.fields] == [(12,)]
            assert dealt.manifest.num_samples == 5


def deal_on_rank(folder: str, tokenizers: list[str]) -> tuple[str, str]:
    spec = DataSpec(uri=f"{folder}/words.txt", text={"sequence_length": 6}, processor="its/own")
    context = RankContext.from_environment("cpu", "gloo")
    try:
        with process_group(context, 1) as comm, LocalFiles.temporary() as files:
            own = Path(folder) / tokenizers[comm.rank]
            dealt = deal_data(spec, files, comm, lambda: (own, None), "the data")
            return "nothing", dealt.manifest.digest()
    except (InputError, PeerError) as error:
        return type(error).__name__, str(error)


def test_ranks_must_have_the_same_tokenizer(pool: RankPool, tmp_path: Path) -> None:
    _, tokenizer = split(tmp_path)
    text(tmp_path / "words.txt", 60)
    other = tmp_path / "other"
    other.mkdir()
    for path in tokenizer.iterdir():
        (other / path.name).write_text(path.read_text())
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"the"', '"The"'))
    found = pool.run(deal_on_rank, 2, str(tmp_path), ["tokenizer", "other"])
    assert [kind for kind, _ in found] == ["PeerError", "InputError"]
    assert found[1][1].startswith("the tokenizer or processor of the data is not that of rank 0; give all machines")
