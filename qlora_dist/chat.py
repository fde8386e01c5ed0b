"""`python -m qlora_dist.chat --adapter runs/legal/adapter`: talk to a base with adapters, switched in mid-talk.

The prompts are those of training. Commands: /adapter NAME, /base, /reset, /help, /exit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TextIO

from qlora_dist.data.record import Message
from qlora_dist.errors import QloraDistError
from qlora_dist.evaluate.speaker import BASE, Sampling, Speaker, named_adapters
from qlora_dist.runtime import quiet_libraries

HELP = "/adapter NAME switches, /base talks to the base, /reset forgets the talk, /exit ends."


@dataclass(slots=True)
class Talk:
    """One conversation: who answers, how, and what was said; with `running_text` each line is continued instead."""

    speaker: Speaker
    name: str
    sampling: Sampling
    running_text: bool = False
    said: list[Message] = field(default_factory=list)

    def answer(self, line: str, out: TextIO) -> None:
        """Streams the answer to one line to `out`."""
        if self.running_text:
            prompt = self.speaker.prompter.text_ids(line)
        else:
            self.said.append({"role": "user", "content": line})
            prompt = self.speaker.prompter.prompt_ids(self.said)
        text = ""
        for piece in self.speaker.stream(self.name, prompt, self.sampling):
            out.write(piece.text)
            out.flush()
            text += piece.text
        out.write("\n")
        if not self.running_text:
            self.said.append({"role": "assistant", "content": text or "."})

    def command(self, line: str, out: TextIO) -> bool:
        """Does what a line that starts with "/" says; returns whether the talk goes on."""
        word, _, name = line.partition(" ")
        names = self.speaker.names
        if word in {"/exit", "/quit"}:
            return False
        if word == "/reset":
            self.said.clear()
        elif word == "/base" or (word == "/adapter" and name.strip() in names):
            self.name = BASE if word == "/base" else name.strip()
            out.write(f"[{self.name}]\n")
        else:
            out.write(f"{HELP}\nmodels: {', '.join(names)}\n")
        return True


def talk(talk: Talk, lines: Iterable[str], out: TextIO) -> None:
    """Answers line after line until they end or one says /exit; a failed answer is told, and the talk goes on."""
    for line in lines:
        text = line.strip()
        try:
            if text.startswith("/"):
                if not talk.command(text, out):
                    return
            elif text:
                talk.answer(text, out)
        except QloraDistError as error:
            out.write(f"error: {error}\n")
            talk.said = talk.said[:-1]


def main(argv: list[str] | None = None) -> int:
    """Loads what the command line names and talks until the input ends."""
    parser = argparse.ArgumentParser(prog="python -m qlora_dist.chat", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--adapter", action="append", default=[], metavar="[NAME=]FOLDER", help="may be repeated")
    parser.add_argument("--base", default="", help="a model folder, instead of the one the adapter was trained on")
    parser.add_argument("--chat-template", default="", help="the Jinja file of render.chat_template, if one was set")
    parser.add_argument("--running-text", action="store_true", help="continue each line instead of answering it")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    args = parser.parse_args(argv)
    quiet_libraries()
    try:
        speaker = Speaker.open(named_adapters(args.adapter), args.base, args.chat_template)
    except QloraDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p)
    started = Talk(speaker, speaker.names[-1] if args.adapter else BASE, sampling, args.running_text)
    print(f"[{started.name}] {HELP}", file=sys.stderr)
    try:
        talk(started, _lines(), sys.stdout)
    except KeyboardInterrupt:
        print()
    return 0


def _lines() -> Iterable[str]:
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


if __name__ == "__main__":
    sys.exit(main())
