"""Any two QEMUs' RAM, held page against page."""
