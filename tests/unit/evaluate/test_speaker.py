from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_dist.chat import Talk, talk
from qlora_dist.config.stages import BaseConfig
from qlora_dist.errors import ConfigError, ModelError
from qlora_dist.evaluate.generate import generate
from qlora_dist.evaluate.speaker import Sampling, Speaker, draw, named_adapters
from qlora_dist.model.base import prepare_base
from qlora_dist.testing import save_tiny_model

from .models import model_config, save_lora

ASK = [{"role": "user", "content": "What is it?"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("speaker")
    save_tiny_model(root / "model")
    base = root / "base"
    base.mkdir()
    prepare_base(BaseConfig(model=model_config(root)), {}, base)
    for name in ("a.b", "c"):
        (root / name).mkdir()
    return {
        "base": base,
        "a.b": save_lora(base, root / "a.b" / "adapter", seed=1, scale=0.5),
        "c": save_lora(base, root / "c" / "adapter", seed=2, scale=0.5),
        "root": root,
    }


@pytest.fixture(scope="module")
def speaker(folders: dict[str, Path]) -> Speaker:
    return Speaker.open({"a.b": folders["a.b"], "c": folders["c"]})


def say(speaker: Speaker, name: str, **sampling: object) -> str:
    told = Sampling(**{"max_new_tokens": 24, **sampling})  # type: ignore[arg-type]
    return "".join(p.text for p in speaker.stream(name, speaker.prompter.prompt_ids(ASK), told))


def alone(folders: dict[str, Path], speaker: Speaker, name: str) -> str:
    """Answers with a model of its own, by transformers' generation."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders["root"] / "model", dtype=torch.bfloat16)
    if name != "base":
        model = PeftModel.from_pretrained(model, str(folders[name]))
    found = next(generate(model, speaker.prompter, [speaker.prompter.prompt_ids(ASK)], 24, 4096))
    return found.text


@pytest.mark.parametrize("name", ["base", "a.b", "c", "base", "a.b"])
def test_each_model_says_what_it_says_alone_whoever_spoke_before(
    folders: dict[str, Path], speaker: Speaker, name: str
) -> None:
    assert say(speaker, name).strip() == alone(folders, speaker, name)


def test_models_differ_from_each_other(speaker: Speaker) -> None:
    assert len({say(speaker, name) for name in speaker.names}) == 3


def test_pieces_are_whole_characters_and_end_with_a_reason(speaker: Speaker) -> None:
    pieces = list(speaker.stream("c", speaker.prompter.prompt_ids(ASK), Sampling(max_new_tokens=12)))
    assert pieces[-1].text == ""
    assert pieces[-1].finish == "length"
    assert all(p.finish == "" for p in pieces[:-1])


def test_stop_text_is_cut_off_even_where_it_falls_between_pieces(speaker: Speaker) -> None:
    whole = say(speaker, "c")
    stop = whole[6:9]
    assert say(speaker, "c", stop=(stop,)) == whole[: whole.index(stop)]


def test_seed_fixes_a_drawn_answer(speaker: Speaker) -> None:
    drawn = [say(speaker, "base", temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_nucleus_never_draws_what_lies_outside_it() -> None:
    logits_V = torch.tensor([0.6, 0.3, 0.1]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(logits_V, Sampling(temperature=1.0, top_p=0.7), generator) for _ in range(300)]
    assert set(drawn) == {0, 1}
    assert drawn.count(0) / 300 == pytest.approx(2 / 3, abs=0.08)


def test_batched_generation_answers_as_one_by_one(folders: dict[str, Path], speaker: Speaker) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders["root"] / "model")
    prompts = [speaker.prompter.text_ids(text) for text in ("a", "some longer text to go on with", "two words")]
    together = list(generate(model, speaker.prompter, prompts, 12, 4096))
    alone = [next(generate(model, speaker.prompter, [p], 12, 1)) for p in prompts]
    assert together == alone


def test_unknown_adapter_and_endless_prompt_are_refused(speaker: Speaker) -> None:
    with pytest.raises(ModelError, match=r"Did you mean a\.b"):
        list(speaker.stream("a.c", [1], Sampling()))
    with pytest.raises(ConfigError, match="512"):
        list(speaker.stream("c", [1] * 600, Sampling()))


def test_adapter_of_another_base_is_refused(tmp_path: Path, speaker: Speaker) -> None:
    save_tiny_model(tmp_path / "model", seed=5)
    base = tmp_path / "base"
    base.mkdir()
    prepare_base(BaseConfig(model=model_config(tmp_path)), {}, base)
    with pytest.raises(ModelError, match="trained on"):
        speaker.add("foreign", save_lora(base, tmp_path / "foreign"))
    assert "foreign" not in speaker.names


def test_names_come_from_the_run_or_are_given(tmp_path: Path) -> None:
    found = named_adapters([f"{tmp_path}/legal/adapter", f"mine={tmp_path}/x", f"{tmp_path}/legal-0"])
    assert list(found) == ["legal", "mine", "legal-0"]
    with pytest.raises(ModelError, match="two models"):
        named_adapters(["a/x", "b/x"])


def test_talk_switches_forgets_and_survives_a_wrong_command(speaker: Speaker) -> None:
    out = io.StringIO()
    lines = ["hello", "/adapter c", "hello", "/adapter nobody", "/reset", "hello", "/exit", "never"]
    talk(Talk(speaker, "a.b", Sampling(max_new_tokens=8)), lines, out)
    text = out.getvalue()
    assert "[c]" in text
    assert "models: base, a.b, c" in text


def test_chat_speaks_on_a_pipe(folders: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "qlora_dist.chat", "--adapter", str(folders["c"]), "--max-new-tokens", "8"]
    done = subprocess.run(command, input="hi\n/base\nhi\n", capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("[c] /adapter NAME switches")
    assert "[base]" in done.stdout


def test_chat_without_anything_to_load_says_so() -> None:
    done = subprocess.run([sys.executable, "-m", "qlora_dist.chat"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Nothing to load")
