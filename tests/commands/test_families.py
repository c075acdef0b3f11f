"""`cook families guess` on models that transformers saved, and tables that are wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from transformers import CONFIG_MAPPING, PersimmonConfig, PersimmonForCausalLM

from cook.commands.families import check
from cook.families.decoder_tables import OLMO2
from cook.families.guess import guess
from cook.families.tables import PHI3
from tests.command import told


def test_a_folder_of_an_unknown_family_gets_a_table_that_is_exact(tmp_path, capsys):
    config = PersimmonConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20
    )
    PersimmonForCausalLM(config).save_pretrained(tmp_path)
    code, out, _ = told(capsys, "families", "guess", tmp_path, "--json")
    facts = json.loads(out.splitlines()[-1])  # a library that loads on first use may print a warning
    assert code == 0 and facts["exact"] and facts["model_type"] == "persimmon" and facts["known_as"] is None
    assert "interleaved=True" in facts["table"]
    rows = {row["removed"]: row for row in facts["check"]}
    assert set(rows) == {"blocks", "heads", "FFN dimensions", "head dimensions", "hidden dimensions", "everything"}
    assert all(row["difference"] <= 1e-5 and not row["problem"] for row in rows.values())
    assert rows["FFN dimensions"]["result"] == "stock" and rows["heads"]["result"] == "remote code"


def test_a_family_of_which_a_kind_is_not_exact_ends_with_1(capsys):
    code, out, _ = told(capsys, "families", "guess", "xglm")
    assert code == 1 and "WRONG" in out and "Family(" in out and "Correct the table" in out


def test_a_config_without_its_type_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"hidden_size": 32}')
    code, _, err = told(capsys, "families", "guess", tmp_path)
    assert code == 2 and "a JSON object with model_type" in err


def test_a_known_family_is_named(capsys):
    code, out, _ = told(capsys, "families", "guess", "olmo2")
    assert code == 0 and out.strip() == "olmo2: known as OLMo 2"


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "there is no such model"), ("[]", "not a model's config"), ('{"model_type": "vit"}', "no language model")],
)
def test_what_is_no_model_is_refused_in_plain_words(content, problem, tmp_path, capsys):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    code, out, err = told(capsys, "families", "guess", file)
    assert code == 2 and problem in err and "Traceback" not in out + err


@pytest.mark.parametrize(
    "table, kind",
    [
        (replace(PHI3, attention=replace(PHI3.attention, remembers={})), "everything"),
        (replace(OLMO2, attention=replace(OLMO2.attention, q_norm="", k_norm="")), "heads"),
        (replace(OLMO2, ffn=replace(OLMO2.ffn, ins=("mlp.up_proj",))), "FFN dimensions"),
    ],
    ids=["phi3", "olmo2", "olmo2, gate"],
)
def test_a_wrong_table_is_found_out(table, kind):
    config = CONFIG_MAPPING[next(iter(table.model_types))]().to_dict()
    rows = check(table, guess(config).config)
    assert [row["result"] for row in rows if row["removed"] == kind] == ["WRONG"]
