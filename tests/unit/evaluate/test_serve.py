"""The server, asked by OpenAI's own client over a real socket."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from qlora_dist.config.stages import BaseConfig
from qlora_dist.evaluate.speaker import Speaker
from qlora_dist.model.base import prepare_base
from qlora_dist.serve import Server, make_app
from qlora_dist.testing import save_tiny_model

from .models import model_config, save_lora

openai = pytest.importorskip("openai", reason="pip install openai")
uvicorn = pytest.importorskip("uvicorn", reason="pip install -e .[serve]")
pytest.importorskip("starlette", reason="pip install -e .[serve]")
ASK: Any = [{"role": "user", "content": "What is it?"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    root = tmp_path_factory.mktemp("serve")
    save_tiny_model(root / "model")
    base = root / "base"
    base.mkdir()
    prepare_base(BaseConfig(model=model_config(root)), {}, base)
    for name, seed in (("first", 1), ("late", 2)):
        (root / name).mkdir()
        save_lora(base, root / name / "adapter", seed=seed, scale=0.5)
    speaker = Speaker.open({"first": root / "first" / "adapter"})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(Server(speaker, root)), port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    server.should_exit = True
    thread.join(10)


def ask(client: Any, model: str, **more: Any) -> Any:
    return client.chat.completions.create(model=model, messages=ASK, max_tokens=12, temperature=0, **more)


def test_models_are_listed(client: Any) -> None:
    assert {"base", "first"} <= {m.id for m in client.models.list()}


def test_chat_answers_with_usage_and_a_reason_to_end(client: Any) -> None:
    answer = ask(client, "first")
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_stream_says_the_same_as_the_whole_answer(client: Any) -> None:
    chunks = list(ask(client, "first", stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ask(client, "first").choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_adapter_is_loaded_when_it_is_first_asked_for(client: Any) -> None:
    late = ask(client, "late").choices[0].message.content
    assert "late" in {m.id for m in client.models.list()}
    assert late != ask(client, "first").choices[0].message.content != ask(client, "base").choices[0].message.content


def test_completions_continue_running_text_and_stop(client: Any) -> None:
    whole = client.completions.create(model="first", prompt="The licence", max_tokens=12).choices[0]
    assert whole.text
    stop = whole.text[4:6]
    cut = client.completions.create(model="first", prompt="The licence", max_tokens=12, stop=stop).choices[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"


def test_several_clients_at_once_get_their_own_adapters_answer(client: Any) -> None:
    alone = {name: ask(client, name).choices[0].message.content for name in ("base", "first", "late")}
    found: list[tuple[str, str]] = []

    def run(name: str) -> None:
        found.append((name, ask(client, name).choices[0].message.content))

    threads = [threading.Thread(target=run, args=(name,)) for name in ("base", "first", "late") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    assert all(text == alone[name] for name, text in found)


@pytest.mark.parametrize("name", ["nobody", "../first", "/etc"])
def test_unknown_model_is_a_404_that_names_those_there_are(client: Any, name: str) -> None:
    with pytest.raises(openai.NotFoundError, match="base, first"):
        ask(client, name)


def test_broken_request_is_a_400(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt"):
        client.completions.create(model="first", prompt=["a", "b"])
