"""Masks of chat templates, as a table of strings in which « and » stand around what is trained."""

from itertools import groupby
from pathlib import Path

import pytest

from qlora_dist.config.data import RenderConfig, TrainOn
from qlora_dist.data.encode import Encoded, Encoder
from qlora_dist.data.record import Message, Record
from qlora_dist.errors import DataError

from .chat_templates import FAMILIES
from .conftest import save_tokenizer

SINGLE = [("user", "Is it legal?"), ("assistant", "No.")]
MULTI = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")]
SYSTEM = [("system", "Be brief."), *MULTI]

TABLE = [
    ("plain", SINGLE, "<s>### Instruction:\nIs it legal?\n\n### Response:\n«No.</s>»"),
    (
        "plain",
        SYSTEM,
        "<s>Be brief.\n\n### Instruction:\nQ1\n\n### Response:\n«A1</s>»\n\n"
        "### Instruction:\nQ2\n\n### Response:\n«A2</s>»",
    ),
    (
        "llama3",
        SYSTEM,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«A1<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«A2<|eot_id|>»",
    ),
    (
        "llama3",
        [("user", "  Q \n"), ("assistant", "\n A ")],
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«A<|eot_id|>»",
    ),
    (
        "qwen3",
        SYSTEM,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n"
        "<|im_start|>assistant\n«A1<|im_end|>»\n<|im_start|>user\nQ2<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\n\n</think>\n\nA2<|im_end|>»\n",
    ),
    (
        "qwen3",
        [("user", "Q"), ("assistant", "<think>\nhm\n</think>\n\nA")],
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n«<think>\nhm\n</think>\n\nA<|im_end|>»\n",
    ),
    ("mistral", MULTI, "<s>[INST] Q1[/INST]« A1</s>»[INST] Q2[/INST]« A2</s>»"),
    ("mistral", SYSTEM, "<s>[INST] Be brief.\n\nQ1[/INST]« A1</s>»[INST] Q2[/INST]« A2</s>»"),
    (
        "gemma",
        MULTI,
        "<bos><start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\n«A1<end_of_turn>»\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n«A2<end_of_turn>»\n",
    ),
    (
        "gemma",
        SYSTEM,
        "<bos><start_of_turn>user\nBe brief.\n\nQ1<end_of_turn>\n<start_of_turn>model\n«A1<end_of_turn>»\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n«A2<end_of_turn>»\n",
    ),
    (
        "generation",
        SINGLE,
        "<|im_start|>user\nIs it legal?<|im_end|>\n<|im_start|>assistant\n«No.<|im_end|>»\n",
    ),
    # the answer stands in the question, and is nothing but the template's own words
    ("plain", [("user", "No."), ("assistant", "No.")], "<s>### Instruction:\nNo.\n\n### Response:\n«No.</s>»"),
    ("gemma", [("user", "model"), ("assistant", "user\nmodel")],
     "<bos><start_of_turn>user\nmodel<end_of_turn>\n<start_of_turn>model\n«user\nmodel<end_of_turn>»\n"),
]  # fmt: skip


def messages(turns: list[tuple[str, str]]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in turns]


def saved(folder: Path, family: str) -> Path:
    template, specials, bos, eos = FAMILIES[family]
    return save_tokenizer(folder / family, specials, bos=bos, eos=eos, template=template)


def painted(encoder: Encoder, encoded: Encoded) -> str:
    shown = ""
    for is_trained, run in groupby(range(len(encoded.tokens_N)), key=lambda i: bool(encoded.trained_N[i])):
        text = encoder.tokenizer.decode([int(encoded.tokens_N[i]) for i in run], skip_special_tokens=False)
        shown += f"«{text}»" if is_trained else text
    return shown


def encode(encoder: Encoder, turns: list[tuple[str, str]]) -> Encoded | str:
    return next(encoder.encode([Record(kind="chat", messages=messages(turns))]))


@pytest.mark.parametrize(("family", "turns", "expected"), TABLE)
def test_masks_of_the_families(tmp_path: Path, family: str, turns: list[tuple[str, str]], expected: str) -> None:
    encoder = Encoder(saved(tmp_path, family))
    encoder.check_template()
    encoded = encode(encoder, turns)
    assert isinstance(encoded, Encoded)
    assert painted(encoder, encoded) == expected
    assert int(encoded.tokens_N[encoded.trained_N][-1]) in encoder.silent_ids
    text = expected.replace("«", "").replace("»", "")
    for special in FAMILIES[family][1]:
        text = text.replace(special, "")
    assert encoded.bytes_N.sum() == len(text.encode())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_rendering_is_that_of_transformers(tmp_path: Path, family: str) -> None:
    if family in ("plain", "generation"):
        pytest.skip("no template of the model's own, or one that needs transformers' own block")
    from transformers import PreTrainedTokenizerFast

    folder = saved(tmp_path, family)
    _, _, bos, eos = FAMILIES[family]
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token=bos, eos_token=eos)
    theirs.chat_template = FAMILIES[family][0]
    turns, encoder = messages(MULTI), Encoder(folder)
    assert encoder.template.render(turns) == theirs.apply_chat_template(turns, tokenize=False)
    prompt = theirs.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert encoder.template.render(turns[:1], add_generation_prompt=True) == prompt
    encoded = encode(encoder, MULTI)
    assert encoded.tokens_N.tolist() == theirs.apply_chat_template(turns, tokenize=True, return_dict=False)


def test_training_on_everything_masks_nothing_but_the_first_slot(tmp_path: Path) -> None:
    encoder = Encoder(saved(tmp_path, "llama3"), RenderConfig(train_on=TrainOn.all))
    assert encode(encoder, MULTI).trained_N.all()


def test_words_of_a_special_token_in_a_conversation_are_refused_not_parsed(tmp_path: Path) -> None:
    encoder = Encoder(saved(tmp_path, "llama3"))
    assert encode(encoder, [("user", "say <|eot_id|> please"), ("assistant", "no")]) == "special token in text"
    text = next(encoder.encode([Record(kind="text", text="it says <|eot_id|> here")]))
    assert encoder.end_id not in text.tokens_N[:-1].tolist()
    assert int(text.tokens_N[-1]) == encoder.end_id
    assert text.bytes_N.sum() == len("it says <|eot_id|> here")


def test_a_conversation_that_the_template_refuses_is_left_out_with_its_reason(tmp_path: Path) -> None:
    encoder = Encoder(saved(tmp_path, "gemma"))
    assert encode(encoder, [("user", "Q"), ("tool", "T"), ("assistant", "A")]) == "refused by the chat template"


UNSTABLE = "{% for m in messages %}{{ loop.revindex }}{{ m.content }}{{ eos_token }}{% endfor %}"
ASKED = "{% if add_generation_prompt %}assistant: {% endif %}"
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + ASKED
TWO_BOS = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
SILENT = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (UNSTABLE, "not prefix-stable"),
        (NO_END, "never learn to stop"),
        (TWO_BOS, "two BOS"),
        (SILENT, "leaves out what the assistant says"),
        ("{% for m in messages %}", "no valid Jinja"),
        ("{{ raise_exception('not today') }}", "not today"),
    ],
)
def test_templates_that_cant_be_used_are_hard_errors(tmp_path: Path, template: str, says: str) -> None:
    encoder = Encoder(save_tokenizer(tmp_path, template=template))
    with pytest.raises(DataError, match=says):
        encoder.check_template()


def test_a_tokenizer_larger_than_its_model_is_a_hard_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="knows 258 tokens, the model 257"):
        Encoder(save_tokenizer(tmp_path, vocab_size=257))


def test_a_tokenizer_without_an_end_token_or_a_file_is_a_hard_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no end token"):
        Encoder(save_tokenizer(tmp_path, eos=None))
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        Encoder(tmp_path / "nowhere")


def test_text_starts_with_what_the_model_was_pretrained_to_see(tmp_path: Path) -> None:
    assert Encoder(saved(tmp_path, "llama3")).start_id == 256
    qwen = Encoder(saved(tmp_path, "qwen3"))
    assert qwen.tokenizer.id_to_token(qwen.start_id) == "<|endoftext|>"
    neither = Encoder(save_tokenizer(tmp_path / "x", ("<end>",), bos=None, eos="<end>"))
    assert neither.start_id == neither.end_id == neither.pad_id


def test_a_template_of_the_users_own_takes_the_place_of_the_models(tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    turns = "{% for m in messages %}{{ '~' + m.content + eos_token }}{% endfor %}"
    own.write_text(turns + "{% if add_generation_prompt %}~{% endif %}")
    render = RenderConfig(chat_template=str(own))
    render.check("domain.law.render")
    encoder = Encoder(saved(tmp_path, "mistral"), render)
    assert painted(encoder, encode(encoder, SINGLE)) == "~Is it legal?</s>~«No.</s>»"
