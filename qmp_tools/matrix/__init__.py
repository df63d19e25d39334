"""Many proofs at a time: axes and their cells, the machine's resources, and the result cache."""
