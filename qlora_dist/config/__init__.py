"""The dataclasses of a run and their checks. No Hydra here: `launch` composes, these are what it composes into."""
