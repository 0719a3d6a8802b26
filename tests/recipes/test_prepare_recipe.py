import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from langcell.config import Config
from langcell.corpus.forecast import task_mb
from langcell.corpus.manifest import Manifest
from langcell.recipes import prepare as prepare_module
from langcell.recipes.entry import main
from langcell.recipes.prepare import plan, run
from tests.s3server import ENVIRONMENT, Fault, s3_server


def test_the_summary_stands_beside_the_corpus_and_tells_of_it(ray_session, demo_uri, tmp_path, capsys):
    config = Config()
    config.census.uri = demo_uri
    config.corpus.dir = str(tmp_path / "corpus")
    config.eval.held_out_types = ["CL:0001054", "natural killer cell"]
    summary = run(config)
    assert json.loads((tmp_path / "corpus/summary.json").read_text()) == summary
    manifest = Manifest.read(config.corpus.dir)
    assert summary["cells"] == manifest.cells == 700
    assert summary["splits"]["held_out"] == 129 + 31
    assert summary["tokens"] == sum(block.tokens for block in manifest.blocks)
    assert (summary["beta_hash"], summary["skipped"]) == (manifest.beta_hash, 0)
    assert (summary["genes"], summary["texts"]) == (manifest.counts["genes"], manifest.counts["texts"])
    assert f"corpus   {tmp_path}/corpus" in capsys.readouterr().out
    assert run(config)["skipped"] == 1
    assert json.loads((tmp_path / "corpus/summary.json").read_text()) == summary  # what making it took
    (tmp_path / "corpus/summary.json").unlink()
    again = run(config)
    assert json.loads((tmp_path / "corpus/summary.json").read_text()) == again


def test_a_corpus_in_a_bucket_that_may_only_be_read_is_used(
    ray_session, demo_uri, tmp_path, capsys, monkeypatch
):
    config = Config()
    config.census.uri = demo_uri
    config.corpus.dir = str(tmp_path / "corpus")
    made = run(config)
    (tmp_path / "corpus/summary.json").unlink()
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with s3_server() as server:
        server.client.create_bucket(Bucket="corpora")
        server.upload(tmp_path / "corpus", "corpora", "demo")
        config.corpus.dir = server.uri("corpora/demo")
        with server.fault(Fault(methods=("PUT", "POST", "DELETE"), status=403)):
            assert run(config)["corpus_hash"] == made["corpus_hash"]
    said = capsys.readouterr().out
    assert "summary.json cannot be written" in said
    assert "700 cells" in said


def test_a_plan_counts_what_prepare_will_and_touches_nothing(demo_uri, tmp_path, capsys, ray_session):
    config = Config()
    config.census.uri = demo_uri
    config.corpus.dir = str(tmp_path / "corpus")
    config.census.slice_nnz = 50_000
    config.eval.held_out_types = ["CL:0001054"]
    expected = plan(config)
    assert not (tmp_path / "corpus").exists()
    said = capsys.readouterr().out
    assert "cell_type" in said
    assert f"slices     {expected['slices']}, 3 passes over X" in said
    assert f"memory     {task_mb(50_000)} MB a task at most" in said
    summary = run(config)
    for key in ("cells", "texts", "slices", "splits"):
        assert expected[key] == summary[key]
    nnz = pq.read_table(tmp_path / "corpus" / "beta.parquet")["n_nonzero"].to_numpy().sum()
    assert nnz < expected["nnz"] == 174_400  # of all splits, not of the train cells alone
    written = sum(block.bytes for block in Manifest.read(config.corpus.dir).blocks)
    assert 0.3 * written < expected["bytes_written"] < 3 * written


def test_a_plan_for_medians_of_others_reads_x_once(shared, demo_uri, tmp_path):
    config = Config()
    config.census.uri = demo_uri
    config.beta.source = str(shared / "geneformer" / "gene_median_dictionary.pkl")
    assert plan(config)["passes"] == 1


def test_the_job_plans_on_its_flag(demo_uri, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare_module, "connect", None)  # no Ray is started
    demo = Path(__file__).parents[2] / "jobs" / "configs" / "demo.yaml"
    argv = ["--plan", f"--census.uri={demo_uri}", f"--corpus.dir={tmp_path / 'corpus'}"]
    assert main(run, "Prepare.", demo, argv, plan=plan) == 0
    assert "cells      700" in capsys.readouterr().out
    assert main(run, "Prepare.", demo, [*argv, "--census.expected_cells=701"], plan=plan) == 2
    assert "matches 700 cells, census.expected_cells says 701" in capsys.readouterr().err
    assert main(run, "Another job.", demo, argv) == 2  # one that cannot plan knows no such flag


def test_preparing_loads_no_torch():
    """It would cost every `--plan` 3 s."""
    says = "import sys, langcell.recipes.prepare; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", says], capture_output=True, check=True).stdout == b"False\n"
