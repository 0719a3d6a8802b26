"""Fine-tune a trained model on the labelled cells of a study: jobs/finetune.py.

Labels, splits, counts and texts are checked before Ray is started. Sentences are made once, here, and
shared with the workers through Ray's object store with the module that they train; the workers commit every
epoch in the run directory, and where that holds whole epochs of the same fine-tuning the job goes on from
them. The result is judged once, on the test cells, beside the best answer that knows no cell.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from langcell.config import FinetuneConfig
from langcell.errors import InputError, RunError
from langcell.files import write_whole
from langcell.inference.annotate import warn_of_free_text
from langcell.inference.candidates import Candidate, read_candidates, read_file
from langcell.inference.embed import tokenize
from langcell.inference.options import AnnotateOptions
from langcell.inference.predict import FineTuned
from langcell.inference.pretrained import Pretrained
from langcell.model.classifier import started
from langcell.objective.few_shot import FewShot
from langcell.recipes.finetuned import (
    answers_of_classifier,
    answers_of_few_shot,
    as_stated,
    judge,
    measured,
    save,
)
from langcell.recipes.labelled import Study, read_study
from langcell.recipes.options import FinetuneOptions
from langcell.recipes.session import connect
from langcell.recipes.stopping import Stopping
from langcell.storage import absolute, digest_json
from langcell.train.epochs import Epochs
from langcell.train.finetune import Task, work
from langcell.train.fitting import classifier_task, few_shot_task


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune; the summary, which also stands in summary.json of `run.dir`, beside model/ and
    predictions.parquet of the test cells.

    Raises InputError for what the user can mend, RunError where the workers fail again and again or the loss
    is no number, Interrupted by a signal.
    """
    asked, begun = config.finetune, time.monotonic()
    if "://" in config.run.dir:
        raise InputError(f"run.dir: {config.run.dir} is a URI; a fine-tuning is run in a folder")
    if asked.method == "few_shot" and (asked.kind != "classification" or asked.init != "model"):
        raise InputError(
            "finetune.method few_shot is a classification that starts from the model's own weights"
        )
    for name in ("min_score", "roll_up"):
        if getattr(config.score, name) != getattr(AnnotateOptions(), name):
            raise InputError(f"score.{name} is of annotating; every test cell of a fine-tuning is answered")
    directory = Path(absolute(config.run.dir))
    model = Pretrained.from_pretrained(absolute(asked.model), device="cpu")
    if asked.method == "few_shot":
        model.refuse_classifier()
    study = read_study(asked, model, config.fit.seed)
    texts = _texts(asked, study.labels.head.classes, model) if asked.method == "few_shot" else []
    task = replace(_task(config, model, study, texts), folder=directory / "checkpoints")
    task = replace(task, fingerprint=_fingerprint(task, study))
    if (directory / "model").exists() and _epochs(task).newest() is None:
        raise InputError(
            f"run.dir: {directory / 'model'} is there, and no epoch of this fine-tuning beside it: it may be "
            "another's. Choose another --run.dir, or move it"
        )
    _say(asked, model, study)
    history = _train(task, config)
    found: FineTuned | Pretrained
    if isinstance(task.module, FewShot):
        found, tested = answers_of_few_shot(task.module, config.score, model, study, texts)
    else:
        found, tested = answers_of_classifier(task.module, asked.init, config.fit.batch_tokens, model, study)
    judged = judge(study, tested)
    name = study.labels.head.target
    tested.insert(0, name, as_stated(study.labels, study.split.test))
    tested.index = study.names[study.split.test]
    summary = {
        "target": name,
        "kind": asked.kind,
        "method": asked.method,
        "mode": asked.mode if asked.method == "classifier" else None,
        "init": asked.init,
        "classes": list(study.labels.head.classes),
        "split": {
            "rule": study.split.rule,
            **{part: len(getattr(study.split, part)) for part in ("train", "val", "test")},
            "left_out": study.left_out,
        },
        "test": judged,
        "epochs": history,
        "best_epoch": _epochs(task).newest().best,  # type: ignore[union-attr]
        "seconds": time.monotonic() - begun,
        "model": str(directory / "model"),
    }
    save(found, directory / "model", summary, texts)
    write_whole(directory / "predictions.parquet", tested.to_parquet())
    write_whole(directory / "summary.json", json.dumps(summary, indent=2))
    print(
        f"test     {len(tested):,} cells: {measured(judged['model'])}; the best constant: "
        f"{measured(judged['constant'])}"
    )
    for what, file in (("model", "model"), ("cells", "predictions.parquet"), ("summary", "summary.json")):
        print(f"{what:<8} {directory / file}", flush=True)
    return summary


def _texts(asked: FinetuneOptions, classes: tuple[str, ...], model: Pretrained) -> list[Candidate]:
    """The text of each class. Raises InputError where one has none, or two have the same."""
    given: dict[str, str] = {}
    if asked.texts is not None:
        read = read_file(asked.texts)
        if not isinstance(read, dict):
            raise InputError(
                f"finetune.texts: {asked.texts} needs two columns, class and candidate, and a tab"
            )
        given = read
        if missing := [name for name in classes if name not in given]:
            raise InputError(f"finetune.texts: {asked.texts} has no text of {', '.join(missing[:10])}")
    texts = read_candidates({name: given.get(name, name) for name in classes}, model.ontology)
    of: dict[str, str] = {}
    for one in texts:
        if (other := of.setdefault(one.text, one.label)) != one.label:
            raise InputError(
                f"finetune.texts: {other} and {one.label} have the same text ({one.text!r}), by which "
                "nothing can tell them apart"
            )
    warn_of_free_text(texts)
    return texts


def _task(config: FinetuneConfig, model: Pretrained, study: Study, texts: list[Candidate]) -> Task:
    asked, split = config.finetune, study.split
    train, val = study.part(split.train), study.part(split.val)
    if texts:
        packed = tokenize(model.tokenizer, [one.text for one in texts], model.text.max_length)
        return few_shot_task(model.model, train, packed, val, tau=model.tau, options=config.fit)
    start = model.model if asked.init == "model" else started(model.model, asked.init, config.fit.seed)
    return classifier_task(
        start,
        train,
        val,
        kind=asked.kind,
        outputs=study.labels.head.outputs,
        mode=asked.mode,
        lora_rank=asked.lora_rank,
        options=config.fit,
    )


def _fingerprint(task: Task, study: Study) -> str:
    """Of all that decides the result: cells, labels, split, options and the weights to start from."""
    data = hashlib.blake2b(digest_size=16)
    arrays = [study.cells.tokens_T, study.cells.cu_seqlens_B1, task.train.target, task.val.target]
    arrays += [torch.from_numpy(rows) for rows in (study.split.train, study.split.val)]
    if isinstance(task.module, FewShot):
        buffers = dict(task.module.named_buffers())  # the texts, which its state has not
        arrays += [buffers["tokens_L"], buffers["cu_seqlens_C1"], torch.tensor(task.module.tau)]
    for tensor in (*arrays, *task.module.state_dict().values()):
        data.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    trained = [name for name, parameter in task.module.named_parameters() if parameter.requires_grad]
    return digest_json([data.hexdigest(), asdict(task.options), task.lr, trained, task.module.extra_tokens])


def _epochs(task: Task) -> Epochs:
    assert task.folder is not None
    return Epochs(task.folder, task.fingerprint)


def _train(task: Task, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Fine-tune on the cluster what is not done yet; the history. `task.module` takes the best epoch's
    weights."""
    asked, epochs = config.finetune, _epochs(task)
    done = epochs.newest()
    if done is not None:
        print(f"resume   after {done.epochs} of {task.options.epochs} epochs", flush=True)
    if done is None or done.epochs < task.options.epochs:
        stopping = Stopping()
        with connect(config.run), tempfile.TemporaryDirectory() as ray_dir:
            gpus = asked.gpus
            if gpus is None:
                there = ray.cluster_resources().get("GPU", 0)
                gpus = torch.version.cuda is not None and there >= asked.num_workers
            trainer = TorchTrainer(
                work,  # type: ignore[arg-type]  # it also returns something
                train_loop_config={"task": ray.put(task)},
                torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
                scaling_config=ScalingConfig(num_workers=asked.num_workers, use_gpu=gpus),
                run_config=RunConfig(
                    name="finetune",
                    storage_path=ray_dir,  # Ray Train keeps nothing of ours there
                    failure_config=FailureConfig(max_failures=asked.max_failures),
                    logging_config=LoggingConfig("WARNING"),  # type: ignore[call-arg]  # stubs are older
                ),
            )
            try:
                with stopping.install():
                    result = stopping.attend(trainer.fit, lambda: False)
            except TrainingFailedError as error:
                raise RunError(
                    f"workers failed more than finetune.max_failures ({asked.max_failures}) times; whole "
                    f"epochs stand, the same command goes on from them. The last failure: {error}"
                ) from error
        if (why := result.return_value) is not None:  # type: ignore[attr-defined]  # it is V2's
            raise RunError(why)
        done = epochs.newest()
        if done is None or done.epochs < task.options.epochs:
            there = f"{done.epochs if done else 0} of {task.options.epochs} epochs"
            raise RunError(
                f"run.dir: every node must see {task.folder}; the workers are done, it has {there}"
            )
    weights, _ = epochs.read(done.best)
    with torch.no_grad():
        for name, parameter in task.module.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    return done.history


def _say(asked: FinetuneOptions, model: Pretrained, study: Study) -> None:
    head, split = study.labels.head, study.split
    what = asked.mode if asked.method == "classifier" else "both encoders"
    print(
        f"model    {model.name}: {asked.method} ({what}, from {asked.init}) of {head.target}, {asked.kind}"
        + f" of {len(head.classes)}" * bool(head.classes)
        + f"\nsplit    {split.rule}: {len(split.train):,} cells to train, {len(split.val):,} to validate, "
        f"{len(split.test):,} to test"
        + "".join(f"; {n:,} left out ({why})" for why, n in study.left_out.items()),
        flush=True,
    )
