"""CPM-Ant's batches built token by token, and its packing row by row: slow, obvious, from the description."""

from __future__ import annotations

import hashlib

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
NO_TARGET = -100


def mix(x):
    """SplitMix64's finaliser."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def epoch_key(seed, epoch):
    digest = hashlib.sha256(repr((seed, "tasks", epoch)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def bits_of(key, number, ordinal):
    return mix(mix(key + GOLDEN * (number + 1)) + GOLDEN * (ordinal + 1))


def hidden_positions(key, number, ordinal, length, task):
    """Positions of a segment that task 0 or 1 hides."""
    if length < 2:
        return set()
    bits = bits_of(key, number, ordinal)
    count = 1 + bits % (length - 1)
    if task == 1:
        return set(range(length - count, length))
    ranked = sorted(range(1, length), key=lambda position: (mix(bits + GOLDEN * position) >> 36, position))
    return set(ranked[:count])


def segments_of(numbers):
    """(length, type, task, tokens) of every segment of a record, and the record's task."""
    task, count = numbers[0], numbers[1]
    at, segments = 2 + 3 * count, []
    for s in range(count):
        length, type, segment_task = numbers[2 + 3 * s : 5 + 3 * s]
        segments.append((length, type, segment_task, numbers[at : at + length]))
        at += length
    return task, segments


def samples_of(numbers, number, key, prompt_length):
    """Samples of a record: lists of (id, position, segment, context, target, segment task), and whether it is right."""
    task, segments = segments_of(numbers)
    told = any((t, y) in ((3, 2), (4, 3)) for _, y, t, _ in segments)
    samples = []
    for ordinal, (length, type, segment_task, tokens) in enumerate(segments):
        if ordinal == 0 or segment_task in (100, 101):
            prompt = [[prompt_length * task + p, p, 0, True, NO_TARGET, 0] for p in range(prompt_length)]
            samples.append((prompt, segment_task == 101 if segment_task in (100, 101) else None))
        sample = samples[-1][0]
        hidden = set()
        if segment_task == 90:
            hidden = set(range(length))
        elif told:
            hidden = set(range(1 if ordinal == 0 else 0, length))
        elif segment_task in (0, 1):
            hidden = hidden_positions(key, number, ordinal, length, segment_task)
        for position in range(length):
            is_hidden = position in hidden
            if is_hidden and (position > 0 or segment_task == 90):
                sample[-1][4] = tokens[position]
            sample.append([tokens[position], len(sample), type, not is_hidden, NO_TARGET, segment_task])
    return samples


def size_of(numbers, prompt_length):
    return sum(len(sample) for sample, _ in samples_of(numbers, 0, 0, prompt_length))


def pack(sizes, row_size):
    """First fit: lists of records, a list a row."""
    rows, used = [], []
    for record, size in enumerate(sizes):
        for row in range(len(rows)):
            if used[row] + size <= row_size:
                break
        else:
            row = len(rows)
            rows.append([])
            used.append(0)
        rows[row].append(record)
        used[row] += size
    return rows


def batch(records, rows, *, seed, epoch, max_length, prompt_length):
    """The batch of some rows, each a list of record numbers, as lists of lists."""
    names = ("input", "position", "segment", "context", "targets", "task")
    padding = (0, 0, 0, False, NO_TARGET, -1)
    result = {name: [] for name in (*names, "span", "choices", "length")}
    for row in rows:
        question = -1
        columns = {name: [] for name in (*names, "span", "choices")}
        span = -1
        for number in row:
            samples = samples_of(records[number], number, epoch_key(seed, epoch), prompt_length)
            question += samples[0][1] is not None
            for sample, is_right in samples:
                span += 1
                for entry in sample:
                    for name, value in zip(names, entry, strict=True):
                        columns[name].append(value)
                    columns["span"].append(span)
                    columns["choices"].append(-1)
                if is_right is not None:
                    columns["choices"][-1] = 2 * question + is_right
        result["length"].append(len(columns["input"]))
        for _ in range(max_length - len(columns["input"])):
            for name, value in zip(names, padding, strict=True):
                columns[name].append(value)
            columns["span"].append(-1)
            columns["choices"].append(-1)
        for name, column in columns.items():
            result[name].append(column)
    return result
