"""Packed rows hold each token once, train what they should, and read back as they were written."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.config.data import DomainConfig, LongRecords, RenderConfig, SourceConfig, SplitConfig
from qlora_dist.config.stages import RowsConfig
from qlora_dist.data.blocks import blocks_of
from qlora_dist.data.encode import Encoder
from qlora_dist.data.kinds import make_record
from qlora_dist.data.record import Record
from qlora_dist.data.rows import Rows, row_order, write_rows
from qlora_dist.errors import ConfigError, DataError

from .conftest import Corpus, save_tokenizer, sentence

Make = Callable[..., Corpus]
ALL = SplitConfig(validation_share=0, test_share=0)
START, END = 256, 257

texts = st.builds(lambda t: Record(kind="text", text=t), st.text("abc \nßé漢😀", min_size=1, max_size=150))
questions = st.text("qQ? 漢", min_size=1, max_size=40).filter(str.strip)
answers = st.text("aA! é", min_size=1, max_size=120).filter(str.strip)
asked = st.fixed_dictionaries({"question": questions, "answer": answers})
rag = st.fixed_dictionaries({"context": questions, "question": questions, "answer": answers})
answered = st.builds(make_record, st.one_of(asked, rag))


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: Any) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def packed(folder: Path, tokenizer: Path, records: list[Record], row_tokens: int, **render: Any) -> Rows:
    for i, record in enumerate(records):
        record.id, record.file, record.line = f"{i:016x}", "a.jsonl", i + 1
    splits = folder / "splits"
    splits.mkdir(parents=True, exist_ok=True)
    (splits / "train.jsonl").write_text("".join(r.to_line() for r in records), encoding="utf-8")
    config = RowsConfig(row_tokens=row_tokens, render=RenderConfig(**render))
    write_rows(config, {"tokenizer": tokenizer, "splits": splits}, folder)
    return Rows.open(folder)


def pieces(rows: Rows) -> dict[int, list[tuple[list[int], list[bool], int]]]:
    """Returns tokens, marks and trained bytes of each segment, by record."""
    found: dict[int, list[tuple[list[int], list[bool], int]]] = {}
    for row, start, length, record, trained_bytes in rows.segments.tolist():
        slots = slice(start, start + length)
        tokens, trained = rows.tokens_BT[row, slots].tolist(), rows.trained_BT[row, slots].tolist()
        found.setdefault(record, []).append((tokens, trained, trained_bytes))
    return found


@settings(max_examples=25)
@given(
    st.lists(st.one_of(texts, answered), min_size=1, max_size=12),
    st.integers(16, 64),
    st.integers(0, 8),
)
def test_every_token_is_a_target_in_exactly_one_row_and_no_prompt_is(
    tmp_path_factory: Any, byte_tokenizer: Path, records: list[Record], row_tokens: int, overlap: int
) -> None:
    rows = packed(tmp_path_factory.mktemp("rows"), byte_tokenizer, records, row_tokens, overlap_tokens=overlap)
    encoder, found = Encoder(byte_tokenizer), pieces(rows)
    for number, record in enumerate(records):
        wanted = next(encoder.encode([record]))
        targets = [t for tokens, marks, _ in found[number] for t, mark in zip(tokens, marks, strict=True) if mark]
        said = record.text or record.messages[1]["content"].strip()
        assert sorted(targets) == sorted(wanted.tokens_N[wanted.trained_N].tolist())
        assert sorted(bytes_of(encoder, targets)) == sorted(said.encode())
        assert targets.count(END) == 1
        assert sum(trained_bytes for *_, trained_bytes in found[number]) == len(said.encode())
        assert all(not marks[0] and any(marks) and tokens[0] == START for tokens, marks, _ in found[number])
    in_segments = sum(len(tokens) for parts in found.values() for tokens, *_ in parts)
    assert rows.trained_BT.sum() == sum(sum(marks) for parts in found.values() for _, marks, _ in parts)
    assert in_segments == json.loads(json.dumps(int(rows.segments["length"].sum())))
    assert (rows.segments["start"] + rows.segments["length"] <= row_tokens).all()


PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = sorted(set(range(256)) - set(PRINTABLE))
BYTES = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}
"""The byte that each character stands for in byte-level BPE (Radford et al. 2019)."""


def bytes_of(encoder: Encoder, tokens: list[int]) -> bytes:
    return bytes(BYTES[encoder.tokenizer.id_to_token(t)] for t in tokens if t < 256)


def test_a_long_text_starts_each_segment_with_bos_and_ends_once(tmp_path: Path, tokenizer: Path) -> None:
    rows = packed(tmp_path, tokenizer, [Record(kind="text", text="x" * 100)], 32)
    parts = pieces(rows)[0]
    assert [len(tokens) for tokens, *_ in parts] == [32, 32, 32, 9]
    assert all(tokens[0] == START and marks == [False] + [True] * (len(tokens) - 1) for tokens, marks, _ in parts)
    assert [tokens.count(END) for tokens, *_ in parts] == [0, 0, 0, 1]
    assert [trained_bytes for *_, trained_bytes in parts] == [31, 31, 31, 7]


def test_overlap_is_context_and_never_a_target(tmp_path: Path, tokenizer: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(60))
    rows = packed(tmp_path, tokenizer, [Record(kind="text", text=text)], 32, overlap_tokens=8)
    encoder, parts = Encoder(tokenizer), pieces(rows)[0]
    shown = [encoder.tokenizer.decode(tokens) for tokens, *_ in parts]
    assert shown == [text[:31], text[23:54], text[46:]]
    assert [marks.count(True) for _, marks, _ in parts] == [31, 23, 7]
    with pytest.raises(ConfigError, match="overlap_tokens=31"):
        packed(tmp_path, tokenizer, [Record(kind="text", text=text)], 32, overlap_tokens=31)


def test_long_records_can_be_dropped_and_are_counted(corpus: Make, tokenizer: Path) -> None:
    examples = [{"text": sentence(i, 3)} for i in range(5)] + [{"text": sentence(9, 100)}]
    made = corpus(examples, split=ALL).records().splits()
    rows = made.rows(tokenizer, row_tokens=64, long_records=LongRecords.drop)
    assert len(rows.records) == 5
    assert made.facts["rows-train--1"]["left_out"] == {"longer than a row": 1}
    assert made.rejects("rows-train--1")[0] | {"detail": ""} == {
        "file": "000.jsonl", "line": 6, "reason": "longer than a row", "detail": "", "broken": False
    }  # fmt: skip


def test_prompts_longer_than_a_row_leave_no_segment_without_a_target(tmp_path: Path, tokenizer: Path) -> None:
    turns = [{"role": "user", "content": "q" * 100}, {"role": "assistant", "content": "yes"}]
    rows = packed(tmp_path, tokenizer, [Record(kind="chat", messages=turns)], 32)
    assert all(any(marks) for _, marks, _ in pieces(rows)[0])
    assert rows.trained_BT.sum() == len("yes") + 1


def test_batches_number_segments_and_restart_positions(tmp_path: Path, tokenizer: Path) -> None:
    rows = packed(tmp_path, tokenizer, [Record(kind="text", text="x" * n) for n in (5, 7, 3, 2)], 32)
    batch = rows.batch([0])
    assert batch.tokens_BT.dtype == batch.position_BT.dtype == np.int64
    assert (batch.trained_BT.dtype, batch.segment_BT.dtype) == (bool, np.int32)
    lengths = [9, 7, 5, 4]
    assert batch.segment_BT[0].tolist() == [n for n, k in enumerate(lengths, 1) for _ in range(k)] + [0] * 7
    assert batch.position_BT[0].tolist() == [p for k in (*lengths, 7) for p in range(k)]
    assert rows.batch([]).tokens_BT.shape == (0, 32)


def test_padding_is_known_by_length_even_where_its_token_ends_records(tmp_path: Path, tokenizer: Path) -> None:
    rows = packed(tmp_path, tokenizer, [Record(kind="text", text="abc")], 16)
    assert rows.pad_id == END
    assert rows.tokens_BT[0].tolist()[4:] == [END] * 12
    assert rows.trained_BT[0].tolist() == [False] + [True] * 4 + [False] * 11


def test_the_order_of_rows_is_a_function_of_seed_and_epoch_alone() -> None:
    first = row_order(1000, 17, 0)
    assert sorted(first.tolist()) == list(range(1000))
    assert (first == row_order(1000, 17, 0)).all()
    assert (first != row_order(1000, 17, 1)).any()
    assert (first != row_order(1000, 18, 0)).any()
    assert row_order(10, 17, 0).tolist() == [8, 9, 4, 6, 2, 1, 5, 7, 0, 3]  # on every machine


def files_of(made: Corpus) -> dict[Path, bytes]:
    folders = [made.folder / name for name in ("splits", "shards", "rows-train-1")]
    return {p.relative_to(made.folder): p.read_bytes() for folder in folders for p in sorted(folder.iterdir())}


def test_every_stage_makes_the_same_bytes_for_one_and_four_workers(
    corpus: Make, tokenizer: Path, monkeypatch: Any
) -> None:
    examples = [{"text": sentence(i % 350, 20 + i % 90)} for i in range(400)]
    monkeypatch.setattr("qlora_dist.data.blocks.BLOCK_BYTES", 2**15)
    made = []
    for workers in (1, 4):
        monkeypatch.setenv("OMP_NUM_THREADS", str(workers))
        done = corpus(examples, name=f"w{workers}", part_bytes=2**16, num_shards=2)
        made.append(files_of(done.records().splits().shards(tokenizer).rows(tokenizer, shard=1) and done))
        assert len(done.parts()) == 6
    assert len(blocks_of([done.folder / "splits" / "train.jsonl"])) > 4
    assert len(made[0]) == 4 + 2 + 6
    assert made[0] == made[1]


examples = st.lists(
    st.one_of(
        st.builds(lambda i: {"text": sentence(i, 20 + i % 40)}, st.integers(0, 60)),
        st.builds(lambda i: {"question": sentence(i, 9), "answer": sentence(i + 500, i % 30 + 1)}, st.integers(0, 60)),
    ),
    max_size=40,
)


@settings(max_examples=12)
@given(examples, st.integers(200, 3000), st.integers(200, 3000), st.integers(64, 500))
def test_no_byte_depends_on_how_the_work_is_divided(
    tmp_path_factory: Any, byte_tokenizer: Path, raw: list[Any], part: int, block: int, buffered: int
) -> None:
    folder = tmp_path_factory.mktemp("divided")
    path = folder / "a.jsonl"
    raw += [{"text": sentence(i, 25)} for i in range(100, 115)]
    path.write_text("".join(json.dumps(example) + "\n" for example in raw))
    made = []
    for name, *sizes in (("whole", 2**28, 2**24, 2**21), ("parts", part, block, buffered)):
        domain = DomainConfig(sources=[SourceConfig(path=str(path))], part_bytes=sizes[0])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.setattr("qlora_dist.data.blocks.BLOCK_BYTES", sizes[1])
            patch.setattr("qlora_dist.data.pack_rows.BUFFERED_TOKENS", sizes[2])
            done = Corpus(folder / name, domain).records().splits().shards(byte_tokenizer)
            done.rows(byte_tokenizer, shard=1)
        made.append(files_of(done))
        shards = [(done.folder / "shards" / f"shard-{k}.jsonl").read_bytes().splitlines() for k in range(2)]
        assert sorted(shards[0] + shards[1]) == sorted(
            (done.folder / "splits" / "train.jsonl").read_bytes().splitlines()
        )
    rejects = [sorted(files.pop(Path("splits/rejects.jsonl")).splitlines()) for files in made]
    assert rejects[0] == rejects[1]  # they are listed block by block
    assert made[0] == made[1]


def test_sources_weigh_as_often_as_they_say_in_training_and_once_held_out(corpus: Make, tokenizer: Path) -> None:
    examples = [{"text": sentence(i)} for i in range(300)]
    made = {
        w: corpus(examples, name=f"w{int(100 * w)}", source={"weight": w}).records().splits() for w in (0.5, 1.0, 2.5)
    }
    counts = {}
    for weight, done in made.items():
        done.rows(tokenizer), done.rows(tokenizer, split="test")
        counts[weight] = (done.facts["rows-train--1"]["records"], done.facts["rows-test--1"]["records"])
    train, test = counts[1.0]
    assert counts[0.5][0] == pytest.approx(0.5 * train, rel=0.15)
    assert counts[2.5][0] == pytest.approx(2.5 * train, rel=0.1)
    assert counts[0.5][1] == counts[2.5][1] == test


def test_each_of_several_sources_has_a_weight_of_its_own(tmp_path: Path, tokenizer: Path) -> None:
    for s in range(2):
        lines = "".join(json.dumps({"text": sentence(1000 * s + i)}) + "\n" for i in range(50))
        (tmp_path / f"{s}.jsonl").write_text(lines)
    sources = [SourceConfig(path=str(tmp_path / "0.jsonl"), weight=3), SourceConfig(path=str(tmp_path / "1.jsonl"))]
    made = Corpus(tmp_path / "made", DomainConfig(sources=sources, split=ALL)).records().splits()
    taken = Counter(record["source"].partition(":")[0] for record in made.rows(tokenizer, row_tokens=256).records)
    assert taken == {"0.jsonl": 150, "1.jsonl": 50}


def test_rows_of_an_empty_held_out_set_are_empty_but_training_needs_targets(corpus: Make, tokenizer: Path) -> None:
    made = corpus([{"text": sentence(i)} for i in range(5)], split=ALL).records().splits()
    rows = made.rows(tokenizer, split="validation")
    assert (len(rows), rows.batch([]).tokens_BT.shape) == (0, (0, 64))
    (made.folder / "splits" / "train.jsonl").write_text("")
    with pytest.raises(DataError, match="no token would be trained"):
        made.rows(tokenizer)


def test_torn_rows_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(DataError, match="no packed rows"):
        Rows.open(tmp_path)
    packed(tmp_path, tokenizer, [Record(kind="text", text="x" * 1000)], 32)
    whole = (tmp_path / "tokens.npy").read_bytes()
    (tmp_path / "tokens.npy").write_bytes(whole[:-100])
    with pytest.raises(DataError, match="no packed rows"):
        Rows.open(tmp_path)


def test_what_is_known_of_records_comes_with_the_rows(corpus: Make, tokenizer: Path) -> None:
    made = corpus([{"text": sentence(i)} for i in range(9)], split=ALL, source={"licence": "MIT"}).records().splits()
    rows = made.rows(tokenizer)
    first = made.read("train")[0]
    assert rows.records[0] == {
        "id": first.id, "cluster": first.cluster, "source": "000.jsonl:1", "kind": "text", "licence": "MIT"
    }  # fmt: skip
    assert rows.silent_ids == [START, END]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_record_has_the_losses_it_has_alone_and_no_other_touches_them(
    tmp_path: Path, tokenizer: Path, attention: str
) -> None:
    """Positions that start again keep segments apart, without any mask from here."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, attn_implementation=attention)
    model = LlamaForCausalLM(config).float().eval()
    rows = packed(tmp_path, tokenizer, [Record(kind="text", text=sentence(i, 4 + i)) for i in range(12)], 192)

    def logits(tokens: Any, positions: Any) -> Any:
        given_ = {"input_ids": torch.tensor(tokens), "position_ids": torch.tensor(positions)}
        with torch.no_grad():
            return model(**given_, attention_mask=None, use_cache=False).logits

    def nll(tokens: Any, positions: Any) -> Any:
        told = logits(tokens, positions)[:, :-1].transpose(1, 2)
        return torch.nn.functional.cross_entropy(told, torch.tensor(tokens)[:, 1:], reduction="none")

    batch = rows.batch(range(len(rows)))
    together = nll(batch.tokens_BT, batch.position_BT)
    assert max(len(rows.segments_of(row)) for row in range(len(rows))) > 1
    for row in range(len(rows)):
        for segment in rows.segments_of(row):
            slots = slice(segment["start"], segment["start"] + segment["length"])
            alone = nll(batch.tokens_BT[row : row + 1, slots], np.arange(segment["length"])[None])
            packed_nll = together[row, slots.start : slots.stop - 1]
            assert torch.allclose(alone[0], packed_nll, atol=1e-5)
    before = logits(batch.tokens_BT, batch.position_BT)
    tokens_BT, is_first_BT = batch.tokens_BT.copy(), batch.segment_BT == 1
    tokens_BT[is_first_BT] = (tokens_BT[is_first_BT] + 7) % 256
    moved = (logits(tokens_BT, batch.position_BT) - before).abs().amax(dim=-1).numpy()
    assert (moved[is_first_BT] > 1e-3).all()
    assert moved[~is_first_BT].max() == 0
