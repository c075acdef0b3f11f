"""Exports a sentencepiece model as Hugging Face tokenizer files that give the same ids without sentencepiece.

sentencepiece merges the adjacent pair whose union has the best score. The tokenizers library merges by a ranked list of
pairs. The exported list therefore contains every split of every piece into two pieces, ordered by the score of the
piece. Pieces are stored with real spaces instead of U+2581. No replacing normaliser is needed, and a literal U+2581
stays unchanged. The result is compared with the original on probe texts before anything is written. For unigram models,
the choice between two segmentations of exactly the same likelihood may differ. For byte-pair models it cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cook.base.errors import UserError
from cook.base.files import write_atomically, write_json

PROBES = (
    *("The quick brown fox.", "  two  spaces   three    four     five \t tab\n"),
    "def f(x):\n    if x == 10:\n\t\treturn {'a': 1.5e-3}  # note\n\n\n",
    "                                     deep indentation",
    '"""Docstring."""\n--------\n=====\n#### ...... ____ >>> ))) ]]] ~~~',
    "naïve Ünïcödé façade — “quotes” … €",
    "中文分词,日本語の文章、한국어 문장",
    "special <s> tokens </s> as <unk> text, and a byte <0x41>",
    "emoji 😀👩‍👩‍👧 and flags 🇫🇷",
    *("a\r\nb\rc\u00a0d\u3000e\u200bf", "", " ", "\n"),
)


def parse_model(model: bytes) -> Any:
    """Parses the protocol buffer of a `.model` file: pieces with scores and types, trainer and normaliser settings."""
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2  # its classes are made at run time
    return schema.ModelProto.FromString(model)


def export_to_hugging_face(model: bytes, encode: Callable[[str], list[int]], folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json for the content of a `.model` file.

    `encode` is the original encoding, which the exported tokenizer must reproduce.

    Raises:
        UserError: The model's type or normalisation cannot be exported, or the ids of a probe text differ.
    """
    proto = parse_model(model)
    tokenizer = _build(proto)
    for probe in PROBES:
        wanted, got = encode(probe), tokenizer.encode(probe, add_special_tokens=False).ids
        if wanted != got:
            what = f"this sentencepiece model cannot be exported to Hugging Face: {probe!r} would get other ids"
            remedy = "use the model's own Hugging Face folder, with tokenizer.type: hf"
            raise UserError(what, wanted=wanted, got=got, remedy=remedy)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_json(folder / "tokenizer_config.json", _settings(proto.trainer_spec))


def _build(proto: Any) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE, Unigram
    from tokenizers.processors import TemplateProcessing

    kinds = proto.SentencePiece
    pieces = [
        piece.piece if piece.type in (kinds.CONTROL, kinds.UNKNOWN) else piece.piece.replace("\u2581", " ")
        for piece in proto.pieces
    ]
    trainer = proto.trainer_spec
    by_bytes, unknown = trainer.byte_fallback, trainer.unk_id
    if trainer.model_type == trainer.BPE:
        vocab, merges = {piece: i for i, piece in enumerate(pieces)}, _merges(proto, pieces)
        model: Any = BPE(vocab=vocab, merges=merges, byte_fallback=by_bytes, unk_token=pieces[unknown], fuse_unk=True)
    elif trainer.model_type == trainer.UNIGRAM:
        model = Unigram(_scores(proto, pieces), unk_id=unknown, byte_fallback=by_bytes)
    else:
        raise UserError("only sentencepiece models of type bpe or unigram can be exported to Hugging Face")
    tokenizer = Tokenizer(model)

    steps: list[Any] = []
    if proto.normalizer_spec.precompiled_charsmap:
        steps += [normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)]
    if proto.normalizer_spec.remove_extra_whitespaces:
        from tokenizers import Regex

        # Spaces only: normalizers.Strip would also remove line ends.
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    undo: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps += [normalizers.Prepend(" ")]
        undo += [decoders.Strip(" ", 1, 0)]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(undo)

    by_decree = [text for text, p in zip(pieces, proto.pieces, strict=True) if p.type == kinds.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in by_decree])
    special = [text for text, p in zip(pieces, proto.pieces, strict=True) if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    if trainer.bos_id >= 0:
        # As in training, where every sample begins with it.
        bos = (pieces[trainer.bos_id], trainer.bos_id)
        tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    # Strings of special tokens inside a text are plain text. This setting is not saved in tokenizer.json. It is for the
    # probes; transformers does the same because of `split_special_tokens` in tokenizer_config.json.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _merges(proto: Any, pieces: list[str]) -> list[tuple[str, str]]:
    """Every split of every learned piece into two, best score first; for the same piece, the longer left part first."""
    pairs, normal = zip(pieces, proto.pieces, strict=True), proto.SentencePiece.NORMAL
    score = {text: piece.score for text, piece in pairs if piece.type == normal}
    ranked = [
        (-score[text], -cut, text[:cut], text[cut:])
        for text in score
        for cut in range(1, len(text))
        if text[:cut] in score and text[cut:] in score
    ]
    return [(left, right) for _, _, left, right in sorted(ranked)]


def _scores(proto: Any, pieces: list[str]) -> list[tuple[str, float]]:
    """Pieces with scores. Special and byte pieces score below all others, so that text that spells one stays text."""
    kinds = proto.SentencePiece
    in_text = [piece.type in (kinds.NORMAL, kinds.USER_DEFINED) for piece in proto.pieces]
    worst = min((piece.score for piece, usable in zip(proto.pieces, in_text, strict=True) if usable), default=0.0)
    scores = [p.score if usable else worst - 100.0 for p, usable in zip(proto.pieces, in_text, strict=True)]
    return list(zip(pieces, scores, strict=True))


def _settings(trainer: Any) -> dict[str, Any]:
    special = {"bos": trainer.bos_id, "eos": trainer.eos_id, "pad": trainer.pad_id, "unk": trainer.unk_id}
    names = {kind: getattr(trainer, f"{kind}_piece") for kind, piece_id in special.items() if piece_id >= 0}
    return {
        # The name that every version of transformers since 4.0 understands.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{kind}_token": name for kind, name in names.items()},
        "add_bos_token": trainer.bos_id >= 0,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 10**30,
    }
