"""What a user may get wrong: exit code 2, a message that says what and where, and nothing trained.

In this process, because a job takes seconds to import; one real process shows that the exit code and the
bare message reach the shell.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiledbsoma as soma
from transformers import BertConfig, BertModel

from langcell.recipes import pretrain
from langcell.recipes.entry import INPUT_ERROR, main

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "jobs" / "configs" / "demo.yaml"

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of those jobs that get as far as preparing one."""
    return tmp_path_factory.mktemp("bad-input") / "corpus"


@pytest.fixture
def refused(
    ray_session: None,
    demo_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Refused:
    """Run the main job with overrides that it must refuse; its message."""

    def run(*overrides: str, preset: Path = DEMO) -> str:
        monkeypatch.setattr(pretrain, "fit", lambda task: pytest.fail("training began"))
        places = [f"--run.dir={tmp_path / 'run'}", f"--corpus.dir={tmp_path / 'corpus'}"]
        places += [f"--census.uri={demo_uri}"]
        code = main(pretrain.run, "Pretrain LangCell.", DEMO, [f"--config={preset}", *places, *overrides])
        message = capsys.readouterr().err
        assert code == INPUT_ERROR, message
        assert "\nerror: " in f"\n{message}"
        assert "Traceback" not in message
        assert not (tmp_path / "run").exists(), "the corrected command would find the directory taken"
        return message

    return run


def test_unknown_key(refused: Refused) -> None:
    """Nor is the beginning of a key taken for the key."""
    assert "--train.num_worker=4" in refused("--train.num_worker=4")


def test_unknown_key_in_a_file(refused: Refused, tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text(DEMO.read_text().replace("stage1_epochs:", "stage_1_epochs:"))
    assert "stage_1_epochs" in refused(preset=preset)


def test_value_of_a_wrong_type(refused: Refused) -> None:
    assert "train.lr" in refused("--train.lr=fast")


def test_census_that_does_not_exist(refused: Refused, tmp_path: Path) -> None:
    message = refused(f"--census.uri={tmp_path / 'nowhere'}")
    assert "census.uri" in message
    assert str(tmp_path / "nowhere") in message


def test_credentials_among_the_options(refused: Refused) -> None:
    message = refused("--beta.source=s3://AKIA:wJalrXUtnFEMI@bucket/beta.parquet")
    assert "beta.source: a URI must hold no credentials" in message
    assert "wJalr" not in message


def test_filter_that_matches_nothing(refused: Refused) -> None:
    message = refused("--census.filter=tissue == 'moon dust'")
    assert "census.filter" in message
    assert "moon dust" in message


def test_filter_that_cannot_be_read(refused: Refused) -> None:
    assert "census.filter" in refused("--census.filter=is_primary_data ==")


def test_obs_column_that_is_missing(refused: Refused, demo_uri: str, tmp_path: Path) -> None:
    """A Census whose obs has no `tissue`."""
    poor = tmp_path / "census"
    shutil.copytree(demo_uri, poor)
    place = poor / "census_data" / "homo_sapiens" / "obs"
    with soma.open(str(place)) as obs:
        table = obs.read().concat().drop_columns(["tissue"])
    shutil.rmtree(place)
    with soma.DataFrame.create(str(place), schema=table.schema, domain=[[0, len(table) - 1]]) as obs:
        obs.write(table)
    message = refused(f"--census.uri={poor}")
    assert "tissue" in message
    assert "cell_type" in message, "the columns that obs does have are listed"


def test_fewer_cells_than_one_global_batch(refused: Refused, corpus: Path) -> None:
    message = refused(f"--corpus.dir={corpus}", "--train.global_batch=4096", "--train.micro_batch=2048")
    assert "global_batch" in message
    assert "4096" in message


def test_vocabulary_that_does_not_fit_the_checkpoint(refused: Refused, corpus: Path, tmp_path: Path) -> None:
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=25_426, **tiny)).save_pretrained(tmp_path / "geneformer")
    message = refused(f"--corpus.dir={corpus}", f"--model.cell_init={tmp_path / 'geneformer'}")
    assert "vocabulary" in message
    assert "25426" in message
    assert "--tokens.vocabulary" in message


def test_held_out_type_that_is_not_in_the_data(refused: Refused) -> None:
    message = refused("--eval.held_out_types=[CL:0000900,CL:0000540]")
    assert "CL:0000540" in message
    assert "held_out_types" in message


def test_fewer_lanes_than_workers(refused: Refused) -> None:
    message = refused("--train.num_workers=3")
    assert "2 lanes for 3 workers" in message
    assert "num_workers" in message


def test_the_shell_sees_the_message_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = subprocess.run(
        [sys.executable, "jobs/pretrain.py", f"--run.dir={run}", "--train.num_worker=4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert job.returncode == INPUT_ERROR, job.stderr
    assert "--train.num_worker=4" in job.stderr
    assert "Traceback" not in job.stderr
    assert not run.exists()
