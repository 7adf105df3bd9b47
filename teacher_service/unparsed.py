"""What a message may be made of, seen before it is parsed.

Parsing is done on the event loop, which everybody waits for, and a message may be as large as a batch of pictures: of
so many bytes that are not pictures but empty parts, two bytes each, half a minute and gigabytes would be made, and
compressed they travel as a few kilobytes. Only the first tags are read here, whatever the size.
"""

from collections.abc import Iterator, Mapping
from typing import Union

MOST_FIELDS = 256
"""Of the parts of a message that are looked into, together."""
MOST_OTHER_BYTES = 1 << 16
"""Of a message, beside its pictures."""

Bulk = Mapping[int, Union["Bulk", None]]
"""By number, the fields that may be large: None, or which within a message may be."""

_VARINT, _FIXED_64, _LENGTH, _FIXED_32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED_64: 8, _FIXED_32: 4}
_MOST_VARINT_BYTES = 10


def excess(message: bytes, bulk: Bulk) -> str | None:
    """What a message has more of than any has whose only large fields are these; None where it may be parsed.

    Raises ValueError for bytes that are no message.
    """
    fields, other_bytes = 0, 0
    waiting: list[tuple[int, int, Bulk]] = [(0, len(message), bulk)]
    while waiting:
        start, end, large = waiting.pop()
        for number, first, last in _fields(message, start, end):
            fields += 1
            if fields > MOST_FIELDS:
                return f"more than {MOST_FIELDS} fields"
            if number not in large:
                other_bytes += last - first
                if other_bytes > MOST_OTHER_BYTES:
                    return f"more than {MOST_OTHER_BYTES} bytes beside its pictures"
            elif (within := large[number]) is not None:
                waiting.append((first, last, within))
    return None


def _fields(message: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, and where the content begins and ends, of each field of the message between two places."""
    while start < end:
        tag, start = _varint(message, start, end)
        kind = tag & 7
        if kind == _VARINT:
            _, last = _varint(message, start, end)
        elif kind == _LENGTH:
            length, start = _varint(message, start, end)
            last = start + length
        elif kind in _FIXED_BYTES:
            last = start + _FIXED_BYTES[kind]
        else:
            raise ValueError("expected no groups")
        if last > end:
            raise ValueError("expected a whole field")
        yield tag >> 3, start, last
        start = last


def _varint(message: bytes, start: int, end: int) -> tuple[int, int]:
    """The number that begins at a place, and where it has ended."""
    value = 0
    for i in range(_MOST_VARINT_BYTES):
        if start + i >= end:
            break
        byte = message[start + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, start + i + 1
    raise ValueError("expected a number")
