from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cook.base.errors import UserError
from cook.base.files import sha256, write_json
from cook.recipe.summary import check_masks


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
