"""The guests: built, kept, and told what to do."""
