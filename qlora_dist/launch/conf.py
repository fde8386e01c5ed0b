"""The folder of config files, and the help page written from it: no Hydra here, so that `--help` answers at once."""

from __future__ import annotations

from pathlib import Path

HELP = """\
Fine-tune QLoRA adapters on shards of domain corpora, merge them exactly, score them, and report.

  python -m qlora_dist.launch +experiment=legal
  python -m qlora_dist.launch +experiment=legal train.learning_rate=1e-4 lora.lora_rank=16
  python -m qlora_dist.launch domain=[legal,code] name=both plan_only=true
  python -m qlora_dist.launch -m +experiment=legal lora.lora_rank=8,16

Groups (choose with group=option, an experiment with +experiment=option):
{groups}

Keys are overridden with key=value; an unknown one is an error that names the nearest.
  plan_only=true   print what would run, and what changed since last time, and start nothing
  name=NAME        results go to runs/NAME
  root=FOLDER      instead of runs/ in this folder
  --cfg job        print the composed config instead of running it
  --config-dir DIR search your own config files first
  -m, --multirun   run every combination of comma-separated values
  --hydra-help     Hydra's own flags
"""


def help_text() -> str:
    """Returns the help page, with the groups and options that the config folder holds."""
    groups = sorted(folder for folder in conf_folder().iterdir() if folder.is_dir())
    width = max(len(folder.name) for folder in groups)
    lines = [f"  {g.name:<{width}}  {', '.join(sorted(f.stem for f in g.glob('*.yaml')))}" for g in groups]
    return HELP.format(groups="\n".join(lines))


def conf_folder() -> Path:
    """Returns the folder of config files: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"
