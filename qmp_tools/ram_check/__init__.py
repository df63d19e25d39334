"""Compare all RAM of any two QEMUs after a migration, page by page."""
