"""QEMUs: found and fetched, started or attached to, and what is said to them."""
