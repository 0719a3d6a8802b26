"""One tree of options: presets, overrides, and every wrong value refused by name."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from langcell.census.experiment import Census
from langcell.config import (
    BOUNDS,
    AblationConfig,
    AnnotateConfig,
    Config,
    ConvertConfig,
    EvaluateConfig,
    FinetuneConfig,
    parse,
    parse_tree,
)
from langcell.errors import InputError

TREES: dict[str, type] = {
    "demo": Config,
    "ablation": AblationConfig,
    "annotate": AnnotateConfig,
    "convert": ConvertConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
}
"""The options of each job, by the name of its preset; jobs of training read that of the demo."""
CONFIGS = Path(__file__).parents[1] / "jobs" / "configs"


@pytest.mark.parametrize("preset", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_are_valid(preset: Path) -> None:
    parse_tree(TREES.get(preset.stem, Config), "", preset, [])


def test_overrides_follow_the_preset() -> None:
    config = parse("", CONFIGS / "demo.yaml", ["--train.lr", "0.5", "--eval.new_words", "auto"])
    assert config.train.lr == 0.5
    assert config.eval.new_words == "auto"
    assert config.train.stage2_epochs > 3, "the preset's other values stay"


@pytest.mark.parametrize("key", BOUNDS)
def test_a_value_out_of_range_is_named(key: str) -> None:
    least, _ = BOUNDS[key]
    room, name = key.split(".")
    job = next(
        job
        for job, tree in TREES.items()
        if room in tree.__dataclass_fields__ and hasattr(getattr(tree(), room), name)
    )
    preset = CONFIGS / f"{job}.yaml" if job != "ablation" else CONFIGS / "demo.yaml"
    with pytest.raises(InputError, match=re.escape(f"--{key} is ")):
        parse_tree(TREES[job], "", preset, [f"--{key}={0 if least > 0 else int(least) - 1}"])


@pytest.mark.parametrize(
    "argument",
    ["--train.lrr=1", "--train.zero=4", "--train.lr=fast", "--config=absent.yaml", "--model.text_train=x"],
)
def test_what_does_not_exist_is_refused(argument: str) -> None:
    with pytest.raises(InputError, match="configuration: "):
        parse("", CONFIGS / "demo.yaml", [argument])


SECRET = "wJalrXUtnFEMI/K7MDENG"


@pytest.mark.parametrize(
    "argument",
    [
        f"--census.uri=s3://AKIA:{SECRET}@bucket/census",
        f"--census.uri=s3://{SECRET}@bucket/census",
        f"--corpus.dir=abfs://files@account.dfs.core.windows.net/corpus?client_secret={SECRET}",
        f"--corpus.dir=s3://bucket/corpus?region=us-east-1&secret_key={SECRET}",
        f"--corpus.dir=s3://bucket/corpus?endpoint_override=https://me:{SECRET}@host",
        f"--beta.source=https://me:{SECRET}@host/medians.pkl",
        f"--tokens.vocabulary=https://host/vocabulary.json?password={SECRET}",
        f"--model.cell_init=HTTPS://{SECRET.replace('/', '')}@host/weights",
        f"--text.ontologies=[cl.obo, https://host/efo.obo?X-Amz-Security-Token={SECRET}]",
        f'--census.tiledb={{"vfs.s3.endpoint_override": "http://me:{SECRET}@host"}}',
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(argument: str, capsys) -> None:
    option = argument.partition("=")[0].removeprefix("--")
    with pytest.raises(InputError, match=rf"^{re.escape(option)}.*must hold no credentials") as refused:
        parse("", CONFIGS / "demo.yaml", [argument])
    assert "wJalr" not in str(refused.value) + "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "uri",
    [
        "gs://anonymous@bucket/corpus",
        "abfs://container@account.dfs.core.windows.net/corpus",
        "s3://bucket/corpus?region=us-east-1&endpoint_override=127.0.0.1:9000&scheme=http",
        "https://host:8080/package@1.2/cl.obo?download=1",
        "http://purl.obolibrary.org/obo/cl.owl",
        "runs/a:b@c",
    ],
)
def test_uris_without_credentials_pass(uri: str) -> None:
    parse("", CONFIGS / "demo.yaml", [f"--corpus.dir={uri}", f"--text.ontologies=[{uri}]"])


def test_fewer_lanes_than_workers_are_refused() -> None:
    parse("", CONFIGS / "demo.yaml", ["--train.micro_batch=4"])  # two lanes each
    with pytest.raises(InputError, match="2 lanes for 3 workers"):
        parse("", CONFIGS / "demo.yaml", ["--train.num_workers=3"])
    with pytest.raises(InputError, match="multiple of"):
        parse("", CONFIGS / "demo.yaml", ["--train.micro_batch=7"])


def test_the_filter_of_sclibrary_is_one_that_obs_understands(demo_uri: str) -> None:
    census = parse("", CONFIGS / "sclibrary.yaml", []).census
    with Census.open(replace(census, uri=demo_uri)) as source:
        assert len(source.obs([])) == 700  # the embedded cells are primary and of 10x 3' v1
    other = replace(census, uri=demo_uri, filter=census.filter.replace("10x 3' v1", "10x 3' v9"))
    with pytest.raises(InputError, match="matches no cell"):
        Census.open(other)
