"""Conversations are rendered by the model's chat template; prefixes of them tell which characters are trained."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from qlora_dist.data.record import Message
from qlora_dist.errors import DataError

PLAIN = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '### Response:\\n' + message.content | trim + eos_token + ('' if loop.last else '\\n\\n') -}}
{%- elif message.role == 'user' -%}
{{- '### Instruction:\\n' + message.content | trim + '\\n\\n' -}}
{%- else -%}
{{- message.content | trim + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}
"""
"""The template of models that have none (after Alpaca): sections headed `### Instruction:` and `### Response:`."""

PROBE = "\u2042probe\u2042"
REPAIR = "Set render.chat_template of the domain to a Jinja file whose rendering of a conversation's beginning is the"
REPAIR += " beginning of its rendering."


class RefusedError(DataError):
    """A conversation that the template itself refuses: an unknown role, say."""


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `start` to `end` of a rendered conversation: one assistant turn, its end token included."""

    start: int
    end: int


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template, and the special tokens that it may name."""

    source: str
    special_tokens: tuple[tuple[str, str], ...] = ()

    def render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        """Returns the conversation as text, as `apply_chat_template` of transformers would.

        Templates that ask for today's date get their own default one: the same records always give the same rows.

        Raises:
            RefusedError: if the template refuses the conversation.
        """
        from jinja2 import TemplateError

        names = dict(self.special_tokens) | {"tools": None, "documents": None}
        try:
            text: str = _compiled(self.source).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **names
            )
        except (TemplateError, TypeError) as error:
            roles = ", ".join(m["role"] for m in messages)
            raise RefusedError(f"The chat template refuses a conversation of {roles}: {error}.") from error
        return text

    def conversation(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """Renders a conversation and finds its assistant turns.

        A turn starts where the rendering of all before it, with the generation prompt, ends; that must be a prefix of
        the whole. It ends with the text that closes an assistant turn. A system turn that the template has no place
        for goes in front of the first user turn.

        Raises:
            DataError: if a prefix isn't stable, or a user's words would be trained.
        """
        if messages[0]["role"] == "system" and not self.takes_system:
            messages = _folded(messages)
        whole = self.render(messages)
        spans: list[Span] = []
        for k, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self.render(messages[:k], add_generation_prompt=True)
                if not whole.startswith(prompt):
                    raise DataError(_unstable(whole, prompt, k))
                _check_prompt(whole, spans, prompt, messages[k - 1])
                spans.append(Span(len(prompt), self._end(whole, len(prompt), message["content"])))
        return whole, spans

    @cached_property
    def takes_system(self) -> bool:
        """Says whether the template renders a system turn, and at the same place whatever comes after it."""
        turns: list[Message] = [{"role": "system", "content": PROBE}, {"role": "user", "content": "."}]
        answer: Message = {"role": "assistant", "content": "."}
        try:
            prompt, whole = self.render(turns, add_generation_prompt=True), self.render([*turns, answer])
        except DataError:
            return False
        return PROBE in prompt and whole.startswith(prompt)

    @cached_property
    def closing(self) -> str:
        """The text that closes an assistant turn, blanks after it left out, e.g. `<|im_end|>`."""
        turns: list[Message] = [{"role": "user", "content": "."}, {"role": "assistant", "content": PROBE}]
        text = self.render(turns)
        if PROBE not in text:
            raise DataError("The chat template leaves out what the assistant says.")
        return text.rpartition(PROBE)[2].rstrip()

    def _end(self, whole: str, start: int, content: str) -> int:
        said = content.strip()
        at = whole.find(said, start)
        at = at + len(said) if at >= 0 else start  # a template may rewrite what is said (reasoning, say)
        end = whole.find(self.closing, at) if self.closing else at
        if end < 0 or (at == start and not self.closing):
            raise DataError(
                f"The chat template renders an assistant turn without its closing {self.closing!r}. {REPAIR}"
            )
        return end + len(self.closing)


def _check_prompt(whole: str, spans: list[Span], prompt: str, asked: Message) -> None:
    """Checks that what was asked last lies between the trained spans, not inside one."""
    start = spans[-1].end if spans else 0
    if len(prompt) < start or asked["content"].strip() not in whole[start : len(prompt)]:
        shown = asked["content"].strip()[:60]
        raise DataError(f"The chat template would train words of the {asked['role']} ({shown!r}). {REPAIR}")


def _unstable(whole: str, prompt: str, turn: int) -> str:
    at = next((i for i, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), min(len(whole), len(prompt)))
    wanted, found = prompt[at : at + 40], whole[at : at + 40]
    return f"The chat template is not prefix-stable: before turn {turn} it renders {wanted!r}, then {found!r}. {REPAIR}"


def _folded(messages: list[Message]) -> list[Message]:
    system, first, *rest = messages
    return [{"role": first["role"], "content": f"{system['content'].strip()}\n\n{first['content']}"}, *rest]


@lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    import json

    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Reads `{% generation %}` blocks, which mark the assistant's words in some templates, as plain text."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own way

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise DataError(f"The chat template is no valid Jinja: {error}.") from error
