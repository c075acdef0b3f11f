"""Task rows over records that are given as lists of numbers."""

import numpy as np
import pytest

from cook.base.files import write_json
from cook.data.cpm_live.dataset import open_live
from cook.data.cpm_tasks.task_rows import TaskRows, pack_records
from tests.data.cpm_live import reference


@pytest.fixture(scope="session")
def make_rows(tmp_path_factory):
    """Writes records as binary data, packs them, opens the rows."""

    def make(records, *, max_length, prompt_length, seed=0, choice_token=None):
        root = tmp_path_factory.mktemp("tasks")
        arrays = [np.array(record, np.int64) for record in records]
        reference.write_folder(root / "live", {"x": arrays}, version=1, block_size=1 << 12)
        data = open_live([root / "live"], root / "cache", workers=1)
        folder = root / "rows"
        folder.mkdir()
        statistics = pack_records(
            data,
            np.arange(len(data)),
            max_length=max_length,
            prompt_length=prompt_length,
            folder=folder,
            part="train",
        )
        files = {path.name: path.stat().st_size for path in folder.iterdir()}
        facts = {"fingerprint": "f", "max_length": max_length, "prompt_length": prompt_length, "files": files}
        write_json(folder / "manifest.json", facts)
        return TaskRows(data, folder, "train", seed=seed, choice_token=choice_token), statistics

    return make
