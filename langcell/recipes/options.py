"""Where a run lives: the options of the recipes room (standard library only)."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class RunOptions:
    """One run."""

    dir: str = "runs/pretrain"
    """Where the run lives: config.yaml, metrics.jsonl, trace/, checkpoints/, export/, report/, summary.json. A folder that every node sees, or any URI that pyarrow knows (s3://, gs://)."""
    name: str | None = None
    """Name of the run in its metrics, report and model card. None: the last part of `dir`."""
    resume: bool | Literal["auto"] = False
    """`true`: go on from the newest whole checkpoint in `dir`; `false`: a folder that holds a run is refused; `auto`: go on where there is a run, else start one, so that the same command can be submitted again and again."""
    seeds: int = 3
    """Runs of jobs/seeds.py (count), with the seeds train.seed, train.seed + 1, ..."""
    ray_address: str | None = None
    """Ray cluster to join: `auto` or host:port. None: the one named by RAY_ADDRESS, else one is started here."""
    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = field(default_factory=list)
    """What the figures of metrics.jsonl go to as well: `tensorboard` (event files in `dir`), `mlflow`, `wandb` (both as their environment variables say). The packages of the last two are yours to install."""


@dataclass
class PlaceOptions:
    """Where a job leaves what it makes, and the cluster it runs on."""

    dir: str = "runs/job"
    """Folder of what the job makes, summary.json among it."""
    ray_address: str | None = None
    """Ray cluster to join: `auto` or host:port. None: the one named by RAY_ADDRESS, else one is started here."""


@dataclass
class AblationOptions:
    """Which parts of the objective are left out or exchanged, one at a time."""

    variants: list[str] = field(
        default_factory=lambda: [
            "all",
            "no_mgm",
            "no_cc",
            "no_ct",
            "no_ctm",
            "paper",
            "mgm_view",
            "ctm_mining",
        ]
    )
    """Runs that are compared: `all` four losses as configured, each loss left out, the published objective (`paper`), and the other value of `objective.mgm_view` and `objective.ctm_mining`."""
    concurrent: int = 1
    """Runs that train at the same time (count). Where they share CPUs, set OMP_WAIT_POLICY=PASSIVE, or their threads spin while they wait for each other."""


@dataclass
class ReadingOptions:
    """By which trained model a file of cells is read, and how."""

    model: str = "runs/demo/export"
    """Directory of the trained model (the `export/` of a run, or what jobs/convert.py wrote)."""
    layer: str | None = None
    """Where the file's raw counts are: None: X; `raw`; or the name of a layer."""
    symbols: str | None = None
    """Table of gene symbols and Ensembl ids (.tsv, .csv, or Geneformer's gene name dictionary), where the file has symbols that the model does not know."""


@dataclass
class AnnotateJobOptions(ReadingOptions):
    """Which cells are annotated, by which model, with which candidates."""

    data: str | None = None
    """.h5ad file with raw counts. None: the cells that `census` selects."""
    candidates: list[str] = field(default_factory=list)
    """What a cell may be called: names, CL ids or descriptions. None given, nor a file: the cell types that the model was trained on."""
    candidates_file: str | None = None
    """The same from a file: one a line, or a label, a tab and the candidate."""
    tissue: list[str] = field(default_factory=list)
    """Without candidates: the model's cell types of these tissues alone (names or UBERON ids)."""
    cluster: str | None = None
    """Column of obs whose clusters also vote by majority."""
    actors: int | None = None
    """Most processes that annotate at the same time (count). None: one for each GPU of the cluster, without any one for each CPU."""
    chunk: int = 512
    """Cells of an .h5ad file that a process takes at a time (count); fewer spread a small file over more processes."""
    figure_cells: int = 10000
    """Most cells of the figure (count), a seeded sample."""


@dataclass
class EvaluateOptions(ReadingOptions):
    """What a trained model is measured by, and on which cells."""

    data: str = "demo"
    """.h5ad file with raw counts; `demo`: the embedded cells that the demo's training left aside."""
    corpus: str | None = None
    """Corpus that the model was trained on: of its cells (by obs soma_joinid) those of the test and held-out splits alone are evaluated. None: runs/demo-corpus for `demo`, else every cell is taken."""
    label: str = "cell_type"
    """Column of obs with the cell types."""
    facets: dict[str, str] = field(default_factory=dict)
    """Other facets that zero-shot is asked about, each with its column of obs (`tissue: organ`). Ontology ids are taken from COLUMN_ontology_term_id where obs has it."""
    terms: str | None = None
    """YAML file of labels and ontology ids (`CD19+ B: CL:0000236`), for labels that are no name or synonym of a term."""
    batch: str | None = None
    """Column of obs with the batches that `integration` shall find mixed."""
    split: str | None = None
    """Column of obs that says `train` or `test`, or whose groups (donor, dataset) stay together, for `finetuning` and `pathways`. None: a fifth of the cells of each type is tested, at random."""
    pathways: str | None = None
    """Gene sets (.gmt) whose activity `pathways` asks for."""
    pathway_columns: list[str] = field(default_factory=list)
    """Columns of obs, true or false, that `pathways` asks for instead of gene sets."""
    geneformer: str | None = None
    """Geneformer-style checkpoint with the model's vocabulary, fine-tuned beside it. None: a cell encoder with random weights (`random_init`)."""
    parts: list[
        Literal["zero_shot", "few_shot", "finetuning", "retrieval", "integration", "clustering", "pathways"]
    ] = field(
        default_factory=lambda: [
            "zero_shot",
            "few_shot",
            "finetuning",
            "retrieval",
            "integration",
            "clustering",
            "pathways",
        ]
    )
    """What is measured."""
    shots: list[int] = field(default_factory=lambda: [1, 3, 5, 10])
    """Cells of each type that `few_shot` shows (counts)."""
    shot_steps: int = 100
    """Least optimiser steps of a classifier that is fine-tuned (count); `fit.epochs` of a handful of cells would be fewer."""
    recall: list[int] = field(default_factory=lambda: [1, 5, 10])
    """The k of `retrieval`'s R@k (counts)."""
    seeds: int = 3
    """Seeds of draws and trainings, over which figures are averaged (count)."""
    seed: int = 0
    """First of them; also of the sample of cells and of the split."""
    max_cells: int = 2000
    """Most cells that are evaluated (count), a seeded sample of the data."""
    top_k: int = 5
    """Candidates of a cell that the matching encoder scores (count)."""
    a: float = 0.1
    """Weight of the contrastive logits in `two_step`; 1 - a goes to the matching logits (0 to 1)."""
    batch_tokens: int = 16384
    """Cell tokens, and text tokens of matched pairs, of one forward (tokens)."""


@dataclass
class ExportOptions:
    """How a trained model is written."""

    layout: Literal["safetensors", "official"] = "safetensors"
    """`safetensors`, or `official`: the layout of LangCell's released weights (.bin files, BLIP's names, [DEC] and [ENC] in the tokenizer), which its code reads."""


@dataclass
class ConvertOptions:
    """Which model is written in which layout."""

    source: str | None = None
    """Folder of the model: LangCell's released weights (cell_bert/, text_bert/, *.bin), or an export in either layout."""
    target: str | None = None
    """Folder of the converted model, which must not hold anything yet. None: `export` in `run.dir`."""
    layout: Literal["safetensors", "official"] = "safetensors"
    """Layout of the converted model, as `export.layout`."""
    tokens: str | None = None
    """Token dictionary that released weights were trained with (Geneformer's token_dictionary.pkl), or a vocabulary.json."""
    medians: str | None = None
    """Medians that they were trained with (Geneformer's gene_median_dictionary.pkl), or a beta.parquet."""
    symbols: str | None = None
    """Table of gene symbols and Ensembl ids (Geneformer's gene_name_id_dict.pkl, .tsv or .csv), so that the model reads files with symbols. None: it reads Ensembl ids alone."""
    tokenizer: str | None = None
    """Folder or Hub id of the tokenizer of released weights. None: the one in their folder, else PubMedBERT's, as their code."""


@dataclass
class FinetuneOptions(ReadingOptions):
    """What is fine-tuned, on which labelled cells, and how they are split."""

    init: str = "model"
    """Weights that the cell encoder starts from: `model`, the model's own; `random`, fresh ones of its shape; or a Geneformer-style folder or Hub id of its shape and vocabulary. The last two are for comparison, with `method: classifier`."""
    data: str | None = None
    """.h5ad file with raw counts and labels in obs."""
    target: list[str] = field(default_factory=lambda: ["cell_type"])
    """Column of obs that is learnt; for `multilabel` one with labels joined by ||, or several of true and false."""
    kind: Literal["classification", "regression", "multilabel"] = "classification"
    """What the target is."""
    method: Literal["classifier", "few_shot"] = "classifier"
    """`classifier`: LangCell-CE, the cell encoder with a head. `few_shot`: both encoders of LangCell, contrast and matching over the texts of the classes."""
    mode: Literal["full", "frozen", "lora"] = "full"
    """What of a classifier trains: everything, its head alone, or its head and low-rank updates of the encoder."""
    lora_rank: int = 8
    """Rank of the updates (count)."""
    texts: str | None = None
    """File of the classes' texts for `few_shot`: two columns with a tab between, class and its name, CL id or description. None: the classes' own names."""
    shots: int | None = None
    """Training cells of each class (count), a seeded choice; no other labelled cell then chooses the epoch, unless `split_by` says val. None: all."""
    split_by: str | None = None
    """Column of obs that says train, val and test; or whose groups (donor, dataset) stay together. None: at random, of each class the same share."""
    test_share: float = 0.2
    """Share of the cells that is tested (0 to 1)."""
    val_share: float = 0.1
    """Share of the cells by whose loss the best epoch is chosen (0 to 1); 0: the last is the best."""
    num_workers: int = 1
    """Ray Train workers (processes; one GPU each where `gpus` is on)."""
    gpus: bool | None = None
    """Whether each worker takes one GPU. None: if PyTorch is a CUDA build and the cluster has as many GPUs as workers."""
    max_failures: int = 3
    """Times that the workers are restarted from their last whole epoch after one died (count)."""
