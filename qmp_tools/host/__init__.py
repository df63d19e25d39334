"""The host: processes and folders that cannot outlive dmaproof, packages, bounds of waits."""
