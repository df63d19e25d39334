"""QEMU's side of the proof: QEMU processes over QMP, migration, the comparison and the verdict."""
