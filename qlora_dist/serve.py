"""`python -m qlora_dist.serve --adapter runs/legal/adapter`: OpenAI's chat and completions endpoints on this machine.

`model` names the adapter (or `base`). With `--folder runs`, `runs/NAME/adapter` is loaded when NAME is first asked for.
It makes one answer at a time: for trying things out, and for tests of clients; vLLM serves the same folders at scale.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dist.errors import ConfigError, ModelError, QloraDistError
from qlora_dist.evaluate.speaker import Sampling, Speaker, named_adapters
from qlora_dist.runtime import quiet_libraries

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: which model, the prompt's tokens, how to sample, in which of OpenAI's two forms to answer."""

    model: str
    prompt: list[int]
    sampling: Sampling
    is_chat: bool


class Server:
    """A speaker behind HTTP: it finds adapters by name and puts answers into OpenAI's form."""

    def __init__(self, speaker: Speaker, folder: Path | None = None) -> None:
        self.speaker, self.folder = speaker, folder

    def find(self, name: str) -> None:
        """Loads `folder/NAME/adapter` if the model isn't known yet.

        Raises:
            ModelError: if there is none.
        """
        if name in self.speaker.names:
            return
        path = self.folder / name / "adapter" if self.folder and NAME.fullmatch(name) else None
        if path is None or not path.is_dir():
            raise ModelError(f"model={name}: no such adapter. There are: {', '.join(self.speaker.names)}.")
        self.speaker.add(name, path)

    def read(self, body: dict[str, Any], *, is_chat: bool) -> Asked:
        """Reads a request's body.

        Raises:
            ConfigError: if a field is absent or of the wrong type.
        """
        stop = body.get("stop") or ()
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 256
        try:
            sampling = Sampling(
                max_new_tokens=int(limit),
                temperature=float(body.get("temperature", 0.0) or 0.0),
                top_p=float(body.get("top_p", 1.0) or 1.0),
                seed=int(body.get("seed") or 0),
                stop=(stop,) if isinstance(stop, str) else tuple(map(str, stop)),
            )
            if is_chat:
                turns: Any = [{"role": str(m["role"]), "content": str(m["content"])} for m in body["messages"]]
                prompt = self.speaker.prompter.prompt_ids(turns)
            else:
                prompt = self.speaker.prompter.text_ids(_text(body["prompt"]))
            return Asked(str(body["model"]), prompt, sampling, is_chat)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"The request's {error} is absent or of the wrong type.") from error

    def answer(self, asked: Asked) -> dict[str, Any]:
        """Returns the whole answer as OpenAI's object."""
        pieces = list(self.speaker.stream(asked.model, asked.prompt, asked.sampling))
        text = "".join(p.text for p in pieces)
        said = {"message": {"role": "assistant", "content": text}} if asked.is_chat else {"text": text}
        num_said = len(self.speaker.prompter.text_ids(text)) - 1
        usage = {"prompt_tokens": len(asked.prompt), "completion_tokens": num_said}
        usage["total_tokens"] = sum(usage.values())
        return {**_head(asked, "chat.completion"), "choices": [_choice(said, pieces[-1].finish)], "usage": usage}

    def chunks(self, asked: Asked) -> Iterator[str]:
        """Yields the answer as server-sent events."""
        head = _head(asked, "chat.completion.chunk")
        pieces = self.speaker.stream(asked.model, asked.prompt, asked.sampling)
        try:
            for piece in pieces:
                said = (
                    {"delta": {"role": "assistant", "content": piece.text}} if asked.is_chat else {"text": piece.text}
                )
                yield _event({**head, "choices": [_choice(said, piece.finish or None)]})
        except QloraDistError as error:
            yield _event({"error": {"message": str(error), "type": "invalid_request_error"}})
        yield "data: [DONE]\n\n"


def make_app(server: Server) -> Any:
    """Returns the ASGI application.

    Raises:
        ConfigError: if Starlette isn't installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.requests import Request
        from starlette.responses import JSONResponse, Response, StreamingResponse
        from starlette.routing import Route
    except ImportError as error:
        raise ConfigError(f"{error}. Install it with: pip install 'qlora_dist[serve]'.") from error

    def complain(message: str, status: int, code: str | None = None) -> Response:
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "code": code}}, status)

    async def models(_: Request) -> Response:
        names = server.speaker.names
        return JSONResponse(
            {"object": "list", "data": [{"id": n, "object": "model", "created": 0, "owned_by": ""} for n in names]}
        )

    async def complete(request: Request, *, is_chat: bool) -> Response:
        try:
            body = json.loads(await request.body())
            await run_in_threadpool(server.find, str(body.get("model")))
            asked = server.read(body, is_chat=is_chat)
            if body.get("stream"):
                return StreamingResponse(server.chunks(asked), media_type="text/event-stream")
            return JSONResponse(await run_in_threadpool(server.answer, asked))
        except ModelError as error:
            return complain(str(error), 404, "model_not_found")
        except (QloraDistError, ValueError, AttributeError) as error:
            return complain(str(error), 400)

    async def chat(request: Request) -> Response:
        return await complete(request, is_chat=True)

    async def completions(request: Request) -> Response:
        return await complete(request, is_chat=False)

    routes = [Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])]
    return Starlette(routes=[*routes, Route("/v1/completions", completions, methods=["POST"])])


def _head(asked: Asked, kind: str) -> dict[str, Any]:
    kind = kind if asked.is_chat else "text_completion"
    return {"id": f"cmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": asked.model}


def _choice(said: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": 0, **said, "finish_reason": finish, "logprobs": None}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _text(prompt: Any) -> str:
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise TypeError("prompt (one string)")
    return prompt


def main(argv: list[str] | None = None) -> int:
    """Loads what the command line names and serves until it is ended."""
    parser = argparse.ArgumentParser(prog="python -m qlora_dist.serve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--adapter", action="append", default=[], metavar="[NAME=]FOLDER", help="may be repeated")
    parser.add_argument("--folder", type=Path, help="serve FOLDER/NAME/adapter as NAME, loaded when first asked for")
    parser.add_argument("--base", default="", help="a model folder, instead of the one the adapter was trained on")
    parser.add_argument("--chat-template", default="", help="the Jinja file of render.chat_template, if one was set")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(argv)
    quiet_libraries()
    try:
        server = Server(Speaker.open(named_adapters(args.adapter), args.base, args.chat_template), args.folder)
        app = make_app(server)
    except QloraDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    import uvicorn

    print(f"serving {', '.join(server.speaker.names)} on http://{args.host}:{args.port}/v1", file=sys.stderr)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
