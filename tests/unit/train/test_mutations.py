"""Faults of this field, injected one by one: each is caught by a check that names it, and good runs raise none.

The number in each case's name is the failure's row in the field's list (docs/failures.md says what each one is).
"""

import dataclasses
import json
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_dist.config.model import ModelConfig, Quantization
from qlora_dist.config.reading import watched
from qlora_dist.config.stages import AdapterConfig
from qlora_dist.config.train import (
    Checkpointing,
    StrategyConfig,
    StrategyName,
    TrainConfig,
    check_step,
    check_supported,
)
from qlora_dist.data.rows import Rows, row_order
from qlora_dist.data.templates import ChatTemplate
from qlora_dist.errors import Preempted, QloraDistError
from qlora_dist.model.adapter import Provenance, check_adapter, write_provenance
from qlora_dist.model.base import describe_base, model_folder
from qlora_dist.testing import rank_environment, save_rows, save_tiny_model
from qlora_dist.train import adapter_file, budget, checks, engine, loss, step
from qlora_dist.train.adapter_file import check_saved, save_lane
from qlora_dist.train.batches import open_rows
from qlora_dist.train.certificate import Certificate
from qlora_dist.train.checkpoint import Checkpoints, lane_state, restore
from qlora_dist.train.course import Course
from qlora_dist.train.engine import Engine
from qlora_dist.train.lanes import Seating
from qlora_dist.train.loop import Loop
from qlora_dist.train.processes import joined
from qlora_dist.train.strategies.ddp import ReplicatedBase

FAULTS = {}


def fault(number, caught_by):
    def note(function):
        FAULTS[f"{number:02d}-{function.__name__}"] = (function, caught_by)
        return function

    return note


class Bench:
    """What a fault may touch: builders of lanes and engines, and pytest's own tools."""

    def __init__(self, make_lane, make_engine, base, monkeypatch, tmp_path):
        self.lane, self.engine, self.base = make_lane, make_engine, base
        self.patch, self.path = monkeypatch, tmp_path

    def examine(self, lane, engine=None):
        engine, course = engine or self.engine(lane), Course(lane, self.path)
        engine.examine([course])
        if course.error is not None:
            raise course.error
        return engine, course

    def train(self, lane, engine=None, **options):
        """Trains a lane to its end, and returns its course and engine."""
        engine, course = self.examine(lane, engine or self.engine(lane, **options))
        Loop(engine.stepper, [course], 600).run()
        if course.error is not None:
            raise course.error
        engine.check_unchanged()
        engine.check_same(course)
        return engine, course

    def edited_rows(self, name="rows", **arrays):
        folder = save_rows(self.path / name, 16)
        for file, edit in arrays.items():
            np.save(folder / f"{file}.npy", edit(np.load(folder / f"{file}.npy")))
        return folder


@pytest.fixture
def bench(make_lane, make_engine, base, monkeypatch, tmp_path):
    return Bench(make_lane, make_engine, base, monkeypatch, tmp_path)


@fault(1, "each rank holds its part of the base")
def base_left_whole_on_every_rank(bench):
    class Unsharded(ReplicatedBase):
        def __init__(self):
            super().__init__()
            self.num_parts = 2

    lane = bench.lane()
    whole = bench.engine(lane)
    Engine(dataclasses.replace(whole.stepper, strategy=Unsharded()), whole.whole_bytes).examine([])


@fault(1, "one dtype for the base")
def four_bits_stored_as_uint8(bench):
    from qlora_dist.model import base as base_module
    from qlora_dist.model.quantize import bits_and_bytes

    def as_uint8(model):
        config = bits_and_bytes(model)
        config.bnb_4bit_quant_storage = torch.uint8
        return config

    bench.patch.setattr("qlora_dist.model.quantize.bits_and_bytes", as_uint8)
    bench.patch.setattr(engine, "is_stored", lambda *_: False)
    assert base_module.load_model
    bench.engine(bench.lane())


@fault(2, "one dtype for the base")
def norms_upcast_as_by_kbit_preparation(bench):
    def upcast(base, model):
        loaded = plain(base, model)
        for name, parameter in loaded.named_parameters():
            if "norm" in name:
                parameter.data = parameter.data.double()
        return loaded

    plain = engine.load_model
    bench.patch.setattr(engine, "is_stored", lambda *_: False)
    bench.patch.setattr(engine, "load_model", upcast)
    bench.engine(bench.lane())


@fault(2, "float32 for adapters")
def adapters_in_half_precision(bench):
    lane = bench.lane()
    built = bench.engine(lane)
    for group in built.stepper.seating.bank.groups:
        group.values_GP.data = group.values_GP.data.bfloat16()
    built.place(ModelConfig(quantization=Quantization.nf4, compute_dtype=engine_dtype()))


def engine_dtype():
    from qlora_dist.config.model import Dtype

    return Dtype.float32


@fault(6, "the base is stored as asked")
def quantization_asked_for_and_not_done(bench):
    plain = engine.load_model
    bench.patch.setattr(engine, "is_stored", lambda *_: False)
    bench.patch.setattr(engine, "load_model", lambda base, model: plain(base, model, quantized=False))
    bench.engine(bench.lane())


@fault(6, r"train.method=full: expected lora")
def combination_that_no_strategy_does(bench):
    from qlora_dist.config.train import Method

    check_supported(TrainConfig(method=Method.full), StrategyConfig(name=StrategyName.fsdp, world_size=2))


@fault(3, "trained on .*, not on")
def adapter_on_another_base(bench):
    folder = save_tiny_model(bench.path / "other", seed=5)
    lane = bench.lane()
    bench.engine(lane)
    save_lane(lane, bench.path, bench.base)
    write_provenance(bench.path, Provenance("x", "", bench.base.digest, "t", "nf4", "float32", 1))
    check_adapter(bench.path, describe_base(folder, str(folder), ""))


@fault(5, "the saved adapter is the trained one")
def empty_adapter_saved(bench):
    lane = bench.lane()
    bench.engine(lane)
    bench.patch.setattr(type(lane), "state", lambda self: {})
    save_lane(lane, bench.path, bench.base)
    bench.patch.undo()
    check_saved(Certificate(), lane.state(), 4, bench.path)


@fault(5, "the saved adapter is the trained one")
def adapter_saved_with_less_precision(bench):
    lane = bench.lane()
    bench.train(lane)
    save_lane(lane, bench.path, bench.base)
    file = bench.path / "adapter_model.safetensors"
    save_file({n: v.bfloat16() for n, v in load_file(file).items()}, file, metadata={"format": "pt"})
    check_saved(Certificate(), lane.state(), 4, bench.path)


@fault(7, "differ in .* tensors")
def optimizer_state_lost_in_the_checkpoint(bench):
    lane = bench.lane()
    bench.engine(lane)
    restore(lane, {n: v for n, v in lane_state(lane).items() if "#" not in n})


@fault(10, "train.tokens_per_step=.*: expected a multiple")
def step_that_the_ranks_cannot_divide(bench):
    check_step(TrainConfig(tokens_per_step=4096, micro_batch_tokens=2048), world_size=3)


@fault(12, "no token is trained")
def all_labels_masked(bench):
    open_rows(bench.edited_rows(trained=np.zeros_like), bench.base, 32)


@fault(12, "each step has targets.*none in step 1")
def one_step_without_a_target(bench):
    def first_rows_masked(trained):
        lane = bench.lane(rows=Rows.open(save_rows(bench.path / "plain", 16)))
        trained[lane.budget.rows_of_step(0)] = False
        return trained

    bench.train(bench.lane(rows=Rows.open(bench.edited_rows(trained=first_rows_masked))))


@fault(14, "the end token is trained")
def end_token_masked_as_if_it_were_padding(bench):
    folder = save_rows(bench.path / "rows", 16)
    tokens, trained = np.load(folder / "tokens.npy"), np.load(folder / "trained.npy")
    np.save(folder / "trained.npy", trained & (tokens != 257))
    bench.examine(bench.lane(rows=Rows.open(folder)))


@fault(16, "no attention between segments")
def packed_segments_that_see_each_other(bench):
    def leaking(rows, indices):
        batch = plain(rows, indices)
        batch["position_ids"] = torch.arange(rows.row_tokens).repeat(len(indices), 1)
        return batch

    plain = checks.tensors
    bench.patch.setattr(checks, "tensors", leaking)
    bench.examine(bench.lane())


@fault(16, "no attention between segments")
def segments_that_see_each_other_in_batches_of_more_than_a_row(bench):
    """As FlashAttention 2 in transformers has it."""

    def leaking(model, batch):
        if len(batch["input_ids"]) > 1:
            batch = batch | {"position_ids": torch.arange(32).repeat(len(batch["input_ids"]), 1)}
        return plain(model, **batch)

    plain = loss.LaneModel.forward
    bench.patch.setattr(loss.LaneModel, "forward", lambda model, whole_logits=False, **batch: leaking(model, batch))
    bench.examine(bench.lane())


@fault(17, "every tensor learns")
def gradient_cut_off_between_layers(bench):
    lane = bench.lane()
    built = bench.engine(lane)
    first = built.stepper.model.model.model.layers[0]
    first.register_forward_hook(lambda _module, _inputs, hidden: hidden.detach())
    bench.train(lane, built)


@fault(17, "every tensor learns")
def one_layer_leaves_its_factors_out(bench):
    lane = bench.lane()
    built = bench.engine(lane)
    layer = built.stepper.model.model.model.layers[0].mlp.up_proj
    layer.forward = layer.frozen.forward
    bench.train(lane, built)


@fault(17, "every tensor learns")
def optimizer_of_other_tensors(bench):
    lane = bench.lane()
    built = bench.engine(lane)
    lane.optimizer.param_groups[0]["params"] = [p.clone() for p in lane.parameters.values()]
    bench.train(lane, built)


@fault(11, "the loss is the model's own")
def loss_shifted_by_one_slot(bench):
    plain = loss.chunked_nll
    bench.patch.setattr(loss, "chunked_nll", lambda hidden, head, targets: plain(hidden, head, targets.roll(1)))
    bench.examine(bench.lane())


@fault(11, "the loss is the model's own")
def architecture_that_scales_its_logits(bench):
    lane = bench.lane()
    built = bench.engine(lane)
    head = built.stepper.model.model.lm_head
    head.register_forward_hook(lambda _module, _inputs, logits: logits * 0.5)
    bench.examine(lane, built)


@fault(11, "all ranks hold the same adapter")
def ranks_that_took_different_steps(bench):
    lane = bench.lane()
    built, course = bench.train(lane)
    bench.patch.setattr(
        built.stepper.strategy, "broadcast", lambda values: [v.add_(1e-3) for v in values], raising=False
    )
    built.check_same(course)


@fault(13, "the base is unchanged")
def base_written_to_while_training(bench):
    plain = step.update

    def careless(lane, *args):
        next(p for p in built.stepper.model.parameters() if not p.requires_grad).data.view(-1)[0] += 1
        return plain(lane, *args)

    lane = bench.lane()
    built = bench.engine(lane)
    bench.patch.setattr(step, "update", careless)
    bench.train(lane, built)


@fault(26, r"Step 1: loss is (nan|inf)")
def loss_that_is_not_finite(bench):
    lane = bench.lane()
    built = bench.engine(lane)
    plain = type(built.stepper).accumulate
    bench.patch.setattr(type(built.stepper), "accumulate", lambda self, *args: plain(self, *args) * torch.nan)
    bench.train(lane, built)


@fault(26, "model.revision=.*40 hexadecimal digits")
def base_revision_not_pinned(bench):
    model_folder("owner/model", "main")


@fault(25, "rows hold 32 tokens")
def rows_of_another_length(bench):
    open_rows(save_rows(bench.path / "rows"), bench.base, 64)


@fault(15, "own tokenizer")
def rows_of_another_tokenizer(bench):
    open_rows(save_rows(bench.path / "rows", vocab_size=50_000), bench.base, 32)


@fault(4, "from those of base")
def scale_put_on_twice_by_a_merge(bench):
    from qlora_dist.export import weights
    from qlora_dist.export.__main__ import parser
    from qlora_dist.export.run import export

    lane = bench.lane(lora={"use_rslora": True, "lora_alpha": 64.0}, learning_rate=0.05, epochs=3)
    bench.train(lane)
    folder = bench.path / "adapter"
    folder.mkdir()
    save_lane(lane, folder, bench.base)
    plain = weights.MergedWeights.update

    def twice(self, name):
        factors = plain(self, name)
        return factors and dataclasses.replace(factors, B_OR=2 * factors.B_OR)

    bench.patch.setattr(weights.MergedWeights, "update", twice)
    words = [str(folder), "--base", bench.base.path, "--to", "hf", "--out", str(bench.path / "merged")]
    export(parser().parse_args(words))


@fault(8, "the saved adapter is the trained one")
def base_gathered_into_the_adapter_file(bench):
    lane = bench.lane()
    built = bench.engine(lane)
    own, base = lane.state(), built.stepper.model.model.state_dict()
    bench.patch.setattr(type(lane), "state", lambda self: own | {n: v for n, v in base.items() if "norm" in n})
    save_lane(lane, bench.path, bench.base)
    bench.patch.undo()
    check_saved(Certificate(), lane.state(), 4, bench.path)


@fault(9, "rows come in the recipe's order")
def rows_in_another_order_after_a_kill(bench):
    stop_after_a_step(bench)
    bench.patch.setattr(budget, "_order", lambda num_rows, seed, epoch: row_order(num_rows, seed + 1, epoch))
    bench.train(bench.lane())


@fault(9, "rows come in the recipe's order")
def other_rows_under_the_same_name_after_a_kill(bench):
    stop_after_a_step(bench)
    bench.train(bench.lane(rows=Rows.open(save_rows(bench.path / "other", 24, seed=9))))


def stop_after_a_step(bench):
    engine, course = bench.examine(bench.lane())
    engine.stepper.asked_to_stop = True
    with pytest.raises(Preempted):
        Loop(engine.stepper, [course], 600).run()


@fault(13, "leaves out what the assistant says")
def template_without_the_assistants_words(bench):
    template = "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
    ChatTemplate(template).closing  # noqa: B018 - the text that closes a turn is looked for in what it renders


@fault(13, "prefix")
def template_whose_beginning_changes_with_its_end(bench):
    template = "{{ messages | length }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ChatTemplate(template).conversation(turns + turns)


@fault(18, "did not find the others")
def rank_that_still_tokenizes(bench):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in rank_environment(0, 2, port).items():
        bench.patch.setenv(name, value)
    with joined(2, timeout_s=1.5):
        pass


@fault(19, "processes were started")
def rendezvous_of_another_size_than_the_config(bench):
    bench.patch.setenv("WORLD_SIZE", "4")
    with joined(2, timeout_s=1.5):
        pass


@fault(24, "each lane learns from its own rows alone")
def lanes_that_multiply_each_others_factors(bench):
    plain = Seating._run

    def mixed(self, lanes):
        run = plain(self, lanes)
        group, _ = self.bank.group_of(lanes[0])
        return dataclasses.replace(run, factors=group.factors(0, len(lanes)))

    bench.patch.setattr(Seating, "_run", mixed)
    lanes = [bench.lane("a"), bench.lane("b", seed=5)]
    bench.engine(*lanes).examine([Course(lane, bench.path / lane.name) for lane in lanes])


@fault(25, "no config key is left unread")
def weight_decay_dropped_in_silence(bench):
    def forgetful(lane):
        lane.optimizer = torch.optim.AdamW([lane.values_P], betas=(lane.train.adam_beta1, lane.train.adam_beta2))

    lane = bench.lane(weight_decay=0.3)
    config = watched(AdapterConfig(lora=lane.lora, train=lane.train))
    lane.lora, lane.train = config.lora, config.train
    bench.patch.setattr(type(lane), "make_optimizer", forgetful)
    engine, course = bench.engine(lane), Course(lane, bench.path, config=config)
    engine.examine([course])
    Loop(engine.stepper, [course], 600).run()
    raise course.error


@fault(25, "there is no such key. Did you mean learning_rate")
def key_with_a_typing_error(bench):
    from qlora_dist.launch.compose import compose_run

    compose_run(["train.learning_rat=1e-4"])


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_fault_is_caught_by_name(name, bench):
    inject, caught_by = FAULTS[name]
    with pytest.raises(QloraDistError, match=caught_by):
        inject(bench)


def test_checkpoint_that_is_torn_or_foreign_is_named(bench, caplog):
    lane = bench.lane()
    bench.engine(lane)
    kept = Checkpoints(bench.path / "c", {"seed": 1})
    kept.save(1, lane_state(lane))
    kept.save(2, lane_state(lane))
    torn = bench.path / "c" / "step-00000002" / "state.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    assert [c.step for c in kept.usable()] == [1]
    assert "step-00000002 is torn" in caplog.text
    assert Checkpoints(bench.path / "c", {"seed": 2}).usable() == []
    assert "of another recipe" in caplog.text


@pytest.mark.parametrize("quantization", list(Quantization))
@pytest.mark.parametrize("recompute", [Checkpointing.off, Checkpointing.on])
def test_good_runs_raise_no_alarm(bench, quantization, recompute):
    lane = bench.lane(lora={"lora_dropout": 0.1, "use_rslora": True}, activation_checkpointing=recompute)
    built, course = bench.train(lane, quantization=quantization)
    save_lane(lane, bench.path, bench.base)
    check_saved(course.certificate, lane.state(), 4, bench.path)
    table = built.certificate.table() + course.certificate.table()
    assert all(row["passed"] for row in table)
    assert len(table) >= 10
    assert json.dumps(table)
    assert adapter_file.ADAPTER_FILES


def test_the_table_says_what_is_injected():
    """docs/failures.md lists the rows that are injected here, and no other, in its first table."""
    text = (Path(__file__).parents[3] / "docs" / "failures.md").read_text(encoding="utf-8")
    listed = {int(line.split("|")[1]) for line in text.splitlines() if re.match(r"\| \d+ \|", line)}
    injected = {int(name.partition("-")[0]) for name in FAULTS}
    assert listed == injected
    assert len(injected) >= 20
