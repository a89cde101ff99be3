"""Whole files -> damaged ones, for fuzzing: bits, cuts, splices, repeats, and numbers that cannot be.

All chance comes from the given `random.Random`, so that a seed tells the file.
"""

import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from itertools import takewhile

MAX_BYTES = 1 << 20
HUGE = (0, 1, 0x7F, 0x80, 0xFFFF, 1 << 24, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)

Mend = Callable[[bytes, random.Random], bytes]  # makes the outer sums right again, or numbers inside wrong


def damaged(files: Sequence[bytes], rng: random.Random, mend: Mend) -> bytes:
    """One of `files` with one to four things wrong. In two of three cases `mend` sees to it that readers get
    past what guards the whole (checksums, lengths) and meet the damage further in."""
    data = rng.choice(files)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(DAMAGES)(data, rng, files)[:MAX_BYTES]
    return mend(data, rng)[:MAX_BYTES] if rng.random() < 2 / 3 else data


def _flip(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    a, b = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    return data[:a] if rng.random() < 0.3 else data[:a] + data[b:]


def _splice(data: bytes, rng: random.Random, files: Sequence[bytes]) -> bytes:
    other = rng.choice(files)
    return data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]


def _repeat(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    place, size = rng.randint(0, len(data)), rng.choice((1, 8, 512, 4096))
    return data[:place] + data[place : place + size] * rng.randint(2, 40) + data[place:]


def _number(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    """A number of 1 to 8 bytes, either end first, becomes one that cannot be."""
    place, size = rng.randint(0, len(data)), rng.choice((1, 2, 4, 8))
    value = rng.choice(HUGE) & (1 << 8 * size) - 1
    return data[:place] + value.to_bytes(size, rng.choice(("little", "big"))) + data[place + size :]


DAMAGES = (_flip, _flip, _cut, _splice, _repeat, _number)


def varint(value: int) -> bytes:
    """As Thrift writes lengths and, zigzag, numbers."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def mend_parquet(data: bytes, rng: random.Random) -> bytes:
    """A footer as long as it says, between the marks of parquet; one of its numbers is now impossible."""
    if len(data) < 12:
        return data
    size = int.from_bytes(data[-8:-4], "little")
    size = size if 0 < size <= len(data) - 8 else rng.randint(1, len(data) - 8)
    body, footer = data[: -8 - size], data[-8 - size : -8]
    if rng.random() < 0.7:
        place = rng.randrange(len(footer))
        rest = bytes(takewhile(lambda byte: byte > 0x7F, footer[place:]))  # of the number that was there
        footer = footer[:place] + varint(rng.choice(HUGE)) + footer[place + len(rest) + 1 :]
    return body + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def patched_footer(data: bytes, old: bytes, new: bytes) -> bytes:
    """A parquet file in whose footer `old`, wherever it stands, is `new`."""
    size = int.from_bytes(data[-8:-4], "little")
    body, footer = data[: -8 - size], data[-8 - size : -8]
    assert old in footer
    footer = footer.replace(old, new)
    return body + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def huge_footer(data: bytes, number: int, value: int) -> bytes:
    """A parquet file in whose footer every field of 8 bytes that holds `number` holds `value` instead."""
    return patched_footer(data, b"\x16" + varint(2 * number), b"\x16" + varint(2 * value))


def mend_tar(data: bytes, rng: random.Random) -> bytes:
    """The sums of all headers, of which some have another type or size; and blocks of zeros at the end."""
    blocks = [bytearray(data[at : at + 512].ljust(512, b"\0")) for at in range(0, len(data), 512)]
    for block in blocks:
        if block[257:262] == b"ustar":
            if rng.random() < 0.1:
                block[156] = rng.choice(b"0123456789DKLSVXgx\0")
            if rng.random() < 0.1:
                block[124:136] = b"%011o\0" % (rng.choice(HUGE) & (1 << 33) - 1)
            if rng.random() < 0.05:
                block[124:136] = rng.choice((b"\x80", b"\xff")) + rng.choice(HUGE).to_bytes(11, "big")
            block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return b"".join(blocks) + bytes(1024)


def mend_image(data: bytes, rng: random.Random) -> bytes:
    """The sums of a PNG's chunks, and the length of a WebP. JPEG and GIF have none."""
    if data[:4] == b"RIFF":
        return data[:4] + struct.pack("<I", max(0, len(data) - 8)) + data[8:]
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    found, at = data[:8], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : at + 8 + size]
        found += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + size
    return found
