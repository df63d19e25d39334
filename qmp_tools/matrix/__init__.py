"""Many proofs at a time: axes and their cells, room on the machine, results that are kept."""
