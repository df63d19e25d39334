"""One proof: its set-up, its two QEMUs and their device, its steps and its verdict."""
