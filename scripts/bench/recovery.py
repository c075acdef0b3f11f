"""What finetuning restores per minute: all weights or LoRA (peft), with and without the dense model as teacher.

    pip install peft
    python scripts/bench/recovery.py --model SMOLLM2_FOLDER --calibration valid.txt --text wikitext2=test.txt …

Texts are those of `quality.py`. Gates with one budget for all blocks, a teacher and means as biases remove `--share` of
the FFN dimensions (`--masks` for a file that `quality.py` left in its work folder), the model is reshaped, and each
method trains the small model for the same number of minutes: AdamW, rates that fall to 0 with the time that is left.
LoRA is as LLM-Pruner uses it for recovery: rank 8, scale 2, on every linear layer. Run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import publish
from quality_gates import TRAINED, mean_inputs, trained_masks
from quality_rig import Rig, settings_of, text_parser, with_texts

import cook
from cook.base.files import read_json, write_json
from cook.distill.teacher_loss import token_divergence
from cook.families.source import load_model, with_biases
from cook.pruning.compensation import with_bias

RATES = {"all weights": 5e-5, "LoRA": 1e-3}
TEMPERATURE = 2.0


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    rig = Rig(options)
    small, teacher = pruned(rig, work / "masks.pt"), load_model(rig.source, torch.bfloat16).requires_grad_(False)
    done: dict[str, Any] = read_json(work / "runs.json") if (work / "runs.json").exists() else {}
    for name, model in (("dense", teacher), ("pruned", small())):
        if name not in done:
            done[name] = {"losses": losses(rig, model)}
            write_json(work / "runs.json", done)
    for minutes in options.minutes:
        for method in options.methods:
            name = f"{method}, {minutes:g} min"
            if name not in done:
                done[name] = {"method": method, "minutes": minutes} | recovered(rig, small(), teacher, method, minutes)
                write_json(work / "runs.json", done)
                print(f"{name}: {done[name]}", flush=True)
    report(options, done)


def pruned(rig: Rig, path: Path) -> Callable[[], torch.nn.Module]:
    """A function that makes the reshaped model, in fp32, with the means of removed dims as biases."""
    options, groups = rig.options, rig.groups("dims")
    file = Path(options.masks) if options.masks else path
    if not file.exists():
        training = TRAINED["compensated gates, global"]
        torch.save(trained_masks(rig, training, "dims", options.share, options.steps)[0], file)
    masks, means = torch.load(file, weights_only=True), mean_inputs(rig, groups)
    wide = with_biases(rig.source)
    space = wide.adapter.space(wide.config)
    weights = dict(with_bias(wide.tensors.items(), space, masks, means))
    return lambda: cook.reshape(load_model(replace(wide, tensors=weights), torch.float32), masks)


def recovered(
    rig: Rig, model: torch.nn.Module, teacher: torch.nn.Module, method: str, minutes: float
) -> dict[str, Any]:
    """Trains a model for some minutes; its losses, and the tokens and parameters that were trained."""
    weights, _, taught = method.partition(" + ")
    if weights == "LoRA":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))  # type: ignore[arg-type]
    else:
        model.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = RATES[weights]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    tokens, spent = 0, 0.0
    model.train()
    for ids in batches(rig):
        if spent >= 60 * minutes:
            break
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (spent + 1) / 10) * (1 - spent / (60 * minutes))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].flatten()
        loss = F.cross_entropy(logits.float(), targets)
        if taught:
            with torch.no_grad():
                wanted = teacher(input_ids=ids).logits[:, :-1].flatten(0, 1)
            loss = loss + 2 * token_divergence(logits, wanted, targets, TEMPERATURE) / len(logits)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        tokens, spent = tokens + ids.numel(), spent + time.perf_counter() - started
        rig.say(f"{method}: {int(spent)} of {60 * minutes:g} seconds, loss {float(loss.detach()):.3f}")
    return {
        "tokens": tokens,
        "trained parameters": sum(parameter.numel() for parameter in trained),
        "losses": losses(rig, model.eval()),
    }


def batches(rig: Rig) -> Iterator[torch.Tensor]:
    """Calibration batches after those that the gates saw, without end."""
    step = rig.options.steps
    while True:
        yield rig.batch(step, rig.options.seed)
        step += 1


@torch.no_grad()
def losses(rig: Rig, model: torch.nn.Module) -> dict[str, float]:
    """The loss of a model on every text, nats per token."""
    found = {}
    for name, windows in rig.texts.items():
        total = 0.0
        for part in windows.split(4):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=part).logits[:, :-1].flatten(0, 1)
            total += float(F.cross_entropy(logits.float(), part[:, 1:].flatten())) * len(part)
        found[name] = total / len(windows)
    return found


def report(options: argparse.Namespace, done: dict[str, Any]) -> None:
    rows = []
    for name, run in done.items():
        first = next(iter(run["losses"]))
        rows.append(
            {
                "method": run.get("method", name),
                "minutes": run.get("minutes", 0),
                "tokens": run.get("tokens", 0),
                "trained parameters": run.get("trained parameters", 0),
                f"perplexity, {first}": math.exp(run["losses"][first]),
                **{f"loss, {text}": loss for text, loss in run["losses"].items()},
            }
        )
    publish("recovery", settings_of(options) | {"rates": RATES}, rows, options.output)


def parse() -> argparse.Namespace:
    parser = text_parser(__doc__)
    names = [f"{weights}{taught}" for weights in RATES for taught in ("", " + teacher")]
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 4])
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--masks", help="a file of masks; none are learned then")
    parser.add_argument("--steps", type=int, default=50, help="of learning masks")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--work", default="results/recovery")
    return with_texts(parser.parse_args())


if __name__ == "__main__":
    main()
