"""A live video for those who come and go: one reader's MP4, of the fragments that are recorded.

The boxes are those of ISO/IEC 14496-12. A fragment says when it is shown, counted from the begin of
its file; for a reader that comes later, goes back with the stream or misses some, it is dated anew.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_CONTAINERS = (b"moof", b"traf", b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1")
CAMERA_SCHEME = b"urn:reward-forcing:camera"
"""Names the messages that say which frame of a camera an image was made of."""
_ENTRY = {b"stsd": 8, b"avc1": 78}  # bytes before the boxes within


def retimed(fragment: bytes, number: int, time: int) -> bytes:
    """A fragment as number `number` of its file, from 1, shown from `time` on, in clock ticks."""
    new = bytearray(fragment)
    for name, at in boxes(fragment):
        if name == b"mfhd":
            struct.pack_into(">I", new, at + 4, number)
        elif name == b"tfdt":
            struct.pack_into(">Q" if fragment[at] == 1 else ">I", new, at + 4, time)
    return bytes(new)


def duration(fragment: bytes) -> int:
    """How long a fragment is shown, in clock ticks; its images are all shown as long."""
    runs = (at for name, at in boxes(fragment) if name == b"trun")
    count = sum(struct.unpack_from(">I", fragment, at + 4)[0] for at in runs)
    return _image_duration(fragment) * count


def _image_duration(fragment: bytes) -> int:
    headers = [at for name, at in boxes(fragment) if name == b"tfhd"]
    return _default_duration(fragment, headers[-1]) if headers else 0


def codec_of(header: bytes) -> str | None:
    """What a browser is asked whether it can play, such as `avc1.64000a`; None for other codecs."""
    for name, at in boxes(header):
        if name == b"avcC":
            return "avc1." + header[at + 1 : at + 4].hex()
    return None


def timescale_of(header: bytes) -> int:
    """Clock ticks a second of the video that begins with this header."""
    for name, at in boxes(header):
        if name == b"mdhd":
            return int(struct.unpack_from(">I", header, at + (20 if header[at] == 1 else 12))[0])
    raise ValueError("the header is of no video")


def message(data: bytes, time: int, timescale: int, number: int) -> bytes:
    """A box that says something about a moment of the video; players pass over it.

    An event message of ISO/IEC 23009-1, version 1; `time` is in clock ticks.
    """
    facts = struct.pack(">B3xIQII", 1, timescale, time, 0, number)
    body = facts + CAMERA_SCHEME + b"\0\0" + data
    return struct.pack(">I4s", 8 + len(body), b"emsg") + body


class FragmentSequence:
    """One reader's video: fragments one after another, whichever they were.

    `header` is what the video begins with.
    """

    def __init__(self, header: bytes) -> None:
        self._timescale = timescale_of(header)
        self._number = 1
        self._time = 0

    def add(self, fragment: bytes, said: bytes = b"") -> bytes:
        """The fragment as it follows those before, with what is said of its last image."""
        dated = retimed(fragment, self._number, self._time)
        self._time += duration(fragment)
        if said:
            last = self._time - _image_duration(fragment)
            dated = message(said, last, self._timescale, self._number) + dated
        self._number += 1
        return dated


def boxes(data: bytes, begin: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int]]:
    """Name and where the body begins of every box, those within others after them."""
    at, end = begin, len(data) if end is None else end
    while at + 8 <= end:
        length, name = struct.unpack_from(">I4s", data, at)
        if length < 8:
            return
        yield name, at + 8
        if name in _CONTAINERS:
            yield from boxes(data, at + 8 + _ENTRY.get(name, 0), at + length)
        at += length


def _default_duration(data: bytes, at: int) -> int:
    """Of a track fragment's header: optional fields stand in the order of their flags."""
    flags = struct.unpack_from(">I", data, at)[0] & 0xFFFFFF
    skipped = 8 * bool(flags & 1) + 4 * bool(flags & 2)
    return int(struct.unpack_from(">I", data, at + 8 + skipped)[0]) if flags & 8 else 0
