"""Tables of every kind, whole and broken; nothing is downloaded."""

import json

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from cook.base.errors import UserError
from cook.data.corpus import open_corpus

ROWS = {"text": ["one", "two é\n", "three"], "n": [1, 2, 3]}


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def table():
    return datasets.Dataset.from_dict(ROWS)


def read(corpus):
    return [(document.name, document.text) for document in corpus.documents()]


def test_parquet(table, tmp_path):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    table.to_parquet(tmp_path / "data" / "a.parquet")
    table.to_parquet(tmp_path / "data" / "sub" / "b.parquet")
    corpus = open_corpus("parquet", [str(tmp_path / "data")])
    assert read(corpus) == [
        (f"{file}:{n}", t) for file in ("a.parquet", "sub/b.parquet") for n, t in enumerate(ROWS["text"])
    ]
    assert [item.values for item in corpus.objects()][:3] == [
        dict(zip(ROWS, row, strict=True)) for row in zip(*ROWS.values(), strict=True)
    ]
    assert corpus.fingerprint() != open_corpus("parquet", [str(tmp_path / "data")], text_field="n").fingerprint()


def test_an_arrow_folder_and_one_of_its_splits(table, tmp_path):
    table.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": table, "test": table.select([2])}).save_to_disk(tmp_path / "split")
    wanted = [(f"plain:{n}", text) for n, text in enumerate(ROWS["text"])]
    assert read(open_corpus("arrow", [str(tmp_path / "plain")])) == wanted
    assert read(open_corpus("arrow", [str(tmp_path / "split")], split="test")) == [("test:0", "three")]
    with pytest.raises(UserError, match="no split 'dev'"):
        open_corpus("arrow", [str(tmp_path / "split")], split="dev")
    with pytest.raises(UserError, match="not a folder that save_to_disk wrote"):
        open_corpus("arrow", [str(tmp_path)])


def test_a_folder_laid_out_like_a_dataset_of_the_hub(tmp_path):
    (tmp_path / "hub").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ROWS["text"])
    (tmp_path / "hub" / "train.jsonl").write_text(lines)
    first = open_corpus("hub", name=str(tmp_path / "hub"))
    assert [text for _, text in read(first)] == ROWS["text"]
    assert open_corpus("hub", name=str(tmp_path / "hub")).fingerprint() == first.fingerprint()
    (tmp_path / "hub" / "train.jsonl").write_text(lines.replace("one", "uno"))
    assert open_corpus("hub", name=str(tmp_path / "hub")).fingerprint() != first.fingerprint()
    for name, split in (("owner/missing", "train"), (str(tmp_path / "hub"), "dev")):
        with pytest.raises(UserError, match="cannot be opened"):
            open_corpus("hub", name=name, split=split)


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty"])
@pytest.mark.filterwarnings("ignore")
def test_a_broken_parquet_file_is_named(table, tmp_path, damage):
    table.to_parquet(tmp_path / "a.parquet")
    raw = (tmp_path / "a.parquet").read_bytes()
    broken = {"cut": raw[:-9], "flipped": raw[:8] + bytes(40) + raw[48:], "text": b"no table at all", "empty": b""}
    (tmp_path / "a.parquet").write_bytes(broken[damage])
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as parquet at row 0"):
        read(open_corpus("parquet", [str(tmp_path / "a.parquet")]))


@pytest.mark.parametrize(
    ("rows", "field", "message"),
    [
        ({"text": ["a", None]}, "text", "row 1: 'text' is not a string"),
        ({"body": ["a"]}, "text", "row 0: the object has no key 'text'\n  got:    'body'"),
        ({"text": [1, 2]}, "text", "row 0: 'text' is not a string"),
    ],
)
def test_a_row_without_text_is_named(tmp_path, rows, field, message):
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError) as caught:
        read(open_corpus("parquet", [str(tmp_path / "a.parquet")], text_field=field))
    assert f"a.parquet, {message}" in str(caught.value)


@pytest.mark.parametrize("count", [1, 300])
@pytest.mark.slow
def test_a_parquet_file_that_unpacks_to_many_times_its_size_is_refused(tmp_path, count):
    table = pyarrow.table({"text": ["a" * ((300 << 20) // count)] * count})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(UserError, match=r"a\.parquet: row group 0 of the column 'text' unpacks to many times its size"):
        read(open_corpus("parquet", [str(tmp_path / "a.parquet")]))


def test_a_parquet_file_with_a_deep_schema_is_refused(tmp_path):
    deep = pyarrow.string()
    for _ in range(2000):
        deep = pyarrow.struct([("a", deep)])
    table = pyarrow.table({"text": pyarrow.array(["x"]), "deep": pyarrow.nulls(1, deep)})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="nested"):
        read(open_corpus("parquet", [str(tmp_path / "a.parquet")]))


def test_a_text_that_is_too_long_is_named_with_its_row(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a", "b" * (17 << 20)]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 1: 'text' is too long"):
        read(open_corpus("parquet", [str(tmp_path / "a.parquet")]))
