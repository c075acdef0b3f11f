"""Tokenizers with fewer tokens.

A text whose tokens all stay gets the same tokens as before, with new numbers; every other text can still be encoded.
What that takes depends on how a tokenizer works:

- BPE: the tokens from which a kept one is merged stay too. Merges with a removed part or result go.
- Unigram: the piece with the lowest score stays, since the score of unknown characters is derived from it.
- All: special and added tokens stay, and single characters; with a fallback to bytes, the bytes instead of these.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cook.base.errors import UserError
from cook.base.files import read_json, write_atomically, write_json
from cook.text.hf import open_backend
from cook.text.hf_export import parse_model
from cook.text.jieba import SPECIAL, is_jieba

BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
CONFIGS = ("config.json", "generation_config.json")
LISTS = ("suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids", "bad_words_ids", "sequence_bias")
"""Settings of generation that contain ids, besides those whose names end with `token_id` or `token_ids`."""


def completed(folder: Path, chosen: Iterable[int]) -> tuple[int, ...]:
    """The ids that stay if the `chosen` ones do, ascending: with all that the tokenizer of `folder` needs.

    Raises:
        UserError: the folder has no tokenizer that can be made smaller.
    """
    wanted = set(chosen) | set(_named_ids(folder))
    if is_jieba(folder):
        lines = _lines(folder)
        wanted |= {number for number, line in enumerate(lines) if number < len(SPECIAL) or len(line) == 1}
        return tuple(sorted(wanted & set(range(len(lines)))))
    content = _content(folder)
    vocabulary = _vocabulary(content)
    model = content["model"]
    by_bytes = bool(model.get("byte_fallback")) and all(name in vocabulary for name in BYTES)
    prefix = model.get("continuing_subword_prefix") or ""
    for token, number in vocabulary.items():
        is_character = len(token) == 1 or bool(prefix) and len(token) == 1 + len(prefix) and token.startswith(prefix)
        if token in BYTES if by_bytes else is_character:
            wanted.add(number)
    wanted |= {token["id"] for token in content.get("added_tokens") or ()}
    if model.get("unk_token") in vocabulary:
        wanted.add(vocabulary[model["unk_token"]])
    if model["type"] == "Unigram":
        scores = [score for _, score in model["vocab"]]
        wanted |= {scores.index(min(scores)), *({model["unk_id"]} - {None})}
    if model["type"] == "BPE":
        wanted |= set(_on_merge_paths(model, wanted))
    return tuple(sorted(wanted & ({*vocabulary.values()} | {token["id"] for token in content["added_tokens"]})))


def shrink_tokenizer(folder: Path, kept: Sequence[int]) -> list[str]:
    """Rewrites the tokenizer and the generation settings of a folder for the tokens `kept`, in place.

    Args:
        folder: A folder with a tokenizer.
        kept: Ids that stay, from `completed`; the place of an id is its new number.

    Returns:
        Names of files that were removed, since they describe the old vocabulary in another form.
    """
    number = {old: new for new, old in enumerate(kept)}
    if is_jieba(folder):
        lines = _lines(folder)
        write_atomically(folder / "vocab.txt", "".join(f"{lines[old]}\n" for old in kept))
    else:
        write_atomically(folder / "tokenizer.json", json.dumps(_smaller(_content(folder), number), ensure_ascii=False))
    generation = folder / "generation_config.json"
    if generation.is_file():
        write_json(generation, renumbered(read_json(generation), number))
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and (named := read_json(settings).get("added_tokens_decoder")):
        decoder = {str(number[int(old)]): token for old, token in named.items() if int(old) in number}
        write_json(settings, read_json(settings) | {"added_tokens_decoder": decoder})
    added = folder / "added_tokens.json"
    if added.is_file():
        write_json(added, {token: number[old] for token, old in read_json(added).items() if old in number})
    return _left_files(folder, kept)


def _lines(folder: Path) -> list[str]:
    with open(folder / "vocab.txt", encoding="utf-8-sig") as file:
        return [line.rstrip("\n") for line in file]


def _content(folder: Path) -> dict[str, Any]:
    """The tokenizer as in tokenizer.json."""
    content: dict[str, Any]
    if (folder / "tokenizer.json").is_file():
        content = read_json(folder / "tokenizer.json")
    else:
        backend = getattr(open_backend(str(folder), local_files_only=True), "backend_tokenizer", None)
        if backend is None:
            wanted = "one that tokenizer.json can describe"
            raise UserError(f"{folder}: its tokenizer cannot be made smaller", wanted=wanted)
        content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] == "BPE" and (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")):
        raise UserError(
            f"{folder}: its tokenizer cannot be made smaller",
            wanted="byte-pair encoding whose tokens have neither a prefix nor a suffix",
        )
    return content


def _vocabulary(content: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, Mapping):
        return dict(vocabulary)
    return {piece: number for number, (piece, _) in enumerate(vocabulary)}


def _pairs(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _on_merge_paths(model: Mapping[str, Any], wanted: Iterable[int]) -> Iterator[int]:
    """Ids of all that is merged on the way to the wanted tokens.

    The merges inside a token do not depend on the text around it, since no merge crosses its ends.
    """
    vocabulary = model["vocab"]
    rank = {pair: number for number, pair in reversed(list(enumerate(_pairs(model))))}
    token_of = {number: token for token, number in vocabulary.items()}
    for number in wanted:
        parts = list(token_of.get(number, ""))
        yield from (vocabulary[part] for part in parts if part in vocabulary)
        while len(parts) > 1:
            ranks = [rank.get(pair, len(rank)) for pair in zip(parts, parts[1:], strict=False)]
            best = min(ranks)
            if best == len(rank):
                break
            place = ranks.index(best)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
            yield vocabulary[parts[place]]


def _smaller(content: dict[str, Any], number: Mapping[int, int]) -> dict[str, Any]:
    model = dict(content["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in number]
        model["unk_id"] = number.get(model["unk_id"])
    else:
        model["vocab"] = {token: number[old] for token, old in model["vocab"].items() if old in number}
    if model["type"] == "BPE":
        vocabulary = model["vocab"]
        model["merges"] = [
            [left, right]
            for left, right in _pairs(model)
            if left in vocabulary and right in vocabulary and left + right in vocabulary
        ]
    added = [token | {"id": number[token["id"]]} for token in content["added_tokens"]]
    parts = {key: _with_new_ids(content[key], number) for key in ("post_processor", "padding")}
    return content | parts | {"model": model, "added_tokens": added}


def _with_new_ids(part: Any, number: Mapping[int, int]) -> Any:
    """A post-processor or the padding with new ids: `ids` of templates, `[token, id]` of BERT's, `pad_id`."""
    if isinstance(part, list):
        return [_with_new_ids(each, number) for each in part]
    if not isinstance(part, dict):
        return part
    new = {key: _with_new_ids(value, number) for key, value in part.items()}
    for key, value in part.items():
        if key == "ids":
            new[key] = [number[old] for old in value]
        elif key in ("cls", "sep") and isinstance(value, list):
            new[key] = [value[0], number[value[1]]]
        elif key == "pad_id":
            new[key] = number.get(value, 0)
    return new


def _is_id_key(key: str) -> bool:
    return key.endswith(("token_id", "token_ids")) or key in LISTS


def _ids_in(value: Any) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _ids_in(each)


def _named_ids(folder: Path) -> Iterator[int]:
    """Ids in the configs of model and generation, in nested ones too."""

    def within(value: Any) -> Iterator[int]:
        for key, each in value.items() if isinstance(value, dict) else ():
            yield from _ids_in(each) if _is_id_key(key) else within(each)

    for name in CONFIGS:
        if (folder / name).is_file():
            yield from within(read_json(folder / name))


def renumbered(value: Any, number: Mapping[int, int]) -> Any:
    """A config with new numbers in all settings that contain ids, nested ones too."""

    def new(each: Any) -> Any:
        if isinstance(each, list):
            return [new(one) for one in each]
        return number.get(each, each) if isinstance(each, int) and not isinstance(each, bool) else each

    if not isinstance(value, dict):
        return value
    return {key: new(each) if _is_id_key(key) else renumbered(each, number) for key, each in value.items()}


def _left_files(folder: Path, kept: Sequence[int]) -> list[str]:
    """Rewrites sentencepiece models; removes other files that have the old vocabulary."""
    removed = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".model":
            proto = parse_model(path.read_bytes())
            pieces = [proto.pieces[old] for old in kept if old < len(proto.pieces)]
            number = {old: new for new, old in enumerate(kept)}
            del proto.pieces[:]
            proto.pieces.extend(pieces)
            trainer = proto.trainer_spec
            trainer.vocab_size = len(pieces)
            for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
                setattr(trainer, name, number.get(getattr(trainer, name), -1))
            path.write_bytes(proto.SerializeToString())
        elif path.name in ("vocab.json", "merges.txt") or path.name == "vocab.txt" and not is_jieba(folder):
            path.unlink()
            removed.append(path.name)
    return removed
