"""Google's original BERT folders (`bert_config.json`, `vocab.txt`, a TensorFlow checkpoint) by Hugging Face's names.

Source of the names: google-research/bert, modeling.py and run_classifier.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cook.base.errors import UserError
from cook.base.files import read_json
from cook.base.tensor_files import LazyTensors
from cook.families.tf_checkpoint import TfTensor, open_tf_checkpoint

CONFIG_NAME = "bert_config.json"

# TensorFlow's name to Hugging Face's; a kernel is the transpose of a weight.
_RULES = (
    (r"bert/embeddings/(word|position|token_type)_embeddings", r"bert.embeddings.\1_embeddings.weight"),
    (r"bert/embeddings/LayerNorm/(gamma|beta)", r"bert.embeddings.LayerNorm.\1"),
    (
        r"bert/encoder/layer_(\d+)/attention/self/(query|key|value)/(kernel|bias)",
        r"bert.encoder.layer.\1.attention.self.\2.\3",
    ),
    (
        r"bert/encoder/layer_(\d+)/attention/output/(dense|LayerNorm)/(kernel|bias|gamma|beta)",
        r"bert.encoder.layer.\1.attention.output.\2.\3",
    ),
    (
        r"bert/encoder/layer_(\d+)/(intermediate|output)/(dense|LayerNorm)/(kernel|bias|gamma|beta)",
        r"bert.encoder.layer.\1.\2.\3.\4",
    ),
    (r"bert/pooler/dense/(kernel|bias)", r"bert.pooler.dense.\1"),
    (r"output_(weights|bias)", r"classifier.\1"),
    (r"cls/squad/output_(weights|bias)", r"qa_outputs.\1"),
)
_LEAVES = {"kernel": "weight", "gamma": "weight", "beta": "bias", "weights": "weight"}


def is_google_folder(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file()


def read_google_config(folder: Path) -> dict[str, Any]:
    """The model's config with the keys that Hugging Face's BertConfig takes; they are the same."""
    config = read_json(folder / CONFIG_NAME)
    if not isinstance(config, dict) or "hidden_size" not in config:
        raise UserError(f"{folder / CONFIG_NAME}: not a BERT config", wanted="an object with hidden_size and more")
    return config


def open_google_weights(folder: Path, shapes: Mapping[str, torch.Size]) -> Mapping[str, torch.Tensor]:
    """The weights by Hugging Face's names, read one at a time.

    Left out are weights that are not in `shapes`, which has the shapes of the model's parameters, or differ from them:
    pretraining heads and optimizer states.

    Raises:
        UserError: there is no checkpoint, more than one, or a damaged one.
    """
    found = sorted(folder.glob("*.index"))
    if len(found) != 1:
        what, names = "there must be exactly one TensorFlow checkpoint", ", ".join(path.name for path in found)
        raise UserError(f"{folder}: {what}", wanted="one *.ckpt.index", got=names or "none")
    tensors = open_tf_checkpoint(found[0].with_suffix(""))
    renamed, known = {}, False
    for name, tensor in tensors.items():
        for pattern, replacement in _RULES:
            if match := re.fullmatch(pattern, name):
                known = True
                stem, _, leaf = match.expand(replacement).rpartition(".")
                mine, kernel = f"{stem}.{_LEAVES.get(leaf, leaf)}", leaf == "kernel"
                # Tensors that do not fit are not read: the file could declare any size.
                if shapes.get(mine) == (tensor.shape[::-1] if kernel else tensor.shape):
                    renamed[mine] = partial(_read, tensor, kernel)
    if not known:
        raise UserError(f"{found[0]}: contains no weights of a BERT", got=", ".join(list(tensors)[:3]))
    return LazyTensors(renamed)


def _read(tensor: TfTensor, transposed: bool) -> torch.Tensor:
    values = tensor.read().float()
    return values.T.contiguous() if transposed else values
