from urllib.parse import unquote

from cook.report.report import Figure, write_report
from cook.report.tables import LadderRow, ladder_table

ROW = LadderRow(
    model="m",
    att_layers=1,
    ffn_layers=1,
    heads="4",
    dim_ff="8",
    parameters=10,
    held_out_loss=1.0,
    tokens_per_second=2.0,
)


def test_the_report_has_the_table_and_links_that_lead_to_the_figures(tmp_path):
    image = tmp_path / "figures of a run" / "loss.png"
    image.parent.mkdir()
    image.write_bytes(b"png")
    path = write_report(
        tmp_path / "new" / "report", [ROW], [Figure(caption="Loss.", path=image)], title="A run", notes=["On one CPU."]
    )
    text = path.read_text()
    assert path.name == "report.md" and text.startswith(f"# A run\n\n{ladder_table([ROW])}\n\nOn one CPU.\n\n![Loss.](")
    link = text.split("![Loss.](")[1].split(")")[0]
    assert " " not in link
    assert (path.parent / unquote(link)).read_bytes() == b"png"


def test_a_relative_folder_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    path = write_report("out", [ROW], [Figure(caption="c", path=Path("out/f.png"))])
    assert "![c](f.png)" in path.read_text()
