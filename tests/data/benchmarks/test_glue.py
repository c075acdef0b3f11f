"""The nine GLUE tasks' files as distributed, with their peculiarities, and what malformed rows say."""

from __future__ import annotations

from pathlib import Path

import pytest

from cook.base.errors import UserError
from cook.data.benchmarks.glue import GLUE_TASKS, GlueRow, glue_task, read_glue

MNLI = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\t"
)
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
# A few lines in each distributed layout, and the rows they hold.
FILES: dict[str, tuple[str, list[GlueRow]]] = {
    "CoLA": (
        "gj04\t1\t\tOur friends won't buy it.\ngj04\t0\t*\tThey drank the pub.\n",
        [
            GlueRow(first="Our friends won't buy it.", second=None, target=1.0),
            GlueRow(first="They drank the pub.", second=None, target=0.0),
        ],
    ),
    "SST-2": (
        'sentence\tlabel\nan " open quote \t1\nno\u2028line \u0085ends here\t0\n',
        [
            GlueRow(first='an " open quote ', second=None, target=1.0),
            GlueRow(first="no\u2028line \u0085ends here", second=None, target=0.0),
        ],
    ),
    "MRPC": (
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t70\t71\tHe said "foo.\tSaid he\r\n',
        [GlueRow(first='He said "foo.', second="Said he", target=1.0)],
    ),
    "STS-B": (
        STSB + "0\tmain\tMSR\t2012\t0001\tnone\tnone\tA plane.\tAn air plane.\t4.250\n",
        [GlueRow(first="A plane.", second="An air plane.", target=4.25)],
    ),
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhy?\tHow?\t0\n402\t9\n5\t6\t7\tA?\tB?\t1\n",
        [GlueRow(first="Why?", second="How?", target=0.0), GlueRow(first="A?", second="B?", target=1.0)],
    ),
    "MNLI": (
        MNLI
        + "label1\tlabel2\tgold_label\n"
        + "0\t1\t1e\tf\tp\tp\tp\tp\tHe ran.\tHe moved.\tneutral\tentailment\tentailment\n"
        + "1\t1\t1n\tf\tp\tp\tp\tp\tHe ran.\tHe sat.\tneutral\tcontradiction\t-\n",
        [GlueRow(first="He ran.", second="He moved.", target=1.0)],
    ),
    "QNLI": (
        "index\tquestion\tsentence\tlabel\n0\tWho?\tThe king.\tnot_entailment\n",
        [GlueRow(first="Who?", second="The king.", target=1.0)],
    ),
    "RTE": (
        "index\tsentence1\tsentence2\tlabel\n0\tA b.\tB.\tentailment\n",
        [GlueRow(first="A b.", second="B.", target=0.0)],
    ),
    "WNLI": (
        "index\tsentence1\tsentence2\tlabel\n0\tThe cup fell.\tIt fell.\t1\n",
        [GlueRow(first="The cup fell.", second="It fell.", target=1.0)],
    ),
}


def written(folder: Path, text: str) -> Path:
    (folder / "x.tsv").write_bytes(text.encode())
    return folder / "x.tsv"


def test_all_nine_are_here():
    assert set(FILES) == set(GLUE_TASKS)


@pytest.mark.parametrize("name", FILES)
def test_a_file_as_distributed(tmp_path, name):
    text, rows = FILES[name]
    found = read_glue(GLUE_TASKS[name], written(tmp_path, text))
    assert list(found.rows) == rows
    reasons = {"QQP": "rows that the distribution has cut short", "MNLI": "rows without a gold label"}
    wanted = {reasons[name]: 1} if name in reasons else {}
    assert {reason: told["count"] for reason, told in found.left_out.record().items()} == wanted


@pytest.mark.parametrize(("text", "name"), [("sst2", "SST-2"), ("mnli", "MNLI"), ("STS_B", "STS-B"), ("cola", "CoLA")])
def test_names(text, name):
    assert glue_task(text).name == name
    with pytest.raises(UserError, match="unknown GLUE task"):
        glue_task(text + "x")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("SST-2", "sentence\tlabel\ngood\t1\nbad\n", "x.tsv, line 3: not a row of SST-2"),
        ("SST-2", "sentence\tlabel\ngo\tod\t1\n", "x.tsv, line 2: not a row"),
        ("SST-2", "sentence\tlabel\ngood\t2\n", "x.tsv, line 2: unknown label"),
        ("SST-2", "sentence\tlabel\n\ngood\t1\n", "x.tsv, line 2: not a row"),
        ("SST-2", "text\tlabel\ngood\t1\n", "x.tsv, line 1: no column 'sentence'"),
        ("SST-2", "sentence\tlabel\n", "holds no row"),
        ("SST-2", "", "the file is empty"),
        ("CoLA", "gj04\t1\t\tgood\ngj04\t1\n", "x.tsv, line 2: not a row of CoLA"),
        ("STS-B", STSB + "0\tm\tM\t2\t1\tn\tn\tA\tB\tfour\n", "x.tsv, line 2: not a score"),
        ("STS-B", STSB + "0\tm\tM\t2\t1\tn\tn\tA\tB\tnan\n", "x.tsv, line 2: not a score"),
        ("STS-B", STSB + "0\tm\tM\t2\t1\tn\tn\tA\tB\t5.1\n", "x.tsv, line 2: not a score"),
        ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\ta\tb\tmaybe\n", "line 2: unknown label"),
    ],
)
def test_a_malformed_file_is_told_with_its_line(tmp_path, name, text, reason):
    with pytest.raises(UserError, match=reason):
        read_glue(GLUE_TASKS[name], written(tmp_path, text))


def test_bad_utf8_and_no_file(tmp_path):
    path = written(tmp_path, "sentence\tlabel\n")
    path.write_bytes(b"sentence\tlabel\ngood\t1\nb\xff\t0\n")
    with pytest.raises(UserError, match="line 3: not UTF-8 at byte 1"):
        read_glue(GLUE_TASKS["SST-2"], path)
    with pytest.raises(UserError, match="download_glue_data"):
        read_glue(GLUE_TASKS["SST-2"], tmp_path / "none.tsv")
