"""A base with several adapters that answers: one is switched on for each answer, and new ones come while it runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_dist.config.data import RenderConfig
from qlora_dist.config.model import ModelConfig, Quantization
from qlora_dist.data.encode import Encoder
from qlora_dist.errors import ConfigError, ModelError, nearest
from qlora_dist.evaluate.generate import Prompter

if TYPE_CHECKING:
    import torch

    from qlora_dist.model.base import Base

BASE = "base"
BROKEN = "\ufffd"
"""How a decoder shows bytes that are no whole character yet."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn: temperature 0 takes the likeliest; `top_p` leaves out the unlikely rest."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(slots=True)
class Piece:
    """A piece of an answer; the last one is empty and says why it ended (`stop`, or `length`)."""

    text: str
    finish: str = ""


class Speaker:
    """A loaded base, its adapters by name, and the prompts of training. One answer is made at a time."""

    def __init__(self, model: Any, base: Base, prompter: Prompter) -> None:
        self._model, self._base, self.prompter = model, base, prompter
        self._adapters: dict[str, Path] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, adapters: Mapping[str, Path], base: str = "", chat_template: str = "") -> Speaker:
        """Loads the base that the first adapter was trained on (or `base`), as it was trained, and all adapters.

        Raises:
            ModelError: if there is nothing to load, or an adapter belongs to another base.
        """
        from qlora_dist.model.adapter import read_provenance
        from qlora_dist.model.base import describe_base, load_model, model_folder

        if adapters:
            told = read_provenance(next(iter(adapters.values())))
            path, revision, quantization = base or told.base_path, told.base_revision, Quantization[told.quantization]
        elif base:
            path, revision, quantization = base, "", Quantization.none
        else:
            raise ModelError("Nothing to load: name an adapter's folder or a base model's.")
        folder = model_folder(path, revision)
        described = describe_base(folder, path, revision)
        model = load_model(described, ModelConfig(path=path, revision=revision, quantization=quantization))
        model.eval()
        prompter = Prompter(Encoder(folder, RenderConfig(chat_template=chat_template)))
        speaker = cls(model, described, prompter)
        for name, adapter in adapters.items():
            speaker.add(name, adapter)
        return speaker

    @property
    def names(self) -> list[str]:
        """What can be asked: the base and every adapter."""
        return [BASE, *self._adapters]

    def add(self, name: str, folder: Path) -> None:
        """Loads one more adapter beside the others; an answer that is being made is finished first."""
        from qlora_dist.model.adapter import check_adapter, load_adapter

        if name in self.names:
            raise ModelError(f"{name}: there is an adapter of that name ({self._adapters.get(name, 'the base')}).")
        check_adapter(folder, self._base)
        with self._lock:
            if not self._adapters:
                self._model = load_adapter(self._model, folder, self._base)
                self._first = name
            else:
                self._model.load_adapter(str(folder), adapter_name=_inner(name))
            self._adapters[name] = folder
            self._model.eval()

    def stream(self, name: str, prompt: Sequence[int], sampling: Sampling) -> Iterator[Piece]:
        """Yields an answer in pieces of whole characters, then an empty piece that says why it ended.

        Raises:
            ModelError: if there is no such adapter.
            ConfigError: if the prompt leaves no room for an answer.
        """
        if name not in self.names:
            raise ModelError(f"{name}: no such adapter. {nearest(name, self.names)}")
        room = (self._base.max_position_embeddings or 2**30) - len(prompt)
        if room <= 0:
            raise ConfigError(
                f"The prompt has {len(prompt)} tokens; the model reads {self._base.max_position_embeddings}."
            )
        with self._lock, self._switched(name):
            yield from self._pieces(prompt, sampling, min(room, sampling.max_new_tokens))

    def _switched(self, name: str) -> AbstractContextManager[Any]:
        if name == BASE:
            return nullcontext() if not self._adapters else self._model.disable_adapter()
        self._model.set_adapter("default" if name == self._first else _inner(name))
        return nullcontext()

    def _pieces(self, prompt: Sequence[int], sampling: Sampling, limit: int) -> Iterator[Piece]:
        said: list[int] = []
        shown = ""
        for token in self._tokens(prompt, sampling, limit):
            said.append(token)
            text = self.prompter.decode(said)
            ends = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
            if ends:
                yield from (Piece(text[len(shown) : min(ends)]), Piece("", "stop"))
                return
            held = max((_overlap(text, stop) for stop in sampling.stop), default=0)
            whole = text[: len(text) - held] if not text.endswith(BROKEN) else shown
            if len(whole) > len(shown):
                yield Piece(whole[len(shown) :])
                shown = whole
        rest = self.prompter.decode(said)[len(shown) :]
        if rest:
            yield Piece(rest)
        yield Piece("", "length" if len(said) == limit else "stop")

    def _tokens(self, prompt: Sequence[int], sampling: Sampling, limit: int) -> Iterator[int]:
        import torch

        place = next(self._model.parameters()).device
        generator = torch.Generator().manual_seed(sampling.seed)
        tokens_BT, past = torch.tensor([list(prompt)], device=place), None
        for _ in range(limit):
            with torch.inference_mode():
                out = self._model(input_ids=tokens_BT, past_key_values=past, use_cache=True, logits_to_keep=1)
            token = draw(out.logits[0, -1].float().cpu(), sampling, generator)
            if token in self.prompter.stop_ids:
                return
            yield token
            tokens_BT, past = torch.tensor([[token]], device=place), out.past_key_values


def draw(logits_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Returns the likeliest token at temperature 0, else one drawn from the nucleus (Holtzman, arXiv 1904.09751)."""
    import torch

    if sampling.temperature == 0:
        return int(logits_V.argmax())
    sorted_V, order_V = (logits_V / sampling.temperature).softmax(-1).sort(descending=True)
    sorted_V[sorted_V.cumsum(-1) - sorted_V >= sampling.top_p] = 0  # the first token always stays
    return int(order_V[torch.multinomial(sorted_V, 1, generator=generator)])


def _inner(name: str) -> str:
    return "lora_" + "".join(c if c.isalnum() else f"_{ord(c):x}_" for c in name)  # module names hold no dots


def _overlap(text: str, stop: str) -> int:
    """Returns how many of the last characters may be the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def named_adapters(given: Sequence[str]) -> dict[str, Path]:
    """Reads `NAME=FOLDER` or `FOLDER`; a run's `adapter/` is called by the run, another folder by its own name.

    Raises:
        ModelError: if two would have one name.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, _, path = text.rpartition("=")
        folder = Path(path).expanduser().resolve()
        name = name or (folder.parent.name if folder.name == "adapter" else folder.name)
        if name in found or name == BASE:
            raise ModelError(f"{text}: two models would be called {name!r}. Name it: --adapter OTHER={path}.")
        found[name] = folder
    return found
