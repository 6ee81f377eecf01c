"""The loop: update, log, evaluate, save, stop. What happens when is here; how, in the modules that it calls."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import torch

from eff_train.errors import Refused, refusing
from eff_train.frame import checkpoint
from eff_train.frame.metrics import Board, MetricsFile, read_metrics
from eff_train.frame.parallel import Workers
from eff_train.frame.progress import Display, clock
from eff_train.frame.recipe import Recipe
from eff_train.frame.runs import Run, code_version, locked, read_checkpoint, write_checkpoint
from eff_train.frame.stop import Stop
from eff_train.frame.training import Training

DONE, FAILED = 0, 1


def train(recipe: Recipe[Any], run: Run, workers: Workers, *, title: str = "training", quiet: bool = False) -> int:
    """Train from the newest whole checkpoint of the run (or from the start) to the last update.

    Returns:
        0 when the last update is done or ``max_minutes`` are over, 128 + number of the signal that stopped it, or 1
        if the last checkpoint could not be written.
    """
    c = recipe.config
    if c.threads:
        torch.set_num_threads(c.threads)
    torch.use_deterministic_algorithms(c.deterministic)
    with ExitStack() as stack:
        with refusing():
            workers.share(range(c.batch_size))
            if workers.main:
                stack.enter_context(locked(run))
                checkpoint.clean(run.checkpoints)
        stop = stack.enter_context(Stop())
        training = Training(recipe, workers)
        display = Display(title, c.steps, c.batch_size, quiet=quiet or not workers.main)
        with refusing():
            before = resume(training, run, display)
        if training.step >= c.steps:
            display.say(f"nothing to do: {training.step} updates are done, steps={c.steps}")
            return DONE
        stack.enter_context(display)
        out = stack.enter_context(Output(run, workers, display, tensorboard=c.tensorboard))
        try:
            return _loop(training, run, stop, out, before)
        except FloatingPointError as error:
            out.event(training.step, "failed", reason=str(error))
            raise Refused(f"{error}; the last checkpoint is from before that. Try a lower lr") from error


def resume(training: Training, run: Run, display: Display) -> float:
    """Continue from the newest whole checkpoint, if there is one; returns the seconds that went into it.

    The main process chooses for all. Damaged checkpoints after it are renamed.
    """
    ranks = training.workers
    found = checkpoint.newest(run.checkpoints, display.say) if ranks.main else None
    found = ranks.tell(found)
    if found is None:
        display.begin(0)
        return 0.0
    training.load_state_dict(read_checkpoint(found))
    if ranks.main:
        checkpoint.set_aside(run.checkpoints, found.step)
    display.begin(training.step)
    display.say(f"going on after update {training.step}")
    return float(found.record.get("seconds", 0.0))


class Output:
    """What a run writes besides checkpoints: metrics, TensorBoard, the display. Only the main process does."""

    def __init__(self, run: Run, workers: Workers, display: Display, *, tensorboard: bool) -> None:
        self.display = display
        self.file = MetricsFile(run.metrics, display.say) if workers.main else None
        self.board = Board(run.folder / "tensorboard") if workers.main and tensorboard else None

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *error: object) -> None:
        if self.board:
            self.board.close()

    def metrics(self, step: int, category: str, values: dict[str, float], **more: Any) -> None:
        """Write metrics of an update."""
        if self.file:
            self.file.write({"step": step, "event": category, **values, **more})
        if self.board:
            self.board.write(step, category, values)

    def event(self, step: int, event: str, **more: Any) -> None:
        """Write down that something happened."""
        if self.file:
            self.file.write({"step": step, "event": event, **more})


def _loop(training: Training, run: Run, stop: Stop, out: Output, before: float) -> int:
    c, ranks, metric = training.config, training.workers, training.recipe.best
    start, saved = time.monotonic(), training.step
    best = ranks.tell(checkpoint.best_value(run.checkpoints, metric))
    if training.step or read_metrics(run.metrics):
        out.event(training.step, "resume", processes=ranks.count, code=code_version())
    while training.step < c.steps:
        training.update()
        step, last = training.step, training.step == c.steps
        seconds = round(time.monotonic() - start, 3)
        out.display.advance(step)
        if step % c.log_every == 0 or last:
            values = training.read_means()
            rate = out.display.show(step, values)
            more = {"samples_per_second": round(rate, 3), "seconds": round(before + seconds, 3)}
            out.metrics(step, "train", values, **more)
        over = 0 < c.max_minutes < seconds / 60
        stopping = any(ranks.total([float(stop.signal is not None or over)]))
        evaluation = judge(training, run, out) if last or (c.eval_every and step % c.eval_every == 0) else {}
        ahead = checkpoint.better(evaluation, metric, best)
        due = last or stopping or ahead or (c.save_every and step % c.save_every == 0)
        if due and save(training, run, {"evaluation": evaluation, "seconds": before + seconds}, out):
            saved, best = step, ranks.tell(checkpoint.best_value(run.checkpoints, metric))
        if stopping and not last:
            return _stopped(training, run, saved, stop, out)
    return DONE if saved == training.step else FAILED


def judge(training: Training, run: Run, out: Output) -> dict[str, float]:
    """Evaluate and write samples, on the main process; the others wait for its result."""
    values: dict[str, float] = {}
    with training.judged() as model:
        if training.workers.main:
            values = dict(training.recipe.evaluate(model))
            folder = run.samples / f"step-{training.step:08d}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                training.recipe.samples(model, folder)
                if not any(folder.iterdir()):
                    folder.rmdir()
            except OSError as error:
                out.display.say(f"update {training.step}: samples cannot be written: {error}")
                out.event(training.step, "no samples", reason=str(error))
    values = training.workers.tell(values)
    out.metrics(training.step, "evaluation", values)
    out.display.say(f"update {training.step}: " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))
    return values


def save(training: Training, run: Run, record: dict[str, Any], out: Output) -> bool:
    """Write a checkpoint. One that cannot be written is said and noted; the training goes on, older ones stay."""
    training.check_finite()
    state = training.state_dict()
    fine = True
    if training.workers.main:
        try:
            write_checkpoint(run, state, record)
            checkpoint.prune(run.checkpoints, training.config.keep, training.recipe.best)
        except OSError as error:
            fine = False
            out.display.say(f"update {training.step}: NO checkpoint written: {error}; the one before it stays")
            out.event(training.step, "not saved", reason=str(error))
    return bool(training.workers.tell(fine))


def _stopped(training: Training, run: Run, saved: int, stop: Stop, out: Output) -> int:
    reason = f"signal {stop.signal}" if stop.signal else f"max_minutes={training.config.max_minutes}"
    out.event(training.step, "stop", reason=reason)
    kept = f"saved after update {saved}" if saved == training.step else f"NOT saved since update {saved}"
    left = clock(out.display.seconds_left(training.step))
    out.display.say(f"stopped by {reason}, {kept}; about {left} left. Go on with: eff-train resume {run.folder}")
    if saved != training.step:
        return FAILED
    return 128 + stop.signal if stop.signal else DONE
