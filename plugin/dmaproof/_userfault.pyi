"""Guest RAM that arrives while the device runs; see ``_userfault.c``."""

from ._mapping import SharedMapping

class Userfault:
    """A userfaultfd that is closed when the peer of a connected socket hangs up.

    Faults of the kernel itself are not covered (UFFD_USER_MODE_ONLY), so that no privilege is
    needed.

    Raises:
        OSError: this machine has no userfaultfd, or does not permit it.
    """

    def __init__(self, socket: int, /) -> None: ...
    def fileno(self) -> int:
        """Return the file descriptor; -1 after it was closed."""
    def register(self, mapping: SharedMapping, /) -> None:
        """Forget the pages of a mapping, and have each access to a missing page wait.

        Raises:
            OSError: the kernel refuses the mapping.
        """
    def close(self) -> None:
        """Close the file descriptor; no access waits any more."""
