"""A front end and a guest that do anything, against the real server: what fuzzers drive.

A `Source` decides everything: Hypothesis, or a coverage-guided fuzzer. What is sent is valid often
enough to get far. Whatever it is, the server must raise nothing, come to rest after a bounded
number of turns, write nowhere but into the slots and the log that it was given, set log bits for
pages of slots alone, and leave no file descriptor and no mapping behind.
"""

from support.hostile.attack import attack
from support.hostile.source import Source

__all__ = ["Source", "attack"]
