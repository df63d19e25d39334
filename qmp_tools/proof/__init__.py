"""One proof: what it depends on, its two QEMUs and their device, its steps and its verdict."""
