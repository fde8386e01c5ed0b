"""Conversations are rendered by the model's chat template; which characters are trained is told by rendering prefixes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from qlora_dist.data.record import Message
from qlora_dist.errors import DataError

PLAIN = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ '### Response:\\n' + message.content + eos_token + '\\n\\n' }}
{%- elif message.role == 'user' -%}
{{ '### Instruction:\\n' + message.content + '\\n\\n' }}
{%- else -%}
{{ message.content + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}
"""
"""The template of models that have none (after Alpaca): sections headed by `### Instruction:` and `### Response:`."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a rendered conversation, and whether it is trained."""

    text: str
    trained: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template with the special tokens that it may name."""

    source: str
    special_tokens: tuple[tuple[str, str], ...] = ()

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Returns the conversation as text.

        Raises:
            DataError: if the template refuses it.
        """
        import jinja2

        values = dict(self.special_tokens)
        try:
            text: str = _compiled(self.source).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **values
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(m["role"] for m in messages)
            raise DataError(f"chat template: {error} (turns: {roles}).") from error
        return text

    def spans(self, messages: list[Message]) -> list[Span]:
        """Divides the rendered conversation into untrained and trained spans.

        An assistant turn is trained from where the rendering of all before it (with the generation prompt) ends, to
        the end of its closing text.

        Raises:
            DataError: if that rendering is no prefix of the whole.
        """
        whole = self.render(messages)
        spans, at = [], 0
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:k], add_generation_prompt=True)
            content = message["content"].strip()
            start = whole.find(content, len(prompt))
            if not whole.startswith(prompt) or start < 0:
                raise DataError(f"chat template: not prefix-stable at turn {k}.")
            end = start + len(content)
            end = end + len(self._closing()) if whole.startswith(self._closing(), end) else end
            spans += [Span(whole[at : len(prompt)], False), Span(whole[len(prompt) : end], True)]
            at = end
        return [*spans, Span(whole[at:], False)]

    def _closing(self) -> str:
        probe = "\u2042 probe \u2042"
        text = self.render([{"role": "user", "content": "."}, {"role": "assistant", "content": probe}])
        return text.rpartition(probe)[2].rstrip()


@lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)
