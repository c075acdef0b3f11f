"""Markdown documents: the report of a run, and the model card of an exported folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from cook.base.files import write_atomically
from cook.report.tables import LadderRow, human_count, ladder_table

REPORT_NAME = "report.md"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An image of the report."""

    caption: str
    """One sentence below the image."""
    path: Path
    """The image file. The report uses a relative link."""


def write_report(
    folder: str | Path,
    rows: Sequence[LadderRow],
    figures: Sequence[Figure] = (),
    *,
    title: str = "Report",
    notes: Sequence[str] = (),
) -> Path:
    """Writes `folder/report.md` and returns its path.

    Args:
        folder: The folder to write to. Made if missing.
        rows: The models, the dense model first.
        figures: Shown below the table, in this order.
        title: The title of the report.
        notes: Paragraphs between the table and the figures.
    """
    path = Path(folder) / REPORT_NAME
    parts = [f"# {title}", ladder_table(rows), *notes]
    for figure in figures:
        link = quote(Path(os.path.relpath(figure.path.resolve(), path.parent.resolve())).as_posix())
        parts.append(f"![{figure.caption}]({link})\n\n{figure.caption}")
    write_atomically(path, "\n\n".join(parts) + "\n")
    return path


_LOSS_NOTE = (
    "Held-out loss is the mean over tokens, in nats, of text kept out of training. "
    "Speeds compare only within this table."
)
# The form of `base_model` in the front matter: a model's name on the Hub. A local path does not belong there.
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_PLACEHOLDER = "PATH/TO/THIS/FOLDER"


@dataclass(frozen=True, kw_only=True)
class MaskFile:
    """A mask file that was applied to the model."""

    name: str
    """The file name."""
    sha256: str
    """SHA-256 of the content, hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """The content of a model card."""

    name: str
    """The model's name, used as the title of the card."""
    rows: Sequence[LadderRow]
    """The compared models: the dense model first, this model last."""
    base_model: str | None = None
    """A model's name on the Hub ("owner/name") or a description of the dense model. None: trained from scratch."""
    license: str
    """The licence's identifier on Hugging Face, such as "apache-2.0". "other" if it is not on their list."""
    license_note: str | None = None
    """A note about the licence of the weights or of the data."""
    languages: Sequence[str] = ()
    """ISO 639-1 codes of the training text."""
    training_data: str | None = None
    """A sentence about the corpus."""
    commands: Sequence[str] = ()
    """The commands that made the model, in order."""
    masks: Sequence[MaskFile] = ()
    """The masks that were applied."""
    auto_class: str = "AutoModelForCausalLM"
    """The transformers class that loads the model."""
    pipeline: str = "text-generation"
    """The pipeline tag for the Hub."""
    active_parameters: int | None = None
    """Parameters that a token uses, if the FFN blocks are mixtures of experts. None: all."""
    trust_remote_code: bool
    """Whether transformers needs the modeling file in the folder to load the model."""
    misread_by: Sequence[str] = ()
    """One sentence per program that would load the folder incorrectly."""
    max_difference: float | None = None
    """Largest relative difference between the outputs of the masked and the reshaped model. None: not measured."""
    difference_note: str = ""
    """How it was measured, such as "fp32, 4 batches of 8 × 128 held-out tokens"."""
    versions: Sequence[tuple[str, str]] = ()
    """Libraries and their versions."""


def model_card(card: ModelCard) -> str:
    """Formats the card as Markdown with YAML front matter."""
    sections = [_front_matter(card), f"# {card.name}", _introduction(card)]
    sections += ["## Structure and loss", ladder_table(card.rows), _LOSS_NOTE] if card.rows else []
    sections += ["## Loading", _loading(card), "## Verification", _verification(card)]
    if card.masks:
        sections += ["## Masks", "\n".join(f"- `{mask.name}`: sha256 `{mask.sha256}`" for mask in card.masks)]
    if card.training_data:
        sections += ["## Data", card.training_data]
    if card.commands:
        sections += ["## How it was made", _fenced("\n".join(card.commands), "bash")]
    if card.versions:
        sections += ["Versions: " + ", ".join(f"{name} {version}" for name, version in card.versions) + "."]
    licence = f"`{card.license}`." + (f" {card.license_note}" if card.license_note else "")
    return "\n\n".join([*sections, "## Licence", licence]) + "\n"


def _front_matter(card: ModelCard) -> str:
    # JSON strings are valid YAML strings. No value can end its line or change its type ("no" stays a string).
    lines = ["library_name: transformers", f"pipeline_tag: {card.pipeline}", f"license: {json.dumps(card.license)}"]
    if card.languages:
        lines.append(f"language: {json.dumps(list(card.languages))}")
    if card.base_model is not None and _HUB_ID.fullmatch(card.base_model):
        lines.append(f"base_model: {json.dumps(card.base_model)}")
    lines.append('tags: ["pruned", "structured-pruning"]')
    return "\n".join(["---", *lines, "---"])


def _introduction(card: ModelCard) -> str:
    origin = "a model trained from scratch" if card.base_model is None else card.base_model
    if card.active_parameters is not None:
        return (
            f"A language model made from {origin}, whose FFN blocks are mixtures of experts: a router chooses the FFN "
            f"dimensions of each token, which uses {human_count(card.active_parameters)} parameters."
        )
    return (
        f"A dense language model cut out of {origin} by structured pruning: what learned masks set to zero was removed."
    )


def _loading(card: ModelCard) -> str:
    options = ", trust_remote_code=True" if card.trust_remote_code else ""
    # The tokenizer needs no code from the folder. Without this argument, transformers would ask about the model's code.
    plain = ", trust_remote_code=False" if card.trust_remote_code else ""
    code = (
        f"from transformers import {card.auto_class}, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{_PLACEHOLDER}"{plain})\n'
        f'model = {card.auto_class}.from_pretrained("{_PLACEHOLDER}"{options})'
    )
    why = "Stock transformers loads it; no code from the folder is run."
    if card.trust_remote_code:
        why = "Stock transformers has no class for this shape: it runs the modeling file in the folder."
    warnings = "\n".join(f"- Warning: {sentence}." for sentence in card.misread_by)
    return "\n\n".join(part for part in (_fenced(code, "python"), why, warnings) if part)


def _verification(card: ModelCard) -> str:
    if card.max_difference is None:
        return "The outputs of the masked and of the reshaped model were not compared."
    where = f" ({card.difference_note})" if card.difference_note else ""
    return (
        "The masked model and this reshaped one were run on the same batches"
        f"{where}: largest relative difference of their outputs {card.max_difference:.2e}."
    )


def _fenced(text: str, language: str) -> str:
    # A fence longer than any run of backticks inside it.
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
