"""The host: processes and folders that cannot outlive the tool, packages, limits of waits."""
