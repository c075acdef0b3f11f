"""`cook data`: makes, describes and rewrites CPM-Live's binary data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from cook.base.pool import num_cores
from cook.commands.options import AsJson
from cook.config.types import TokenizerType

app = typer.Typer(no_args_is_help=True, help="Make, inspect and rewrite binary data of CPM-Live's format.")

Inputs = Annotated[list[str], typer.Argument(metavar="INPUT...", help="Files, folders or quoted glob patterns.")]
Format = Annotated[
    Literal["lines", "text", "jsonl"] | None,
    typer.Option(
        help="`lines`: a document per line, where <n> stands for a line end (CPM-Live's); `text`: a document per file; "
        "`jsonl`: an object per line. Default: `jsonl` for .jsonl, .json and .ndjson files, `lines` for others."
    ),
]
TextField = Annotated[str, typer.Option(help="Key of the text in an object.")]
TokenizerPath = Annotated[str, typer.Option(metavar="PATH", help="The tokenizer's file or folder.")]
Type = Annotated[
    TokenizerType | None,
    typer.Option(help="Default: `hf` for a folder, `sentencepiece` for a .model file, `jieba` for a .txt file."),
]
Source = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder with meta.bin.")]
Sources = Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Folders with meta.bin.")]
NewFolder = Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder.")]
Version = Annotated[int, typer.Option(min=1, max=2, help="Version of the binary format.")]
BlockSize = Annotated[str, typer.Option(metavar="BYTES", help="Size of a block, such as 16M.")]
CORES = num_cores()
LEAST = (1, 2, 5, 10, 20, 50, 100)
"""Counts for which `cook data vocabulary` says what would stay."""

Workers = Annotated[int, typer.Option(min=1, help="Processes. Default: one per core.", show_default=False)]


@app.command()
def tokenizer(
    inputs: Inputs,
    output: Annotated[Path, typer.Option(metavar="FILE", help="A new .model file.")],
    vocab_size: Annotated[int, typer.Option(min=1, help="Number of ids.")],
    format: Format = None,
    text_field: TextField = "text",
    seed: Annotated[int, typer.Option(help="Chooses the lines that are read of a large corpus.")] = 0,
) -> None:
    """Train a sentencepiece tokenizer on text or JSON lines, as a run without a tokenizer does."""
    from cook.data.commands.preprocess import train_tokenizer

    train_tokenizer(inputs, output, format=format, text_field=text_field, vocab_size=vocab_size, seed=seed)


@app.command()
def preprocess(
    inputs: Inputs,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder, or that of an unfinished run.")],
    tokenizer: TokenizerPath,
    tokenizer_type: Type = None,
    format: Format = None,
    text_field: TextField = "text",
    version: Version = 1,
    block_size: BlockSize = "16M",
    max_length: Annotated[int, typer.Option(min=1, help="Tokens per row, with its prompt.")] = 1024,
    prompt_length: Annotated[int, typer.Option(min=0, help="Prompt tokens of the model.")] = 32,
    masked_share: Annotated[float, typer.Option(help="Share of the pieces that are for masked LM, 0 to 1.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Chooses which pieces are masked.")] = 0,
    workers: Workers = CORES,
    part_size: Annotated[str, typer.Option(metavar="BYTES", help="Input per data file.")] = "64M",
) -> None:
    """Turn text or JSON lines into binary data, as CPM-Ant's preprocessing does it, in parallel.

    Any number of workers writes the same bytes. Stopped at any time, the same command resumes.
    """
    from cook.data.commands.common import size
    from cook.data.commands.pieces import Settings, format_of
    from cook.data.commands.preprocess import preprocess

    settings = Settings(
        format=format or format_of(inputs),
        text_field=text_field,
        max_length=max_length,
        prompt_length=prompt_length,
        masked_share=masked_share,
        seed=seed,
        version=version,
        block_size=size("--block-size", block_size),
    )
    preprocess(
        inputs,
        output,
        tokenizer=tokenizer,
        tokenizer_type=tokenizer_type,
        settings=settings,
        workers=workers,
        part_size=size("--part-size", part_size),
    )


@app.command()
def vocabulary(
    inputs: Inputs,
    tokenizer: Annotated[Path, typer.Option(metavar="FOLDER", help="The model's folder, or that of its tokenizer.")],
    min_count: Annotated[int, typer.Option(min=1, help="Tokens that occur less often go.")] = 1,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A new .json file, for the option --vocabulary.")
    ] = None,
    format: Format = None,
    text_field: TextField = "text",
    as_json: AsJson = False,
) -> None:
    """Count the tokens of texts, and show how few of them a model for such texts needs.

    What a tokenizer needs stays in any case: special tokens, characters or bytes, and the parts of which other tokens
    are merged. A text whose tokens all stay is encoded as before; every other text can still be encoded.
    """
    from cook.data.commands.common import check_new_file
    from cook.data.commands.vocabulary import count_inputs, proposals
    from cook.export.vocabulary import tokenizer_in, write_vocabulary
    from cook.report.tables import markdown_table
    from cook.text.smaller import completed

    if output:
        check_new_file(output)
    opened = tokenizer_in(tokenizer)
    counts = count_inputs(inputs, opened, format=format, text_field=text_field, say=not as_json)
    rows = proposals(counts, lambda ids: completed(tokenizer, ids), least=sorted({min_count, *LEAST}))
    if as_json:
        print(json.dumps(rows))
    else:
        print(f"{counts.sum():,} tokens in the texts, {(counts > 0).sum():,} different ones of {len(counts):,}\n")
        cells = [[str(row["min_count"]), f"{row['tokens']:,}", f"{row['covered']:.4%}"] for row in rows]
        print(markdown_table(["least count", "tokens that stay", "of the texts"], cells))
    if output:
        kept = completed(tokenizer, (counts >= min_count).nonzero()[0].tolist())
        write_vocabulary(output, tokenizer, kept, min_count)


@app.command()
def inspect(
    folders: Sources,
    tokenizer: Annotated[str | None, typer.Option(metavar="PATH", help="Shows the samples as text.")] = None,
    tokenizer_type: Type = None,
    samples: Annotated[int, typer.Option(min=0, help="Records to show.")] = 3,
    as_json: AsJson = False,
    workers: Workers = CORES,
) -> None:
    """Print what binary data holds: files, records, tasks, lengths, samples. Every record is read and checked."""
    from cook.data.commands.common import tokenizer_type as type_of
    from cook.data.commands.inspect import inspect, show
    from cook.text.tokenizer import load_tokenizer

    opened = load_tokenizer(type_of(tokenizer, tokenizer_type), tokenizer) if tokenizer else None
    facts = inspect(folders, tokenizer=opened, samples=samples, workers=workers)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        show(facts)


@app.command()
def shuffle(
    source: Source,
    output: NewFolder,
    seed: Annotated[int, typer.Option(help="Decides the order.")] = 0,
    memory: Annotated[str, typer.Option(metavar="BYTES", help="About how much memory to use.")] = "1G",
) -> None:
    """Write the same records in a random order; data of any size."""
    from cook.data.commands.common import size
    from cook.data.commands.rewrite import shuffle

    shuffle(source, output, seed=seed, memory=size("--memory", memory))


@app.command()
def merge(
    sources: Sources,
    output: NewFolder,
    version: Annotated[
        int | None, typer.Option(min=1, max=2, help="Version of the output. Default: the first folder's.")
    ] = None,
) -> None:
    """Merge several folders of binary data, in their order.

    Files of one version and block size are copied; other records are written again, in the first folder's block size.
    """
    from cook.data.commands.rewrite import merge

    merge(sources, output, version=version)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A folder with meta.bin, or a .jsonl file.")],
    output: Annotated[Path, typer.Option(metavar="TARGET", help="A new folder, or a new .jsonl file.")],
    version: Version = 1,
    block_size: BlockSize = "16M",
) -> None:
    """Convert between version 1, version 2 and JSON lines; every token stays the same.

    A JSON line is `{"task": …, "segments": [[length, type, task], …], "tokens": […]}`.
    """
    from cook.data.commands.common import size
    from cook.data.commands.rewrite import convert

    convert(source, output, version=version, block_size=size("--block-size", block_size))
