"""Build, cache and control the guests."""
