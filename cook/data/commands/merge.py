"""Several folders of binary data to one, in their order.

Files of one version and block size are copied as they are; otherwise the records are written anew, in the format of the
first folder or in the one that is asked for.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cook.data.commands import common
from cook.data.cpm_live.meta import FileInfo, LiveMeta, read_meta, write_meta
from cook.data.progress import Progress


def merge(sources: Sequence[Path], output: Path, *, version: int | None) -> None:
    """Merges folders into a new one; version None: that of the first folder.

    Raises:
        UserError: a source is not a folder of binary data, or the output is not empty.
    """
    metas = [read_meta(folder) for folder in sources]
    version = version or metas[0].version
    block_size = metas[0].files[0].block_size
    assert block_size is not None
    folder = common.new_folder(output)
    shown = [(meta, file) for meta in metas for file in meta.shown]
    same = all(meta.version == version and file.block_size == block_size for meta, file in shown)
    with Progress("merging", sum(file.nbytes for _, file in shown), unit="MB", scale=1e6) as progress:
        if same:
            infos = _copy(shown, folder, version, progress)
        else:
            records = (values for meta in metas for values in common.all_numbers(meta, progress))
            infos = common.write_folder(folder, records, version=version, block_size=block_size)
    how = "copied" if same else f"written anew in version {version}"
    print(f"{folder}: {sum(info.nlines for info in infos)} records in {len(infos)} file(s), {how}")


def _copy(files: Sequence[tuple[LiveMeta, FileInfo]], folder: Path, version: int, progress: Progress) -> list[FileInfo]:
    infos: list[FileInfo] = []
    begin, taken = 0, set()
    for meta, file in files:
        name, number = file.file_name, 1
        while name in taken:
            number += 1
            name = f"{file.file_name}-{number}"
        taken.add(name)
        shutil.copyfile(meta.folder / file.file_name, folder / name)
        end = begin + file.num_blocks
        infos.append(replace(file, file_name=name, block_begin=begin, block_end=end))
        begin = end
        progress.advance(file.nbytes)
    write_meta(folder, version, infos)
    return infos
