"""Read the RAM of a QEMU from shared files, process memory or copies, and compare it."""
