"""What one Ray Train worker does: one stage, from its first micro-batch, or its cursor, to its last
checkpoint.

Both stages run this loop; they differ in their losses alone. Each step: the micro-batches of the rank's lanes
from its stream, one optimiser step (`step`), a row of metrics, and what all ranks agreed on meanwhile
(`told`): a checkpoint, a stop. At an epoch's end: the losses on the `val` split, zero-shot figures from the
function that the recipe hands in, a checkpoint.

A worker that cannot go on for a reason that a restart would meet again ends with an `Outcome` that says so;
one that fails raises, and Ray Train starts all of them again, from the newest whole checkpoint.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.train
import ray.train.torch
import ray.util
import torch
import torch.distributed as dist
from ray.experimental import tqdm_ray
from ray.train.v2._internal.execution import context as train_context
from torch import Tensor

from langcell.batch import MicroBatch
from langcell.corpus.plan import Position
from langcell.corpus.stream import stream
from langcell.errors import InputError
from langcell.model.flops import Work, mfu, peak_flops, step_flops
from langcell.objective.stages import LOSSES
from langcell.storage import open_root, read_file, remove_halves, write_file
from langcell.train import liveness as live
from langcell.train import trace
from langcell.train.gauges import peak_memory
from langcell.train.guard import Guard
from langcell.train.judging import evaluate, validate
from langcell.train.liveness import Liveness
from langcell.train.metrics import Metrics
from langcell.train.notice import Listener
from langcell.train.profile import Profile
from langcell.train.saver import Keep, Saver, TakenOverError
from langcell.train.setup import Ready, make_deterministic, make_ready
from langcell.train.step import run_step
from langcell.train.store import Cursor, DamagedError, Store, name_of
from langcell.train.task import OWNER, Outcome, StageTask
from langcell.train.told import Told, tell
from langcell.train.trackers import Trackers

ASK_S = 5.0
"""Seconds between questions whether a node is about to be taken away: each is a barrier."""


def run_stage(config: dict[str, Any]) -> Outcome:
    """The `train_loop_per_worker` of a stage. config: `task`, a reference to its `StageTask`."""
    task: StageTask = ray.get(config["task"])
    for chatty in ("ray.data", train_context.__file__):  # which names its logger by its file
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if task.train.deterministic:
        make_deterministic()
    board = live.board()
    host = ray.util.get_node_ip_address()
    with Liveness(board, task.train.collective_timeout_s, host) as liveness:
        liveness.at(task.first_step, live.START)
        try:
            return _Worker(task, liveness, live.clone(board)).run()
        except (InputError, DamagedError) as error:
            return Outcome("failed", str(error))
        except RuntimeError as error:
            if liveness.message is not None:
                raise RuntimeError(liveness.message) from error
            raise


class _Worker:
    def __init__(self, task: StageTask, liveness: Liveness, board: dist.Store) -> None:
        self.task, self.liveness = task, liveness
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
        root = open_root(task.run_dir, "run.dir")
        store = Store(root, task.stage)
        self.token = f"{task.job} {uuid.uuid4().hex}"
        self.root = root
        self._on_rank_0(self._take_over)
        self._on_rank_0(store.clean)
        self.ready: Ready = make_ready(task, store, self.device, liveness.again)
        cursor = self.ready.cursor
        self.start = task.position(cursor.global_step)
        self.lanes, self.engine = self.ready.lanes, self.ready.engine
        self.guard = Guard(self.engine, task.train.skip_grad_norm, cursor.skipped, cursor.skipped_in_row)
        self.metrics: Metrics | None = None
        self.listener: Listener | None = None
        self._on_rank_0(lambda: self._begin(cursor.global_step))
        self.trace = trace.Trace()
        keep = Keep(task.train.keep_last, task.train.keep_epoch_ends)
        self.saver = Saver(
            store,
            board,
            self.trace,
            keep,
            token=self.token.partition(" ")[2],
            start=cursor.global_step,
            before_commit=self._before_commit,
            alive=liveness.again,
            after_commit=lambda: self.metrics.committed() if self.metrics is not None else None,
        )
        self._asks = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") != "0"
        self._asked = self._saved = time.monotonic()
        self._saved_at = cursor.global_step
        self._warned_of: tuple[str, ...] = ()
        cuda = self.device.type == "cuda"
        self._peak = peak_flops(torch.cuda.get_device_name(self.device)) if cuda else None

    def run(self) -> Outcome:
        task = self.task
        begun, total = task.global_step(self.start) - task.first_step, task.last_step - task.first_step
        bar = tqdm_ray.tqdm(total=total, desc=f"stage {task.stage}") if self.rank == 0 else None
        if bar is not None:
            bar.update(begun)
        steps = task.train.profile if self.rank == 0 else 0
        try:
            if begun == total:
                return Outcome("finished")
            with Profile(self.root, f"stage{task.stage}", steps) as profile:
                for outcome in self._steps():
                    if bar is not None:
                        bar.update(1)
                    profile.step()
                    if outcome is not None:
                        return outcome
        finally:
            if self.listener is not None:
                self.listener.close()
            if bar is not None:
                bar.close()
            if self.metrics is not None:
                self.metrics.close()
        raise AssertionError("the last step has an outcome")

    def _steps(self) -> Iterator[Outcome | None]:
        """Train; after each step what comes of it: an outcome where the worker ends."""
        waited = time.perf_counter()
        self.liveness.at(self.task.global_step(self.start), live.DATA)
        for position, batches in self._batches():
            began = time.perf_counter()
            step = self.task.global_step(position)
            self.liveness.at(step, live.STEP)
            told, shares = self._step(step, batches, began - waited)
            ended = time.perf_counter()
            row = self._row(position, told, shares, ended - waited)
            waited = ended
            yield self._after(position, row, told)
            self.liveness.at(step + 1, live.DATA)

    def _step(self, step: int, batches: list[MicroBatch], wait: float) -> tuple[Told, dict[str, Tensor]]:
        told: list[Told] = []

        def before_update(shares: dict[str, Tensor]) -> None:
            told.append(
                tell(
                    shares,
                    LOSSES[self.task.stage],
                    self.lanes,
                    tokens=sum(batch.cells.tokens_T.numel() for batch in batches),
                    wait=wait,
                    flags=self._flags(step),
                )
            )
            self.guard.judge(told[0].losses.values())

        shares = run_step(self.engine, self.lanes, batches, step, before_update=before_update)
        self.guard.count()
        self.trace.add(step, batches, shares.get("drawn"))
        if self.guard.skips:
            self._write_skipped(step, batches, shares.get("drawn"))
        return told[0], shares

    def _row(
        self, position: Position, told: Told, shares: dict[str, Tensor], seconds: float
    ) -> dict[str, Any]:
        norm = self.engine.get_global_grad_norm()
        return {
            "step": self.task.global_step(position),
            "epoch": position.epoch,
            "stage": self.task.stage,
            "time": time.time(),
            "done": self.task.share_done(self.task.global_step(position)),
            "cells_per_s": self.task.plan.global_batch / seconds,
            "tokens_per_s": told.tokens / seconds,
            "mfu": self._mfu(told.work, seconds),
            "data_wait": told.wait / seconds,
            "peak_memory_bytes": peak_memory(self.device),
            "lr": self.engine.get_lr()[0],
            "grad_norm": None if norm is None else float(norm),
            "skipped": self.guard.skipped,
            "ctm_empty": float(shares["empty"]),
            **told.losses,
        }

    def _after(self, position: Position, row: dict[str, Any], told: Told) -> Outcome | None:
        """Metrics, and what is due after a step: an epoch's end, a checkpoint, an end."""
        task, step = self.task, row["step"]
        ends_epoch = position.step == task.plan.steps - 1
        last = step == task.last_step - 1
        val = {}
        if ends_epoch:
            self.liveness.at(step, live.VALIDATION)
            val = validate(task, self.ready, self.liveness.again)
        if self.metrics is not None:
            losses = {name: row[name] for name in LOSSES[task.stage]}
            self.metrics.write({k: v for k, v in row.items() if k not in losses}, {**losses, **val})
        if ends_epoch:
            self._end_epoch(position.epoch, val)
        self.liveness.at(step, live.CHECKPOINT)
        if "give_up" in told.flags:
            return self._give_up()
        if 0 < task.train.max_skipped <= self.guard.in_row:
            self.saver.wait(self.device)
            return Outcome("failed", self._say_skipped(step))
        stops = "stop" in told.flags
        milestone = ends_epoch and (last or (position.epoch + 1) % task.train.checkpoint_epochs == 0)
        if last or stops or "save" in told.flags or self._is_drained(told):
            if not self._save_now(step, val, ends_epoch):
                return self._give_up()
            if self.listener is not None:
                self.listener.saved()
            return Outcome("finished") if last else Outcome("stopped") if stops else None
        if (milestone or "due" in told.flags) and (milestone or "busy" not in told.flags):
            if milestone:
                self.saver.wait(self.device)
            self.saver.save(self.engine, self._cursor(step), val.get("val_loss"), ends_epoch=ends_epoch)
            self._saved, self._saved_at = time.monotonic(), step + 1
        return None

    def _flags(self, step: int) -> frozenset[str]:
        """What this rank raises in the collective of a step."""
        options, now = self.task.train, time.monotonic()
        flags = {"busy"} if self.saver.busy else set()
        if self.rank == 0:
            by_time = 0 < options.checkpoint_minutes * 60 <= now - self._saved
            every, first = options.checkpoint_steps, self.task.first_step
            by_steps = every and (step + 1 - first) // every > (self._saved_at - first) // every
            flags |= {"due"} if by_time or by_steps else set()
            flags |= self.listener.heard if self.listener is not None else set()
            flags |= {"give_up"} if self.saver.hopeless or self.saver.taken_over else set()
            if self._asks and now - self._asked > ASK_S:
                self._asked = now
                flags.add("ask")
        return frozenset(flags)

    def _is_drained(self, told: Told) -> bool:
        """Whether a node is about to be taken away, for which no checkpoint was made yet; asked now and
        then."""
        info = ray.train.get_preemption_info() if "ask" in told.flags else None
        if info is None or tuple(info.preempted_node_ids) == self._warned_of:
            return False
        self._warned_of = tuple(info.preempted_node_ids)
        return True

    def _cursor(self, step: int) -> Cursor:
        following = self.task.position(step + 1)
        return Cursor(
            self.task.stage,
            following.epoch,
            following.step,
            step + 1,
            self.task.plan.hash,
            self.guard.skipped,
            self.guard.in_row,
        )

    def _save_now(self, step: int, val: dict[str, float], ends_epoch: bool) -> bool:
        self._saved, self._saved_at = time.monotonic(), step + 1
        return self.saver.save_now(
            self.device, self.engine, self._cursor(step), val.get("val_loss"), ends_epoch=ends_epoch
        )

    def _on_rank_0(self, work: Callable[[], None]) -> None:
        """Let rank 0 do what is done once. A collective: where it fails, every rank raises InputError."""
        failure: list[str | None] = [None]
        if self.rank == 0:
            try:
                work()
            except OSError as error:
                failure = [f"run.dir: {self.task.run_dir} cannot be written to: {error}"]
            except InputError as error:
                failure = [str(error)]
        dist.broadcast_object_list(failure, 0)
        if failure[0] is not None:
            raise InputError(failure[0])

    def _take_over(self) -> None:
        """From here on no other workers commit to this run: a node that is cut off does not know that it was
        given up, and goes on. Raises InputError where the run is another job's."""
        owner = read_file(self.root, OWNER).decode() if self.task.job else ""
        if owner.partition(" ")[0] != self.task.job:
            raise InputError(f"another job has taken over the run in {self.task.run_dir}; this one ends")
        write_file(self.root, OWNER, self.token.encode())

    def _begin(self, step: int) -> None:
        """Cut the records back to the cursor, and listen."""
        task = self.task
        for folder in ("", trace.folder_of(task.stage), "skipped"):
            remove_halves(self.root, folder)
        trace.cut_back(self.root, task.stage, step)
        print(
            f"stage {task.stage}  workers: {self.lanes.ranks}, steps {step - task.first_step} to "
            f"{task.last_step - task.first_step}",
            flush=True,
        )
        trackers = Trackers(task.tracking, self.root, task.run_dir, step)
        saved = Store(self.root, task.stage).time(name_of(step))
        self.metrics = Metrics(self.root, task.name, task.stage, step, trackers, saved)
        self.listener = Listener(task.notice) if task.notice is not None else None

    def _before_commit(self) -> None:
        if read_file(self.root, OWNER).decode() != self.token:
            raise TakenOverError(
                f"another job, or other workers of this one, have taken over the run in {self.task.run_dir}; "
                "these write no more"
            )
        assert self.metrics is not None
        self.metrics.publish()

    def _give_up(self) -> Outcome:
        self.saver.wait(self.device)
        why = self.saver.taken_over or (
            f"checkpoints cannot be written to {self.task.run_dir}: {' / '.join(self.saver.failures[-1:])}. "
            "What was committed before stands: mend the storage, then --run.resume true goes on from there."
        )
        return Outcome("failed", why)

    def _write_skipped(self, step: int, batches: list[MicroBatch], drawn_N2: Tensor | None) -> None:
        """The cells of a step that was left out, for inspection."""
        path = f"skipped/step-{step:08d}-{self.rank}-of-{self.lanes.ranks}.parquet"
        try:
            self.root.create_dir("skipped", recursive=True)
            write_file(self.root, path, trace.encode([trace.rows_of(step, batches, drawn_N2)]))
        except OSError as error:
            print(f"{path} was not written: {error}", flush=True)

    def _say_skipped(self, step: int) -> str:
        return (
            f"{self.guard.in_row} steps in a row up to step {step} had a loss or a gradient that is no "
            f"number, or a norm beyond train.skip_grad_norm ({self.task.train.skip_grad_norm:g}). No update "
            f"was made of them, and their cells are in {self.task.run_dir}/skipped. Look at grad_norm and "
            "the losses before them in metrics.jsonl; a lower --train.lr, or other data, needs another run."
        )

    def _batches(self) -> Iterator[tuple[Position, list[MicroBatch]]]:
        task = self.task
        steps = stream(
            task.corpus.dir,
            task.plan,
            lanes=self.lanes.owned,
            epochs=task.epochs,
            start=self.start,
            prefetch=task.corpus.prefetch,
        )
        for position, rows in steps:
            yield position, self.ready.micro_batches(rows, position.epoch, task.short_share)

    def _mfu(self, work: Work, seconds: float) -> float | None:
        """Share of what the devices could do at their bf16 peak; None where that is not known (a CPU)."""
        if self._peak is None:
            return None
        model = self.engine.module.model
        done = step_flops(
            work,
            model.cell_bert.config,
            model.text_bert.config,
            model.cell_proj.out_features,
            locked=self.engine.module.text_locked,
        )
        return mfu(done.total, seconds, self._peak * self.lanes.ranks)

    def _end_epoch(self, epoch: int, val: dict[str, float]) -> None:
        task = self.task
        report: dict[str, Any] = {"stage": task.stage, "epoch": epoch}
        if self.metrics is not None:
            report |= self.metrics.means(LOSSES[task.stage])
        report |= val
        if (
            task.evaluate is not None
            and epoch < task.epochs - 1
            and (epoch + 1) % task.train.evaluate_epochs == 0
        ):
            self.liveness.at(task.first_step + (epoch + 1) * task.plan.steps - 1, live.EVALUATION)
            report |= evaluate(task.evaluate, self.engine)
        if self.rank == 0:
            figures = "  ".join(
                f"{name} {value:.3f}" for name, value in report.items() if isinstance(value, float)
            )
            print(f"stage {task.stage}  epoch {epoch + 1}/{task.epochs}  {figures}", flush=True)
        ray.train.report(report)
