from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cook.base.errors import UserError
from cook.base.files import sha256, write_json
from cook.families.source import load_model
from cook.recipe.sources import check_masks
from cook.recipe.summary import sample_batches
from tests.tiny_families import FAMILIES, tiny_source


def test_a_mask_that_another_run_wrote_over_is_refused(tmp_path):
    mask = tmp_path / "heads.pt"
    mask.write_bytes(b"of this run")
    write_json(tmp_path / "done.json", {"masks": {str(mask): sha256(mask)}})
    stage: Any = SimpleNamespace(name="att_mask", done=tmp_path / "done.json")
    check_masks(stage)
    mask.write_bytes(b"of another")
    with pytest.raises(UserError, match="not the mask that att_mask was trained with"):
        check_masks(stage)
    mask.unlink()
    with pytest.raises(UserError, match=r"heads\.pt"):
        check_masks(stage)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("positions", [6, 20, 500])
def test_random_rows_are_no_longer_than_the_model_has_positions(name, positions):
    field = "n_positions" if name.startswith("gpt2") else "max_position_embeddings"
    source = tiny_source(name, **{field: positions})
    batches, what = sample_batches(None, source)
    model = load_model(source)
    with torch.no_grad():
        for batch in batches:
            # An embedding table that is too short raises.
            logits = model(**{key: value for key, value in batch.items() if key != "targets"}).logits
            assert logits.isfinite().all() and 1 <= logits.shape[1] <= min(128, positions)
    assert what == f"{len(batches)} rows of random ids" and len(batches) > 1
