"""One migration and its scenarios; and a third party's migration, watched."""
