"""Tiny model folders with tokenizers."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cook.export.model_folder import write_model_folder
from cook.families.cpm_ant import ADAPTER
from tests.models.cpm_ant_tiny import RAGGED, tiny_model
from tests.tiny_pruning import config_of

WORDS = [f"w{i}" for i in range(61)]
IDS = [i * i % 61 for i in range(100)]
TEXT = " ".join(WORDS[i] for i in IDS)


def write_tokenizer(folder, words=tuple(WORDS), **special):
    """A tokenizer whose tokens are the words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    """A ragged CPM-Ant."""
    path = tmp_path / "model"
    write_model_folder(path, ADAPTER, config_of(**RAGGED), tiny_model(**RAGGED).state_dict().items())
    write_tokenizer(path)
    return path


@pytest.fixture
def stock_folder(tmp_path):
    """A model of stock transformers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=62,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    path = tmp_path / "stock"
    LlamaForCausalLM(config).save_pretrained(path)
    write_tokenizer(path, (*WORDS, "<s>"), bos_token="<s>")
    return path
