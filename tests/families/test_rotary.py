"""Factors of `longrope` that give chosen frequencies, by transformers' own function."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cook.families.rotary import factors, without_factors


@pytest.mark.parametrize("theta", [1e4, 1e5, 1e6])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("divided", [False, True])
def test_transformers_computes_the_frequencies_that_were_wanted(theta, seed, divided):
    whole = 1.0 / theta ** (torch.arange(0, 128, 2).float() / 128)
    whole = whole * 0.7 if divided else whole
    kept = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:40].sort().values
    given = factors(whole[kept])
    rope = {"rope_type": "longrope", "rope_theta": 1.0, "short_factor": given, "long_factor": given, "factor": 1.0}
    rope |= {"original_max_position_embeddings": 64, "attention_factor": 1.0}
    config = LlamaConfig(head_dim=80, max_position_embeddings=64, rope_parameters=rope)
    for length in (8, 65):
        found, scaling = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=length)
        # One unit in the last place of fp32, where a frequency is not the inverse of another number.
        torch.testing.assert_close(found, whole[kept], rtol=1.2e-7 if divided else 0, atol=0)
        assert scaling == 1.0


def test_no_pairs_have_no_factors():
    assert factors(torch.empty(0)) == []
    nested = {"full_attention": {"rope_type": "longrope", "rope_theta": 1.0, "short_factor": [2.0]}}
    assert without_factors(nested) == {"full_attention": {"rope_type": "default", "rope_theta": 1.0}}
