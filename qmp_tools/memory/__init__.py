"""How the RAM of a QEMU is reached: shared files, process memory, copies of it; and compared."""
