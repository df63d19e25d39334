"""Bytes that are spread over the segments of a descriptor chain."""

from __future__ import annotations

from ..dma import Dma
from ..virtqueue import Segment


def take(segments: list[Segment], start: int, length: int | None) -> list[Segment]:
    """The pieces that hold `length` bytes (None: all the rest) from byte `start` of `segments`."""
    end = sum(size for _, size in segments) if length is None else start + length
    pieces: list[Segment] = []
    position = 0
    for iova, size in segments:
        low, high = max(start, position), min(end, position + size)
        if low < high:
            pieces.append(Segment(iova + low - position, high - low))
        position += size
    return pieces


def gather(segments: list[Segment], dma: Dma) -> bytes:
    """What the driver has put there."""
    return b"".join(dma.read(*segment) for segment in segments)


def scatter(data: bytes | memoryview, segments: list[Segment], dma: Dma) -> int:
    """Write `data` there, as far as there is room; returns the bytes written."""
    position = 0
    for iova, length in segments:
        piece = data[position : position + length]
        if not piece:
            break
        dma.write(iova, piece)
        position += len(piece)
    return position
