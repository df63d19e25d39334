"""A front end and a guest that send anything to the real server, driven by fuzzers.

A `Source` decides everything: Hypothesis, or a coverage-guided fuzzer. Enough of the traffic is
valid to reach deep states. For any traffic the server must raise nothing, become idle after a
bounded number of turns, write only into the slots and the log that it was given, set log bits only
for pages of slots, and leak no file descriptor and no mapping.
"""

from support.hostile.attack import attack
from support.hostile.source import Source

__all__ = ["Source", "attack"]
