"""Functions for bytes that are spread over the segments of a descriptor chain."""

from __future__ import annotations

from ..dma import Dma
from ..virtqueue import Segment


def take(segments: list[Segment], start: int, length: int | None) -> list[Segment]:
    """Cut a part out of a request's buffers.

    Args:
        segments: the buffers, in order.
        start: the first byte of the part.
        length: the number of bytes; None takes all the rest.

    Returns:
        The pieces of the buffers that hold the part; fewer bytes if the buffers end before.

    Example:
        >>> take([Segment(0x1000, 16), Segment(0x8000, 512)], 12, 8)
        [Segment(iova=4108, length=4), Segment(iova=32768, length=4)]
    """
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
    """Read a request's buffers.

    Args:
        segments: the buffers, in order.
        dma: reads guest RAM.

    Returns:
        The content of all buffers, joined.

    Raises:
        MemoryAccessError: a buffer lies outside guest RAM.
    """
    return b"".join(dma.read(*segment) for segment in segments)


def scatter(data: bytes | memoryview, segments: list[Segment], dma: Dma) -> int:
    """Write into a request's buffers, up to their end.

    Args:
        data: the bytes to write.
        segments: the buffers, in order.
        dma: writes guest RAM.

    Returns:
        The number of bytes written.

    Raises:
        MemoryAccessError: a buffer lies outside guest RAM.
    """
    position = 0
    for iova, length in segments:
        piece = data[position : position + length]
        if not piece:
            break
        dma.write(iova, piece)
        position += len(piece)
    return position
