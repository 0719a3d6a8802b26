"""The benchmark of the training step: ours beside the straightforward Hugging Face step (`hf_step`).

Micro-batches of the real plan over a corpus with the Census's lengths, 6 layers of 256 with MiniLM-size text,
whole optimiser steps of both in the same engine, by turns in processes of their own. Headline rows `stage1`
and `stage2`, cells per second. `details` hold what the operations of the same batches allow
(`model.flops`) and the share of it that was reached, each saving alone (the shared view is a deviation from
the paper and no part of the headline), peak memory of every kind of step, how far losses and gradients of
both are apart, and the law of the lengths. On a CPU peak memory is that of the process, libraries and
weights included (about 1 GB before the first step).

On a GPU the same at three sizes in bf16, with MFU and PyTorch's peak of GPU memory, and a trace of two steps
of ours at each in `profile/`; without one the record says "not measured".
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from langcell.bench import batches, records, step_work
from langcell.bench.data import build
from langcell.bench.figures import Figures, headline, row
from langcell.bench.hf_step import Savings
from langcell.bench.options import StepOptions
from langcell.bench.processes import alone
from langcell.bench.step_work import Kind, Stepped, StepTask
from langcell.bench.turns import Kept
from langcell.cells.options import TokenOptions
from langcell.errors import InputError
from langcell.model import flops
from langcell.model.options import ModelOptions

OURS, BASELINE = Kind(None), Kind(Savings())
PACKING = Kind(Savings(packing=True))
KINDS = {
    1: {
        "ours": OURS,
        "baseline": BASELINE,
        "packing": PACKING,
        "masked_projection": Kind(Savings(masked=True)),
        "shared_view": Kind(Savings(), view="shared"),
    },
    2: {
        "ours": OURS,
        "baseline": BASELINE,
        "packing": PACKING,
        "shared_keys": Kind(Savings(keys=True)),
        "distinct_texts": Kind(Savings(texts=True)),
    },
}
"""Each saving alone in the stage where it weighs most; packing in both."""
SIZES = {
    "6x256": ModelOptions(cell_layers=6, cell_width=256, cell_heads=4),
    "12x512": ModelOptions(cell_layers=12, cell_width=512, cell_heads=8),
    "12x896": ModelOptions(cell_layers=12, cell_width=896, cell_heads=14),
}
HEADLINE = "6x256"
GPU_BATCHES = 8


def run(options: StepOptions) -> Figures:
    """Measure, print a table, write summary.json in `options.dir`; what stands there.

    Raises InputError for options that cannot be, RuntimeError if ours and the baseline's results differ.
    """
    _check(options)
    directory = Path(os.path.abspath(options.dir))
    directory.mkdir(parents=True, exist_ok=True)
    load, cpus = os.getloadavg()[0], len(os.sched_getaffinity(0))
    os.environ["TQDM_DISABLE"] = "1"  # inherited by what is measured; read when tqdm is imported
    uri = alone(build, str(directory), options.cells, options.seed).values[0]
    with tempfile.TemporaryDirectory(prefix="corpus-", dir=directory) as scratch:
        corpus = str(Path(scratch) / "corpus")
        vocab_size = alone(batches.corpus, uri, corpus, cpus, cpus=cpus).values[0]
        sizes = SIZES if options.device == "cuda" else {HEADLINE: SIZES[HEADLINE]}
        found = {
            name: {
                str(stage): _Stage(options, corpus, vocab_size, model, stage, cpus).measure(name)
                for stage in (1, 2)
            }
            for name, model in sizes.items()
        }
    stages = found[HEADLINE]
    summary = {
        **{f"stage{n}": row(f["ours"], f["baseline"], "cells_per_s", "cells/s") for n, f in stages.items()},
        "details": {
            "sizes": found,
            "gpu": stages["1"]["device"]["name"] if options.device == "cuda" else "not measured",
            "cpus": cpus,
            "load_average_before": load,
        },
    }
    records.publish("step", options, summary, table(summary))
    return summary


class _Stage:
    """One stage of one model over one corpus."""

    def __init__(
        self, options: StepOptions, corpus: str, vocab_size: int, model: ModelOptions, stage: int, cpus: int
    ) -> None:
        self.options, self.cpus, self.stage = options, cpus, stage
        self.on_gpu = options.device == "cuda"
        cells, count = _batches(options)
        self.task = StepTask(
            directory=corpus,
            vocab_size=vocab_size,
            cell_length=TokenOptions().max_length,
            model=model,
            stage=stage,
            micro_batch=cells,
            count=count,
            seed=options.seed,
            device=options.device,
        )

    def measure(self, size: str) -> Figures:
        """All figures of the stage; on a GPU a trace of ours beside them."""
        if self.on_gpu:
            folder = Path(os.path.abspath(self.options.dir)) / "profile"
            self.task = dataclasses.replace(self.task, trace=folder / f"{size}-stage{self.stage}")
        kinds = KINDS[self.stage] if size == HEADLINE else {"ours": OURS, "baseline": BASELINE}
        compared = self.options.compared_cells
        facts = alone(step_work.survey, self.task, kinds, compared, cpus=self.cpus).values[0]
        _check_equal(facts["equal"])
        operations, peak = facts.pop("flops"), facts["device"]["peak_flops"]
        # Ours and the baseline side by side; a saving alone by itself, for a process keeps what it once held
        # (of 8 padded cells 16 GB in stage 2).
        names, done = list(kinds), dict[str, list[Stepped]]()
        for group in (names[:2], *([name] for name in names[2:])):
            done |= self._by_turns({name: kinds[name] for name in group}, size)
        found = {name: self._figures(turns, operations[name], peak) for name, turns in done.items()}
        for name, each in found.items():
            theirs = done["baseline"][: len(done[name])]  # the same micro-batches
            which = [number for turn in done[name] for number in turn.which]
            each["faster"] = sum(s for turn in theirs for s in turn.seconds) / sum(each["seconds"])
            each["allowed"] = sum(operations["baseline"][number] for number in which) / each.pop("operations")
        ours, baseline = found.pop("ours"), found.pop("baseline")
        return {
            "ours": ours,
            "baseline": baseline,
            "share_of_allowed": ours["faster"] / ours["allowed"],
            "alone": found,
            "micro_batch": self.task.micro_batch,
            "vocabulary": self.task.vocab_size,
            **({"trace": f"profile/{self.task.trace.name}"} if self.task.trace else {}),
            **facts,
        }

    def _by_turns(self, kinds: dict[str, Kind], size: str) -> dict[str, list[Stepped]]:
        """Ours and the baseline in every turn; a saving alone in one, after those.

        On a CPU a turn is one step, on a micro-batch of its own; on a GPU all of them, after all of them.
        """
        done: dict[str, list[Stepped]] = {name: [] for name in kinds}
        with ExitStack() as stack:
            kept = {}
            for name, kind in kinds.items():
                kept[name] = stack.enter_context(Kept(step_work.steps, self.task, kind, cpus=self.cpus))
            for process in kept.values():
                process.wait()
            for turn in range(self.options.repeats if "ours" in kinds else 1):
                which = list(range(self.task.count)) if self.on_gpu else [turn]
                for name, process in kept.items():
                    stepped, peak_mb = process.turn(which, self.on_gpu)
                    stepped = dataclasses.replace(stepped, peak_mb=stepped.peak_mb or peak_mb)
                    done[name].append(stepped)
                    _note(f"{size}, stage {self.stage}, {name}", stepped)
        return done

    def _figures(self, turns: list[Stepped], of_batch: list[float], peak: float | None) -> Figures:
        steps = [step for turn in turns for step in turn.seconds]
        operations = sum(of_batch[number] for turn in turns for number in turn.which)
        cells = len(steps) * self.task.micro_batch
        return {
            "cells_per_s": cells / sum(steps),
            "seconds": steps,
            "operations": operations,
            "flops_per_cell": operations / cells,
            "flops_per_s": operations / sum(steps),
            **({"mfu": flops.mfu(operations, sum(steps), peak)} if peak else {}),
            "peak_mb": max(turn.peak_mb or 0.0 for turn in turns),
            "losses": turns[0].losses,
        }


def table(summary: Figures) -> str:
    """The headline rows, and every kind of step, to read."""
    lines = headline(summary)
    lines.append(
        f"\n{'':38}{'cells/s':>10}{'GFLOP/cell':>12}{'TFLOP/s':>9}{'faster':>8}{'allowed':>9}{'peak MB':>9}"
    )
    for size, stages in summary["details"]["sizes"].items():
        for stage, found in stages.items():
            for name, each in {
                "ours": found["ours"],
                "baseline": found["baseline"],
                **found["alone"],
            }.items():
                used = f"  MFU {each['mfu']:.1%}" if "mfu" in each else ""
                lines.append(
                    f"{f'{size}, stage {stage}, {name}':38}{each['cells_per_s']:10.3f}"
                    f"{each['flops_per_cell'] / 1e9:12.1f}{each['flops_per_s'] / 1e12:9.3f}"
                    f"{each['faster']:8.2f}{each['allowed']:9.2f}{each['peak_mb']:9,.0f}{used}"
                )
            equal = found["equal"]
            lines.append(
                f"{'':4}{found['share_of_allowed']:.0%} of what the operations allow; losses within "
                f"{equal['loss_difference']:.1e}, gradients {equal['gradient_difference']:.1e} "
                f"(worst parameter {equal['worst_gradient_difference']:.1e})"
            )
    lengths = summary["details"]["sizes"][HEADLINE]["1"]["lengths"]
    cells, dealt = lengths["cells"], lengths["batches"]
    lines.append(
        f"\n{cells['n']:,} cells of {cells['mean']:,.0f} tokens, {cells['cut']:.0%} of them cut, E[L^2]/E[L] "
        f"{cells['mean_square_over_mean']:,.0f}; padding {dealt['padding']:.2f}, "
        f"texts of {dealt['mean_text_tokens']:.0f} tokens, {dealt['distinct_texts']:.1f} distinct in "
        f"{dealt['cells']}"
    )
    return "\n".join(lines)


def _check_equal(found: Figures) -> None:
    """Raises RuntimeError if losses are not equal to 1e-4 and gradients to 1e-3."""
    # Not the other way round: what is no number is not equal.
    if not (found["loss_difference"] <= 1e-4 and found["worst_gradient_difference"] <= 1e-3):
        raise RuntimeError(f"ours is not the straightforward step: {found}")


def _check(options: StepOptions) -> None:
    least = {"cells": 1, "repeats": 1, "compared_cells": 2, "micro_batch": 2}
    for name, lowest in least.items():
        value = getattr(options, name)
        if value is not None and value < lowest:
            raise InputError(f"--{name} is {value}; it must be {lowest} at least.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda, but PyTorch sees no GPU here.")
    cells, count = _batches(options)
    if options.cells < cells * count:
        raise InputError(f"--cells is {options.cells}; the steps take {cells * count}.")


def _batches(options: StepOptions) -> tuple[int, int]:
    """Cells of a micro-batch, and how many of them there are."""
    if options.device == "cuda":
        return options.micro_batch or 16, GPU_BATCHES
    return options.micro_batch or 6, options.repeats


def _note(name: str, done: Stepped) -> None:
    seconds = statistics.median(done.seconds)
    print(f"{name:38}{seconds:10.2f} s a step{done.peak_mb or 0:10,.0f} MB", file=sys.stderr, flush=True)
