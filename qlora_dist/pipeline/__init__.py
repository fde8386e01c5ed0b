"""The plan of a run, and the running of its nodes."""
