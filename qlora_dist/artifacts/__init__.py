"""Finished folders with a manifest: how they are named, made, owned, checked and read."""
