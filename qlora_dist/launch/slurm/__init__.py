"""The Slurm launcher: a plan's jobs as arrays that Slurm runs to the end by itself, whoever submitted them."""
