"""Submissions: all mistakes at once, inputs below the roots only, outputs where the server puts them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from cook.base.errors import UserError, UserErrors
from cook.config.schema import load_schema
from cook.service.deepspeed_keys import refused_keys
from cook.service.paths import Roots, assign_paths
from cook.service.planner import Planner
from cook.service.submission import Submission, body_hash, check, problems
from tests.recipe.tiny_run import REPOSITORY
from tests.service.live import quick_plan, recipe

ALL = ("pretrain", "layer_mask", "att_mask", "ffn_mask")


@pytest.fixture
def body(tmp_path):
    return recipe(tmp_path / "inputs", ALL)


@pytest.fixture
def roots(tmp_path, body):
    return Roots([tmp_path / "inputs"])


def checked(body, roots, plan=quick_plan, **more):
    return check(Submission(**body), roots, plan, owner="me", **more)


def mistakes(body, roots, *overrides, **more) -> str:
    with pytest.raises(UserErrors) as refusal:
        checked(body | {"set": list(overrides)}, roots, **more)
    return "\n".join(problems(refusal.value))


def test_outputs_are_assigned_and_inputs_become_absolute(body, roots, tmp_path):
    body["config"]["output_dir"] = "/somewhere/else"
    body["config"]["data"]["cache_dir"] = "/tmp/cache"
    found = checked(body, roots)
    assert found.config["output_dir"] == "out" and found.config["data"]["cache_dir"] is None
    assert found.config["data"]["paths"] == [str(tmp_path / "inputs" / "docs")]
    assert found.scheme["fine-grained"]["heads_mask"] == "out/masks/heads.pt"
    assert found.scheme["coarse-grained"]["coarse_mask"] == found.scheme["fine-grained"]["coarse_mask"]
    assert found.config["pruning"]["l0_pruning"] == "l0_pruning.json"
    assert found.spec["plan"]["ranks"] == 1 and found.spec["owner"] == "me" and found.spec["environment"]


def test_all_mistakes_are_reported_at_once_and_nothing_is_written(body, roots, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    text = mistakes(
        body,
        roots,
        "training.steps=0",
        "data.paths=['/etc']",
        'data.paths=["/etc", "../secret"]',
        "tokenizer.path=/etc/passwd",
        "deepspeed=/etc/passwd",
        "nonsense",
        "more.keys=1",
        unfit=[UserError("gpus: too many")],
    )
    for part in ("training.steps", "data.paths.0", "data.paths.1", "tokenizer.path", "deepspeed", "more", "nonsense"):
        assert part in text
    assert "gpus: too many" in text and "root:x" not in text
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_outside_is_refused_in_the_same_words_whether_it_exists_or_not(body, roots):
    there, absent = (mistakes(body, roots, f"model.path={path}") for path in ("/etc/passwd", "/etc/passwd-not"))
    assert there == absent.replace("/etc/passwd-not", "/etc/passwd") and "outside" in there


@pytest.mark.parametrize("key", ["model.path", "tokenizer.path", "pattern.previous_mask", "distillation.teacher"])
def test_every_input_must_lie_below_a_root(body, roots, key):
    assert f"{key}: the path is outside" in mistakes(body, roots, f"{key}=/etc/hostname")


def test_all_paths_of_the_schemas_are_known_here():
    """A new setting that names a path must be assigned or checked, or a submission could name any file with it."""

    def paths(node, place=()):
        if node.get("format") == "path":
            yield ".".join(place)
        for key, below in node.get("properties", {}).items():
            yield from paths(below, (*place, key))
        if "items" in node:
            yield from paths(node["items"], (*place, "0"))

    outside = "/etc/hostname"
    named = {name: list(paths(load_schema(name))) for name in ("bmcook", "l0_pruning")}
    assert len(named["bmcook"]) == 15 and len(named["l0_pruning"]) == 8
    for file, keys in named.items():
        for key in set(keys) - {"deepspeed"}:  # it must be an object
            config: dict = {"data": {"type": "hub", "sources": [{"type": "hub"}]}, "stages": [], "pruning": {}}
            scheme: dict = {}
            node: object = config if file == "bmcook" else scheme
            *places, last = key.split(".")
            for number, place in enumerate(places):
                below: object = [] if [*places, last][number + 1 : number + 2] == ["0"] else {}
                node = node[0] if place == "0" else node.setdefault(place, below)  # type: ignore
            if last == "0":
                node.append(outside)  # type: ignore
            else:
                node[last] = outside  # type: ignore
            refused = assign_paths(config, scheme, Roots())
            assert refused or outside not in json.dumps([config, scheme]), key


def test_links_must_not_lead_out_of_the_roots(body, roots, tmp_path):
    inputs = tmp_path / "inputs"
    (tmp_path / "private.txt").write_text("secret")
    (inputs / "link.txt").symlink_to(tmp_path / "private.txt")
    assert "outside" in mistakes(body, roots, 'data.paths=["link.txt"]')
    assert "outside" in mistakes(body, roots, 'data.paths=["*.txt"]')
    (inputs / "docs" / "deep").mkdir()
    (inputs / "docs" / "deep" / "link.txt").symlink_to("../../../private.txt")
    text = mistakes(body, roots)
    assert "docs/deep/link.txt" in text
    (inputs / "docs" / "deep" / "link.txt").unlink()
    (inputs / "docs" / "deep" / "inside.txt").symlink_to(inputs / "docs" / "json.txt")
    (inputs / "other").symlink_to(inputs / "docs")
    found = checked(body | {"set": ['data.paths=["other"]']}, roots)
    assert found.config["data"]["paths"] == [str(inputs / "docs")]


def test_patterns_are_looked_up_below_the_roots(body, roots, tmp_path):
    found = checked(body | {"set": ['data.paths=["docs/*.txt"]']}, roots)
    assert found.config["data"]["paths"] == [str(tmp_path / "inputs" / "docs" / "*.txt")]
    for pattern in ("/etc/*", "docs/../../*", "../*"):
        assert "data.paths.0" in mistakes(body, roots, f'data.paths=["{pattern}"]')


def test_without_roots_only_data_of_the_program_is_read(body):
    assert "the server has no --root" in mistakes(body, Roots())
    found = checked(body | {"set": ["data.type=python_stdlib", "data.paths=[]"]}, Roots())
    assert found.config["data"]["type"] == "python_stdlib"


def test_hub_names_need_the_permission_of_the_server(body, roots, tmp_path):
    hub = ["data.type=hub", "data.paths=[]", "data.name=owner/texts"]
    assert "--allow-hub" in mistakes(body, roots, *hub)
    found = checked(body | {"set": hub}, Roots([tmp_path / "inputs"], allow_hub=True))
    assert found.config["data"]["name"] == "owner/texts" and found.spec["environment"] == {}
    for name in ("../up", "/etc", "a/../../b", "~/x"):
        assert "data.name" in mistakes(
            body, Roots([tmp_path / "inputs"], allow_hub=True), *hub[:2], f"data.name={name}"
        )


def test_masks_that_are_not_learned_are_inputs(tmp_path):
    body = recipe(tmp_path / "inputs", ("pretrain", "att_mask"))
    roots = Roots([tmp_path / "inputs"])
    mask = tmp_path / "inputs" / "layer.pt"
    mask.write_bytes(b"")
    body["scheme"]["fine-grained"]["coarse_mask"] = "layer.pt"
    found = checked(body, roots)
    assert found.scheme["fine-grained"]["coarse_mask"] == str(mask)
    assert found.scheme["fine-grained"]["heads_mask"] == "out/masks/heads.pt"
    assert found.scheme["fine-grained"]["dimff_mask"] == "out/masks/dimff.pt"  # it does not exist, and is not applied
    body["scheme"]["fine-grained"]["coarse_mask"] = "/etc/layer.pt"
    assert "fine-grained.coarse_mask" in mistakes(body, roots)


def test_a_teacher_of_an_earlier_stage_moves_with_the_output(body, roots):
    body["config"]["output_dir"] = "results/run"
    taught = ["distillation.ce_scale=1", "distillation.teacher=results/run/pretrain/model"]
    assert checked(body | {"set": taught}, roots).config["distillation"]["teacher"] == "out/pretrain/model"
    assert "outside" in mistakes(body, roots, taught[0], "distillation.teacher=results/run/../../../x")


@pytest.mark.parametrize(
    "deepspeed",
    [
        {"monitor": {}},
        {"tensorboard": {"enabled": True, "output_path": "/tmp/x"}},
        {"csv_monitor": {"enabled": True, "output_path": "/tmp/x"}},
        {"wandb": {"enabled": True}},
        {"flops_profiler": {"enabled": True, "output_file": "/tmp/x"}},
        {"autotuning": {"results_dir": "/tmp/x"}},
        {"comms_logger": {}},
        {"aio": {}},
        {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/tmp/x"}}},
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "nvme_path": "/tmp/x"}}},
        {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
        {"optimizer": {"params": {"lr": {"path": "/tmp/x"}}}},
        {"bf16": {"enabled": {"a": 1}}},
        {"x" * 10: 1},
    ],
)
def test_deepspeed_keys_that_write_files_are_refused(deepspeed, body, roots):
    text = mistakes(body, roots, f"deepspeed={json.dumps(deepspeed)}")
    assert "deepspeed." in text


def test_the_deepspeed_configurations_that_come_with_cook_are_accepted():
    for path in ("config/ds_config.json", "config/cpm_ant/ds_zero3_bf16.json"):
        assert list(refused_keys(json.loads((REPOSITORY / path).read_text()))) == []
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}}
    assert list(refused_keys(offload)) == []


@pytest.mark.parametrize("place", ["config", "scheme"])
def test_deep_nesting_is_refused(place, body, roots):
    deep: dict = {}
    for _ in range(500):
        deep = {"a": deep}
    with pytest.raises(ValidationError, match="nested"):
        Submission(**(body | {place: body[place] | {"deep": deep}}))
    change = f"{'coarse-grained.x' if place == 'scheme' else 'model.x'}={json.dumps(deep)}"
    assert "nested" in mistakes(body, roots, change)


@pytest.mark.parametrize(
    "change",
    [
        {"gpus": -1},
        {"gpus": 2, "processes": 3},
        {"executor": "ssh"},
        {"slurm": {"partition": "x"}},
        {"executor": "slurm", "slurm": {"wrap": "reboot"}},
        {"executor": "slurm", "slurm": {"partition": "x; reboot"}},
        {"executor": "slurm", "slurm": {"partition": "--wrap=reboot"}},
        {"executor": "slurm", "slurm": {"partition": "a\n"}},
        {"name": "a\nb"},
        {"name": "x" * 101},
        {"priority": "1"},
        {"unknown": 1},
    ],
)
def test_fields_that_do_not_fit_are_refused(change, body):
    with pytest.raises(ValidationError):
        Submission(**(body | change))


def test_the_hash_depends_on_the_content_only(body):
    again = json.loads(json.dumps(body))
    again["config"] = dict(reversed(list(again["config"].items())))
    assert body_hash(Submission(**body)) == body_hash(Submission(**again))
    assert body_hash(Submission(**body)) != body_hash(Submission(**(again | {"priority": 1})))


def test_a_planner_plans_in_another_process_and_survives_its_end(body, roots):
    planner = Planner()
    try:
        plan = checked(body, roots, planner).spec["plan"]
        assert [row["stage"] for row in plan["stages"]] == list(ALL)
        assert plan["output"] == "out" and plan["config"] == "bmcook.json"
        assert plan["stages"][1]["parameters_after"] < plan["stages"][1]["parameters_before"]
        assert checked(body, roots, planner).spec["reshape"] is True
        text = mistakes(body, roots, "training.steps=0", "model.path=/etc", plan=planner)
        assert "bmcook.json: wrong value at 'training.steps'" in text and "model.path" in text
        assert "cook-plan" not in text
        assert "no stages" in mistakes(body, roots, "stages=[]", plan=planner)
        assert planner._process is not None
        os.kill(planner._process.pid, 9)
        planner._process.wait()
        planner._timeout = 0.01  # the new process does not answer so fast
        text = mistakes(body, roots, "model.path=/etc", plan=planner)
        assert "planning failed" in text and "model.path" in text
    finally:
        planner.close()


def test_roots_must_exist(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Roots([tmp_path / "nothing"])
    assert Roots([tmp_path]).holds(tmp_path / "a") and not Roots([tmp_path]).holds(Path("/a\0b"))
