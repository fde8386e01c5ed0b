"""`python -m qlora_dist.evaluate.board --entity TEAM`: puts this project's workspace on the W&B server."""

from __future__ import annotations

import argparse
import os
import sys

from qlora_dist.errors import QloraDistError


def main(argv: list[str] | None = None) -> int:
    """Saves the workspace and prints its address; with `--print`, prints its definition and sends nothing."""
    parser = argparse.ArgumentParser(prog="python -m qlora_dist.evaluate.board", description=__doc__)
    parser.add_argument("--entity", required=True, help="the W&B user or team")
    parser.add_argument("--project", default="qlora_dist", help="tracking.project of the runs")
    parser.add_argument("--domains", default="legal", help="held-out sets to show, with commas between")
    parser.add_argument("--print", action="store_true", help="print the definition as JSON and send nothing")
    args = parser.parse_args(argv)
    from qlora_dist.tracking.board import define_board

    try:
        board = define_board(args.entity, args.project, args.domains.split(","))
    except QloraDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if args.print:
        print(board._to_model().model_dump_json(by_alias=True, indent=1))
        return 0
    if not os.environ.get("WANDB_API_KEY"):
        print("error: WANDB_API_KEY isn't set. Set it, or see the definition with --print.", file=sys.stderr)
        return 2
    board.save()
    print(board.url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
