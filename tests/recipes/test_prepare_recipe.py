import json

from langcell.config import Config
from langcell.corpus.manifest import Manifest
from langcell.recipes.prepare import run


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
