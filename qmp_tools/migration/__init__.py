"""A migration and the ways it can go; and migrations of somebody else's, watched."""
