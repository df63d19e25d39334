"""Memory shared with an untrusted process; see ``_mapping.c``."""

class SharedMapping:
    """A writable, shared mapping of `length` bytes of a file from byte `offset` on.

    If the file is truncated, an access beyond its end replaces the mapping with private zeros. The
    memory is unmapped when nothing refers to it any more.

    Raises:
        OSError: the file cannot be mapped in this way.
    """

    def __init__(self, fd: int, length: int, offset: int, /) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def lost(self) -> bool:
        """Whether the file was truncated while it was mapped, and a missing byte was accessed."""
