"""What a smaller vocabulary costs by itself: the loss of a model without its rare tokens, by how rare they may be.

    python scripts/bench/vocabulary_sizes.py --model SMOLLM2_FOLDER --count texts/ \
        --text wikitext2=test.txt --text imdb=reviews.txt

Tokens are counted in the files of `--count`. All weights stay as they are; only rows of the embeddings go, and unseen
words fall into smaller pieces. Losses are per byte, as the models read other tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import publish, run_apart

from cook.base.files import read_json


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="cook-vocabulary-") as name:
        folder = Path(name)
        models = {"whole": options.model}
        for least in options.min_count:
            tokens, small = folder / f"{least}.json", folder / str(least)
            how = ["--tokenizer", options.model, "--min-count", str(least), "--output", str(tokens)]
            run_apart(["-m", "cook", "data", "vocabulary", *options.count, "--format", "text", *how])
            how = ["--model", options.model, "--vocabulary", str(tokens), "--output", str(small)]
            run_apart(["-m", "cook", "reshape", *how])
            models[str(least)] = str(small)
        rows: dict[str, dict[str, Any]] = {key: {"least count": key} for key in models}
        for text in options.text:
            kind, _, file = text.partition("=")
            how = ["--data", file, "--no-speed", "--max-windows", str(options.windows), "--window", str(options.length)]
            named = [f"{key}={path}" for key, path in models.items()]
            run_apart(["-m", "cook", "compare", *named, *how, "--output", str(folder / kind)])
            for key, record in zip(models, read_json(folder / kind / "comparison.json")["models"], strict=True):
                rows[key] |= {"parameters": record["parameters"], f"bits per byte, {kind}": record["bits_per_byte"]}
        for key, path in models.items():
            rows[key] = {"tokens": read_json(Path(path) / "config.json")["vocab_size"]} | rows[key]
    settings = {"min_count": options.min_count, "windows": options.windows, "length": options.length}
    publish("vocabulary_sizes", settings, [*rows.values()], options.output)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--count", required=True, nargs="+", help="files or folders of text")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--min-count", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--windows", type=int, default=16, help="of each text")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--output", help="the JSON; default: results/bench/vocabulary_sizes.json")
    options = parser.parse_args()
    options.model = str(Path(options.model).resolve())
    options.count = [str(Path(path).resolve()) for path in options.count]
    return options


if __name__ == "__main__":
    main()
