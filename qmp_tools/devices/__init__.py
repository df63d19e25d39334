"""The devices that a proof can have: what it needs to know of one, and a file for each kind."""
