from __future__ import annotations

import pytest

from cook.adapters.registry import ADAPTERS, by_config, by_family
from cook.base.errors import UserError


def test_families_and_configs_find_their_adapter():
    for adapter in ADAPTERS:
        assert by_family(adapter.family) is adapter
        for model_type in adapter.model_types:
            assert by_config({"model_type": model_type}) is adapter
    assert by_config({"num_layers": 3}).family == "cpm_ant"  # CPM-Live's JSON has no such field
    claimed = [t for adapter in ADAPTERS for t in adapter.model_types]
    assert len(claimed) == len(set(claimed))


@pytest.mark.parametrize("model_type", ["llama", "", 3, ["cpmant"]])
def test_an_unknown_type_is_refused_with_the_known_ones(model_type):
    with pytest.raises(UserError, match="no adapter") as caught:
        by_config({"model_type": model_type})
    assert caught.value.wanted == "cook_cpm_ant, cpmant"


def test_an_unknown_family_is_refused():
    with pytest.raises(UserError, match="'cpm_bee'"):
        by_family("cpm_bee")
