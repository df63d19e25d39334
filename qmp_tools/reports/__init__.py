"""What a run tells: the JSON, and all that is made of it."""
