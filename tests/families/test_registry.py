from __future__ import annotations

import dataclasses

import pytest

from cook.base.errors import UserError
from cook.families import registry
from cook.families.registry import adapters, by_config, knows, register, unregister


def test_configs_find_their_adapter():
    for adapter in adapters():
        for model_type in adapter.model_types:
            assert by_config({"model_type": model_type}) is adapter
            assert by_config({"model_type": "cook_ragged", "stock_type": model_type}) is adapter
    assert by_config({"num_layers": 3}).family == "CPM-Ant"  # CPM-Live's JSON has no such field
    claimed = [t for adapter in adapters() for t in adapter.model_types]
    assert len(claimed) == len(set(claimed))


@pytest.mark.parametrize("model_type", ["no_such_family", "", 3, ["cpmant"]])
def test_an_unknown_type_is_refused_with_the_known_ones_and_what_an_adapter_needs(model_type):
    assert not knows({"model_type": model_type})
    with pytest.raises(UserError, match="no adapter") as caught:
        by_config({"model_type": model_type})
    assert {"cook_cpm_ant", "cpmant", "llama"} <= set(caught.value.wanted.split(", "))
    assert "registry.register" in caught.value.remedy and "Family" in caught.value.remedy


def test_a_family_from_outside():
    types = frozenset({"mine", "llama"})
    own = dataclasses.replace(by_config({"model_type": "llama"}), family="Mine", model_types=types)
    register(own)
    try:
        assert by_config({"model_type": "mine"}) is own and by_config({"model_type": "llama"}) is own
    finally:
        unregister(own)
    assert by_config({"model_type": "llama"}).family == "Llama, SmolLM2" and registry._added == []
