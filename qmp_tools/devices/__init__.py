"""The devices that a proof can use: their common interface, and a file for each kind."""
