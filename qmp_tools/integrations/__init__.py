"""dmaproof in the test frameworks that people have: avocado and pytest."""
