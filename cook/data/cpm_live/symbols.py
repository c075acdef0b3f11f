"""Reads a pickle without running any of it: names and calls become symbols, for the caller to recognise or refuse.

Python's own unpickler imports and calls what a pickle names, so a data file could run anything. This one does neither.
It takes the opcodes that protocols 2 to 5 use for lists, tuples, text, numbers, bytes, names and calls, refuses all
others by name, and needs memory in proportion to the pickle's length only. (Opcodes: CPython, Lib/pickletools.py.)
"""

from __future__ import annotations

import pickletools
import struct
from dataclasses import dataclass
from typing import Any

NAME_OF = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
MAX_TEXT = 4096  # bytes of the longest name or text

_MARK = object()


class PickleRefused(Exception):
    """The bytes at an offset of the buffer are not a pickle of the expected kind, for a reason."""

    def __init__(self, offset: int, reason: str):
        self.offset, self.reason = offset, reason
        super().__init__(f"byte {offset}: {reason}")


@dataclass(frozen=True)
class Name:
    """`module.name` as the pickle has it; nothing is imported."""

    module: str
    name: str


@dataclass(frozen=True)
class Stretch:
    """Bytes of the buffer from `begin` to `end`, not copied."""

    begin: int
    end: int


@dataclass(eq=False)
class Call:
    """`function(*arguments)`, then `state` set on the result; nothing is called."""

    function: Any
    arguments: Any
    state: Any = None


def read_symbols(buffer: Any, begin: int, end: int, max_opcodes: int) -> tuple[Any, int]:
    """Reads the one pickle that starts at offset `begin` of bytes or the map of a file, and ends before `end`.

    Returns:
        Its value (None, bool, int, str, tuple, list, `Name`, `Stretch`, `Call`), and the offset after its last byte.

    Raises:
        PickleRefused: An opcode is not admitted, or the pickle is malformed or longer than allowed.
    """
    machine = _Machine(buffer, begin, end)
    for _ in range(max_opcodes):
        at = machine.at
        opcode = machine.take(1)[0]
        if opcode == 0x2E:  # STOP
            return machine.pop(), machine.at
        act = _ACTS.get(opcode)
        if act is None:
            known = NAME_OF.get(opcode, f"byte 0x{opcode:02x}")
            raise PickleRefused(at, f"the pickle holds {known}, which data has no need of")
        try:
            act(machine)
        except PickleRefused:
            raise
        except (IndexError, KeyError, TypeError, UnicodeDecodeError):
            raise PickleRefused(at, f"the pickle is malformed at {NAME_OF[opcode]}") from None
    raise PickleRefused(machine.at, f"the pickle has more than {max_opcodes} opcodes")


class _Machine:
    def __init__(self, buffer: Any, begin: int, end: int):
        self.buffer, self.at, self.end = buffer, begin, end
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def take(self, count: int) -> bytes:
        return bytes(self.buffer[self.skip(count) : self.at])

    def skip(self, count: int) -> int:
        """Moves on by `count` bytes; returns the offset of the first of them."""
        begin = self.at
        if count > self.end - begin:
            raise PickleRefused(begin, f"the pickle is cut off: {count} bytes expected, {self.end - begin} left")
        self.at += count
        return begin

    def number(self, layout: str) -> int:
        return struct.unpack("<" + layout, self.take(struct.calcsize(layout)))[0]

    def text(self, length: int) -> str:
        if length > MAX_TEXT:
            raise PickleRefused(self.at, f"the pickle holds a text of {length} bytes")
        return self.take(length).decode()

    def line(self) -> str:
        found = bytes(self.buffer[self.at : min(self.at + MAX_TEXT, self.end)]).find(b"\n")
        if found < 0:
            raise PickleRefused(self.at, "the pickle holds a name without an end")
        return self.take(found + 1)[:-1].decode()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleRefused(self.at, "the pickle takes more values than it has")
        return self.stack.pop()

    def pop_several(self, count: int) -> tuple:
        return tuple(reversed([self.pop() for _ in range(count)]))

    def pop_to_mark(self) -> list:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise PickleRefused(self.at, "the pickle has no mark")

    def top(self, kind: type) -> Any:
        value = self.pop()
        if not isinstance(value, kind):
            raise TypeError
        self.push(value)
        return value

    def stretch(self, length: int) -> None:
        self.push(Stretch(self.skip(length), self.at))

    def memoize(self, index: int) -> None:
        value = self.pop()
        self.memo[index] = value
        self.push(value)

    def long(self) -> None:
        length = self.number("B")
        self.push(int.from_bytes(self.take(length), "little", signed=True))

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        self.push(Name(module, name))

    def reduce(self) -> None:
        function, arguments = self.pop_several(2)
        if not isinstance(arguments, tuple):
            raise TypeError
        self.push(Call(function, arguments))

    def build(self) -> None:
        state = self.pop()
        self.top(Call).state = state

    def append(self, values: list) -> None:
        self.top(list).extend(values)


_ACTS = {
    ord(code): act
    for code, act in {
        "\x80": lambda m: m.skip(1),  # PROTO
        "\x95": lambda m: m.skip(8),  # FRAME: a hint of how much to read ahead
        "(": lambda m: m.push(_MARK),
        "]": lambda m: m.push([]),
        "a": lambda m: m.append([m.pop()]),
        "e": lambda m: m.append(m.pop_to_mark()),
        ")": lambda m: m.push(()),
        "\x85": lambda m: m.push(m.pop_several(1)),
        "\x86": lambda m: m.push(m.pop_several(2)),
        "\x87": lambda m: m.push(m.pop_several(3)),
        "t": lambda m: m.push(tuple(m.pop_to_mark())),
        "N": lambda m: m.push(None),
        "\x88": lambda m: m.push(True),
        "\x89": lambda m: m.push(False),
        "K": lambda m: m.push(m.number("B")),
        "M": lambda m: m.push(m.number("H")),
        "J": lambda m: m.push(m.number("i")),
        "\x8a": lambda m: m.long(),
        "\x8c": lambda m: m.push(m.text(m.number("B"))),
        "X": lambda m: m.push(m.text(m.number("I"))),
        "C": lambda m: m.stretch(m.number("B")),
        "B": lambda m: m.stretch(m.number("I")),
        "\x8e": lambda m: m.stretch(m.number("Q")),  # BINBYTES8
        "\x96": lambda m: m.stretch(m.number("Q")),  # BYTEARRAY8
        "\x94": lambda m: m.memoize(len(m.memo)),
        "q": lambda m: m.memoize(m.number("B")),
        "r": lambda m: m.memoize(m.number("I")),
        "h": lambda m: m.push(m.memo[m.number("B")]),
        "j": lambda m: m.push(m.memo[m.number("I")]),
        "c": lambda m: m.name(m.line(), m.line()),
        "\x93": lambda m: m.name(*m.pop_several(2)),
        "R": lambda m: m.reduce(),
        "b": lambda m: m.build(),
    }.items()
}
