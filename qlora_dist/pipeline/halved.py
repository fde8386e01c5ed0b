"""Stage `halved`: a shard's trials are trained from rung to rung, fewer at each; one that came to the end is chosen.

It stands in the pipeline, since it joins `train`, which trains, and `evaluate`, which measures. Every decision follows
from what lies in finished artifacts (`pipeline.rungs`): a life that was killed decides the same again, and trains on
from where all its lanes stood.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_dist.config.stages import AdapterConfig, HalvedConfig
from qlora_dist.config.sweep import TrialConfig
from qlora_dist.errors import DataError
from qlora_dist.pipeline.rungs import Rung, Shelf
from qlora_dist.pipeline.swept import CURVES
from qlora_dist.pipeline.tracked import tracked, trial_values
from qlora_dist.pipeline.winner import adapter_facts, keep_adapter, write_verdict
from qlora_dist.runtime import Facts, log, log_metrics, quiet_libraries
from qlora_dist.train.course import METRICS_FILE
from qlora_dist.train.halving import Halving, Result, rung_steps, rung_tokens, steps_taken

if TYPE_CHECKING:
    from qlora_dist.evaluate.documents import Document
    from qlora_dist.train.race import Race
    from qlora_dist.train.training import Training

GENERAL, DEVELOPMENT = "general", "validation"
RACE, CHECKPOINTS = "race", "checkpoints"


def halve_trials(config: HalvedConfig, inputs: Mapping[str, Path], out: Path) -> Facts:
    """Leaves the chosen trial's PEFT folder in `out`, what all came to in `sweep.json`, and their curves.

    Inputs are `base`, `tokenizer`, `rows`, `validation` and `rows-general` (both of development data). Beside `out`,
    the store gets an artifact of each trial at each rung, and an adapter of each trial that was trained to the end.

    Raises:
        DataError: if there is no development data, or no trial came to its end.
        Preempted: after SIGTERM or SIGUSR2, once a checkpoint is written.
    """
    from qlora_dist.train.race import Race

    quiet_libraries()
    # The label is the shard's: artifacts/halved/<label>-<key>.partial
    shelf = Shelf(config, out.name.removesuffix(".partial").rpartition("-")[0], inputs)
    trainings = {trial.name: _training(config, trial, inputs, out / RACE) for trial in config.trials}
    with ExitStack() as stack:
        race = stack.enter_context(Race.open(trainings, out / CHECKPOINTS))
        for trial in config.trials:
            stack.enter_context(tracked(shelf.plan, shelf.adapter(trial), lane=trial.name))
        game = _Game(config, shelf, race, inputs, _halving(config, trainings))
        game.run()
        facts = game.conclude(out)
    for folder in (out / RACE, out / CHECKPOINTS):
        shutil.rmtree(folder, ignore_errors=True)
    return facts


def _training(config: HalvedConfig, trial: TrialConfig, inputs: Mapping[str, Path], folder: Path) -> Training:
    from qlora_dist.train.training import Training

    told = AdapterConfig(
        model=config.model, lora=trial.lora, train=trial.train, strategy=config.strategy, seed=trial.seed
    )
    (folder / trial.name).mkdir(parents=True, exist_ok=True)
    return Training.open(told, inputs, folder / trial.name)


def _halving(config: HalvedConfig, trainings: Mapping[str, Training]) -> Halving:
    """Lays the rungs: in tokens of the largest budget, and for each trial in its own steps."""
    sizes = [(t.budget.num_steps, t.config.train.tokens_per_step) for t in trainings.values()]
    num_steps, tokens = max(sizes, key=math.prod)
    rungs = rung_tokens(num_steps * tokens, config.eta, config.first_rung_tokens, tokens)
    return Halving([rung_steps(*size, rungs) for size in sizes], config.eta, config.lanes or len(sizes))


@dataclass(slots=True)
class _Game:
    """One halving on its way from decision to decision."""

    config: HalvedConfig
    shelf: Shelf
    race: Race
    inputs: Mapping[str, Path]
    halving: Halving
    base: list[Document] = field(default_factory=list)
    found: dict[tuple[int, int], Rung] = field(default_factory=dict)

    def run(self) -> None:
        """Plays the halving to its end, training what no artifact holds yet."""
        self.base = self._measure("")
        self.halving.seat()
        while self.halving.running:
            turns = self.halving.turns()
            self._train(turns)
            for trial, rung in self.halving.advance(turns):
                result = self._result(trial, rung)
                told = f"{result.value:.4f} bits per byte" if math.isfinite(result.value) else "lost"
                log.info("%s: %s at rung %d", self.config.trials[trial].name, told, rung)
                self.halving.record(trial, rung, result)
            self.halving.seat()

    def _train(self, turns: int) -> None:
        """Takes so many turns with the trials that aren't finished at the rung that they run to."""
        targets = {}
        for number, rung in self.halving.running.items():
            trial, stops = self.config.trials[number], self.halving.steps[number]
            if self._kept(number, rung) is not None or (self._is_last(rung) and self.shelf.has_adapter(trial)):
                continue  # an adapter that a grid, say, has trained is measured when it would have arrived
            if rung:
                self.shelf.restore(trial, stops[rung - 1], self.race)
            targets[trial.name] = self.halving.position(number) + turns
        self.race.train_to(targets)

    def _result(self, number: int, rung: int) -> Result:
        """Returns what a trial came to at a rung, which is an artifact from then on."""
        from qlora_dist.evaluate.trials import Measured

        trial, steps = self.config.trials[number], self.halving.steps[number][rung]
        found = self._kept(number, rung) or self._arrive(trial, steps, self._is_last(rung))
        self.found[number, rung] = found
        if found.lost:
            return Result(math.inf, passes=False)
        measured = Measured.of(found.documents, self.base, self.config.domain)
        values = {"validation_bits_per_byte": measured.bits_per_byte, "forgetting": measured.forgetting}
        log_metrics(steps, values, lane=trial.name)
        passes = measured.forgetting <= self.config.max_forgetting
        return Result(measured.bits_per_byte, passes, measured.forgetting)

    def _is_last(self, rung: int) -> bool:
        return rung == self.halving.num_rungs - 1

    def _kept(self, number: int, rung: int) -> Rung | None:
        """Returns the artifact of a trial at a rung; at the last one, its adapter must be there too."""
        trial = self.config.trials[number]
        found = self.shelf.rung(trial, self.halving.steps[number][rung])
        is_whole = found is not None and (found.lost or not self._is_last(rung) or self.shelf.has_adapter(trial))
        return found if is_whole else None

    def _arrive(self, trial: TrialConfig, steps: int, is_last: bool) -> Rung:
        documents: list[Document] = []
        if is_last and self.shelf.has_adapter(trial):
            self.race.load_adapter(trial.name, self.shelf.plan.store.fetch(self.shelf.adapter(trial).id))
        elif is_last and not self.race.error_of(trial.name):
            self.shelf.keep_adapter(trial, self.race)
        lost = self.race.error_of(trial.name)
        if not lost:
            try:
                documents = self._measure(trial.name)
            except DataError as error:
                lost = str(error)
        return self.shelf.keep_rung(trial, steps, self.race, documents, lost)

    def _measure(self, trial: str) -> list[Document]:
        """Measures one trial, or the base, on the development data of its domain and of general text."""
        from qlora_dist.data.rows import Rows
        from qlora_dist.evaluate.held_out import HeldOut
        from qlora_dist.runtime import Progress

        config, documents = self.config, []
        with self.race.seated(trial) as model:
            for domain, folder in ((config.domain, "validation"), (GENERAL, f"rows-{GENERAL}")):
                held_out = HeldOut(domain, DEVELOPMENT, Rows.open(self.inputs[folder]), config.max_rows)
                progress = Progress(held_out.num_rows, unit="row")
                documents += held_out.measure(model, config.batch_tokens, progress, with_kl=False)
        return documents

    def conclude(self, out: Path) -> Facts:
        """Chooses among those that came to the end, and writes everything down."""
        from qlora_dist.evaluate.trials import choose_among

        config, last = self.config, self.halving.num_rungs - 1
        ended = {config.trials[t].name: self.found[t, last].documents for t in self.halving.finishers()}
        ended = {name: documents for name, documents in ended.items() if documents}
        verdict = choose_among(config.trials, ended, self.base, config.domain, config.max_forgetting)
        winner = next(trial for trial in config.trials if trial.name == verdict["winner"])
        adapter = self.shelf.plan.store.fetch(self.shelf.adapter(winner).id)
        keep_adapter(adapter, out)
        self._write_curves(out / CURVES)
        stops = {t.name: steps[last] for t, steps in zip(config.trials, self.halving.steps, strict=True)}
        for row in verdict["trials"]:
            log_metrics(stops[row["trial"]], trial_values(row, winner.name), lane=row["trial"])
        rows = {row["trial"]: row for row in verdict["trials"]}
        taken = steps_taken(self.halving)
        told = [self._row(number, rows, steps) for number, steps in sorted(taken.items())]
        whole = sum(s[-1] * t.train.tokens_per_step for s, t in zip(self.halving.steps, config.trials, strict=True))
        verdict |= {"trials": told, "rungs": self._rungs(), "grid_tokens": whole}
        facts = write_verdict(out, config.domain, config.trials, verdict)
        return facts | {"certificate": adapter_facts(adapter).get("certificate", [])}

    def _row(self, number: int, rows: Mapping[str, dict[str, Any]], steps: int) -> dict[str, Any]:
        trial = self.config.trials[number]
        row = dict(rows.get(trial.name, {"trial": trial.name}))
        rung = max(r for t, r in self.halving.results if t == number)
        state = "finished" if trial.name in rows else "lost" if self.found[number, rung].lost else f"stopped at {rung}"
        return row | {"state": state, "tokens": steps * trial.train.tokens_per_step}

    def _rungs(self) -> list[dict[str, Any]]:
        """Returns a row for each trial at each rung, in order."""
        from qlora_dist.evaluate.trials import Measured, finite

        rows = []
        for (number, rung), result in sorted(self.halving.results.items(), key=lambda item: (item[0][1], item[0][0])):
            trial, found = self.config.trials[number], self.found[number, rung]
            forgot = None if found.lost else Measured.of(found.documents, self.base, self.config.domain).forgetting
            row: dict[str, Any] = {"rung": rung, "trial": trial.name, "value": finite(result.value)}
            row |= {"tokens": self.halving.steps[number][rung] * trial.train.tokens_per_step, "forgetting": forgot}
            rows.append(row | {"went_on": (number, rung + 1) in self.halving.results})
        return rows

    def _write_curves(self, folder: Path) -> None:
        """Keeps each trial's metrics, as far as it was trained."""
        folder.mkdir(exist_ok=True)
        for number, trial in enumerate(self.config.trials):
            rungs = [rung for t, rung in self.halving.results if t == number]
            metrics = self.found[number, max(rungs)].folder / METRICS_FILE if rungs else None
            if metrics is not None and metrics.exists():
                shutil.copyfile(metrics, folder / f"{trial.name}.jsonl")
