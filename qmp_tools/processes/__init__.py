"""QEMUs and devices as processes that cannot outlive the tool, and machines made of them."""
