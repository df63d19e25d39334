"""The reports of a run: the JSON, and the forms that are made from it."""
