"""How a photo is held: the orientation that its EXIF names, with the mirrored ones.

FFmpeg turns by the same tag, but PyAV tells the turn alone, and older ones read it of JPEG alone.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

_ORIENTATION = 0x0112
_EXIF = b"Exif\0\0"
# Quarter turns against the clock, then whether left and right change places (EXIF 2.3, 4.6.4).
_UPRIGHT = {
    **{1: (0, False), 2: (0, True), 3: (2, False), 4: (2, True)},
    **{5: (-1, True), 6: (-1, False), 7: (1, True), 8: (1, False)},
}


def upright(image: Tensor, turns: int, mirrored: bool) -> Tensor:
    """An image [H, W, C] as it is to be seen; without a turn the very same."""
    if turns % 4:
        image = image.rot90(turns)
    return image.flip(1) if mirrored else image


def exif_turn(path: Path) -> tuple[int, bool] | None:
    """Quarter turns against the clock, and whether it is mirrored then; None where none is told."""
    with path.open("rb") as file:
        head = file.read(12)
        find = _finder(head)
        if find is None:
            return None
        data = head + file.read()
    try:
        tag = _tag(find(data))
    except struct.error:  # cut off
        return None
    return None if tag is None else _UPRIGHT.get(tag)


def _finder(head: bytes) -> Callable[[bytes], bytes] | None:
    """What finds the EXIF of such a file, a small TIFF."""
    if head[:2] == b"\xff\xd8":
        return _in_jpeg
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return partial(_in_chunks, start=8, order=">", name_first=False, wanted=b"eXIf")
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return partial(_in_chunks, start=12, order="<", name_first=True, wanted=b"EXIF")
    return bytes if head[:4] in (b"II*\0", b"MM\0*") else None


def _in_jpeg(data: bytes) -> bytes:
    place = 2
    while data[place : place + 2] != b"\xff\xda":  # then comes the picture
        marker, length = struct.unpack_from(">HH", data, place)
        body = data[place + 4 : place + 2 + length]
        if marker == 0xFFE1 and body.startswith(_EXIF):
            return body.removeprefix(_EXIF)
        place += 2 + length
    return b""


def _in_chunks(data: bytes, start: int, order: str, name_first: bool, wanted: bytes) -> bytes:
    place, layout = start, order + ("4sI" if name_first else "I4s")
    while place < len(data):
        fields = struct.unpack_from(layout, data, place)
        name, length = fields if name_first else fields[::-1]
        if name == wanted:
            return data[place + 8 : place + 8 + length].removeprefix(_EXIF)
        place += 8 + length + (length % 2 if name_first else 4)  # padding, or a check sum
    return b""


def _tag(tiff: bytes) -> int | None:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    (first,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, first)
    for place in range(first + 2, first + 2 + 12 * count, 12):
        tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, place)
        if tag == _ORIENTATION:
            return int(value)
    return None
