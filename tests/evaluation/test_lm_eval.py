"""lm-evaluation-harness loads an export by itself, in a process that cannot see cook, and finds the masked model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from cook.export.pruned_folder import mask_model, prune_to_folder
from cook.families.source import load_model
from tests.evaluation.conftest import WORDS, write_tokenizer
from tests.tiny_families import tiny_source
from tests.tiny_pruning import random_masks
from tests.tiny_pruning import tiny_source as own_source

HARNESS = """
    import importlib.util, json, sys
    assert importlib.util.find_spec("cook") is None
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = []
    for folder in sys.argv[1:]:
        got = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": folder, "trust_remote_code": True, "dtype": "float32", "max_length": 64},
            tasks=["choose", "continue"],
            task_manager=TaskManager(include_path=folder + "_tasks", include_defaults=False),
            device="cpu", batch_size=2, bootstrap_iters=0, log_samples=True,
        )
        answers = [[answer[0][0] for answer in sample["resps"]] for sample in got["samples"]["choose"]]
        found.append({"results": got["results"], "answers": answers})
    print(json.dumps(found, default=str))
"""
TASK = """
    task: {name}
    dataset_path: json
    dataset_kwargs: {{data_files: {{test: {file}}}}}
    test_split: test
    output_type: {kind}
    doc_to_text: question
    doc_to_target: gold
"""
CHOOSE = "doc_to_choice: choices\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
CONTINUE = (
    "generation_kwargs: {until: [never], max_gen_toks: 4}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
)
CHOICES = [[7, 8], [30], [11, 2]]


def spelled(ids):
    return " ".join(WORDS[i] for i in ids)


@torch.no_grad()
def log_likelihood(model, question, answer):
    logits = model(input_ids=torch.tensor([[*question, *answer]])).logits[0].double()
    scores = torch.log_softmax(logits, -1)[len(question) - 1 : -1]
    return float(scores[range(len(answer)), answer].sum())


@torch.no_grad()
def continuation(model, ids, count):
    for _ in range(count):
        ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def masked_and_small(path, source):
    """A masked model, and the folder of what it was reshaped to."""
    space = source.adapter.space(source.config)
    masks = random_masks(space, 2)
    folder = prune_to_folder(source, space, masks, path).folder
    assert json.loads((folder / "config.json").read_text())["auto_map"], "the export is to be a ragged one"
    write_tokenizer(folder, eos_token="w0")
    model = load_model(source)
    mask_model(model, space, masks)
    return model, folder


def write_task(path: Path, name: str, kind: str, rest: str, items: list[dict]) -> None:
    path.mkdir(exist_ok=True)
    file = path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    (path / f"{name}.yaml").write_text(textwrap.dedent(TASK).format(name=name, file=file, kind=kind) + rest)


def write_tasks(model, path):
    """Two tasks, and what the harness must find of this model: log-likelihoods of the choices, and both scores."""
    questions = [[i + 3, 2 * i + 9, 4, 50 - i][: 2 + i % 3] for i in range(6)]
    wanted = [[log_likelihood(model, question, answer) for answer in CHOICES] for question in questions]
    choices = [spelled(answer) for answer in CHOICES]
    items = [{"question": spelled(q), "choices": choices, "gold": i % 3} for i, q in enumerate(questions)]
    write_task(path, "choose", "multiple_choice", CHOOSE, items)
    golds = [spelled(continuation(model, question, 4)) for question in questions]
    items = [{"question": spelled(q), "gold": gold} for q, gold in zip(questions, golds, strict=True)]
    items[0]["gold"] = "w1 w1 w1 w1"
    write_task(path, "continue", "generate_until", CONTINUE, items)
    return wanted, sum(scores.index(max(scores)) == i % 3 for i, scores in enumerate(wanted)) / 6, 5 / 6


def test_the_harness_sees_the_masked_models(tmp_path):
    _, own = own_source(tmp_path / "dense")
    expected, folders = [], []
    for name, source in (("own", own), ("llama", tiny_source("llama"))):
        model, folder = masked_and_small(tmp_path / name, source)
        expected.append(write_tasks(model, tmp_path / f"{name}_tasks"))
        folders.append(str(folder))
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HARNESS), *folders],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for (wanted, accuracy, matches), got in zip(expected, found, strict=True):
        for answers, right in zip(got["answers"], wanted, strict=True):
            # float32 log-softmax, two terms.
            assert [float(number) for number in answers] == pytest.approx(right, abs=1e-4)
        assert got["results"]["choose"]["acc,none"] == pytest.approx(accuracy)
        assert got["results"]["continue"]["exact_match,none"] == pytest.approx(matches)
