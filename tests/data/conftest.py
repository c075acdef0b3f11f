"""Rows without a corpus: packed in memory from lists of ids."""

import numpy as np
import pytest

import cook.data.packing as packing
from cook.base.files import write_json


@pytest.fixture(scope="session")
def make_rows(tmp_path_factory):
    """Packs documents (lists of ids) as samples that begin with `start_id` and end with 3, and opens the result."""

    def make(documents, *, max_length, prompt_length, start_id=2):
        folder = tmp_path_factory.mktemp("rows")
        tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
        offsets = np.cumsum([0, *map(len, documents)])
        statistics = packing.pack_to_folder(
            tokens,
            offsets,
            row_size=max_length - prompt_length,
            start_id=start_id,
            eos_id=3,
            folder=folder,
            part="train",
        )
        if not statistics["rows"]:
            return None, statistics
        files = {path.name: path.stat().st_size for path in folder.iterdir()}
        write_json(folder / "manifest.json", {"fingerprint": "f", "files": files})
        return packing.open_rows(folder, "train", prompt_length), statistics

    return make
