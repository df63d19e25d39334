"""Find, fetch, start and attach to QEMUs, and talk to them over QMP."""
