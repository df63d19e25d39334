"""dmaproof in the test frameworks avocado and pytest."""
