"""A slow and obvious writing of the row rules, from their description; the tests' oracle."""

from __future__ import annotations


def pieces_of(documents: list[list[int]], row_size: int) -> list[list[int]]:
    """Samples `<s> piece </s>` in order, with bos 2 and eos 3."""
    room = row_size - 2
    samples = []
    for document in documents:
        rest, is_first = document, True
        while rest:
            piece, rest = rest[:room], rest[room:]
            shortest = room if len(piece) == room else 8 if is_first else 32
            if len(piece) >= shortest:
                samples.append([2, *piece, 3])
            is_first = False
    return samples


def pack(samples: list[list[int]], row_size: int, open_rows: int) -> list[list[list[int]]]:
    """Rows as lists of samples: each sample goes into the first of the last `open_rows` shared rows with room."""
    rows: list[list[list[int]]] = []
    shared: list[list[list[int]]] = []
    for sample in samples:
        if len(sample) == row_size:
            rows.append([sample])
            continue
        for row in shared[-open_rows:]:
            if sum(map(len, row)) + len(sample) <= row_size:
                row.append(sample)
                break
        else:
            shared.append([sample])
            rows.append(shared[-1])
    return rows


def batch_row(row: list[list[int]], prompt_length: int, max_length: int) -> dict[str, list]:
    """One row of the batch, position by position."""
    fields = {name: [] for name in ("input", "context", "position", "segment", "span", "targets")}

    def put(**values):
        for name, value in values.items():
            fields[name].append(value)

    for i in range(prompt_length):
        put(input=2 * prompt_length + i, context=True, position=i, segment=0, span=0, targets=-100)
    for number, sample in enumerate(row):
        for i, token in enumerate(sample):
            target = sample[i + 1] if i + 1 < len(sample) else -100
            put(input=token, context=False, position=prompt_length + i, segment=2, span=number, targets=target)
    length = len(fields["input"])
    while len(fields["input"]) < max_length:
        put(input=0, context=False, position=0, segment=0, span=-1, targets=-100)
    return {**fields, "length": length}
