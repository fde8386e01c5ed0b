"""The command line, and the launchers that run a plan's jobs."""
