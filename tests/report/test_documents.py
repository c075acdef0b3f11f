import dataclasses
from urllib.parse import unquote

import pytest
import yaml
from huggingface_hub import ModelCard as HubCard

from cook.report.documents import Figure, MaskFile, ModelCard, model_card, write_report
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


ROWS = [
    LadderRow(
        model=name,
        att_layers=8,
        ffn_layers=8,
        heads="4",
        dim_ff="350",
        parameters=7_421_952,
        held_out_loss=4.2,
        tokens_per_second=None,
    )
    for name in ("dense", "small")
]
CARD = ModelCard(
    name="CPM-Ant small",
    rows=ROWS,
    base_model="openbmb/cpm-ant-10b",
    license="apache-2.0",
    license_note="The corpus is under its own terms.",
    languages=("zh", "no"),
    training_data="Sources and prose of a standard library.",
    commands=("bash scripts/prune_cpm_ant.sh", "python do_prune.py --verify"),
    masks=(MaskFile(name="layer_mask.pt", sha256="ab" * 32),),
    trust_remote_code=True,
    max_difference=2.34e-6,
    difference_note="fp32, 4 batches",
    versions=(("torch", "2.13.0"),),
)


def front_matter(text):
    assert text.startswith("---\n")
    return yaml.safe_load(text[4:].split("\n---\n")[0])


def test_the_front_matter_is_what_the_hub_reads():
    assert front_matter(model_card(CARD)) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": ["zh", "no"],  # Norwegian, not YAML's false
        "base_model": "openbmb/cpm-ant-10b",
        "tags": ["pruned", "structured-pruning"],
    }
    data = HubCard(model_card(CARD)).data
    assert data.base_model == "openbmb/cpm-ant-10b" and data.language == ["zh", "no"]


@pytest.mark.parametrize("base", [None, "/data/my model", "a CPM-Ant of 8 layers", "./x/y/z"])
def test_only_a_hub_name_becomes_base_model(base):
    text = model_card(dataclasses.replace(CARD, base_model=base))
    assert "base_model" not in front_matter(text)
    assert (base or "trained from scratch") in text


def test_the_body_says_all_that_is_known():
    text = model_card(CARD)
    for part in (
        "# CPM-Ant small",
        ladder_table(ROWS),
        f"- `layer_mask.pt`: sha256 `{'ab' * 32}`",
        "```bash\nbash scripts/prune_cpm_ant.sh\npython do_prune.py --verify\n```",
        'AutoModelForCausalLM.from_pretrained("PATH/TO/THIS/FOLDER", trust_remote_code=True)',
        "(fp32, 4 batches): largest relative difference of their outputs 2.34e-06.",
        "## Licence\n\n`apache-2.0`. The corpus is under its own terms.\n",
        "torch 2.13.0",
        "Sources and prose of a standard library.",
    ):
        assert part in text


def test_what_is_unknown_is_left_out_or_said():
    text = model_card(ModelCard(name="x", rows=(), license="mit", trust_remote_code=False))
    assert "trust_remote_code" not in text and "no code from the folder is run" in text
    assert "were not compared" in text
    assert not any(title in text for title in ("## Masks", "## Data", "## How it was made", "Versions", "None"))


def test_values_cannot_break_the_card():
    text = model_card(dataclasses.replace(CARD, license="x: y\n---\n#", commands=("echo ```",)))
    assert front_matter(text)["license"] == "x: y\n---\n#"
    assert "````bash\necho ```\n````" in text


def test_the_card_warns_of_programs_that_misread_the_folder():
    text = model_card(dataclasses.replace(CARD, misread_by=("one assumes a, which does not hold here: b", "two")))
    assert "- Warning: one assumes a, which does not hold here: b.\n- Warning: two.\n\n## Verification" in text
    assert "Warning" not in model_card(CARD)
