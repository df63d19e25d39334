"""Memory shared with a process that is not trusted; see ``_mapping.c``."""

class SharedMapping:
    """A writable mapping of `length` bytes of a file, shared, from byte `offset` on.

    Where the file has become too short it reads as zeros, and what is written is nobody's.
    The memory is unmapped when nothing refers to it any more.

    Raises:
        OSError: the file cannot be mapped so.
    """

    def __init__(self, fd: int, length: int, offset: int, /) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def lost(self) -> bool:
        """Whether the file became too short while it was mapped, and some byte that had gone was
        touched."""
