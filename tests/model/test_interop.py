"""Checkpoints in and out: Geneformer-style, any BERT, our export."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizerFast

from langcell.batch import Packed
from langcell.errors import InputError
from langcell.model.interop import build_model, cell_config, load_export, load_tokenizer, save_export
from langcell.model.langcell import LangCell
from langcell.model.options import ModelOptions

GENES = 30  # <pad>, <mask>, 28 genes; <cls> is 30
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def text_init(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT with its tokenizer, as any Hugging Face folder."""
    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(1)
    BertModel(BertConfig(vocab_size=8, max_position_embeddings=32, **SHAPE)).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cell", "type", ":"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def geneformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked-language model of Geneformer's kind: its vocabulary ends before `<cls>`."""
    folder = tmp_path_factory.mktemp("geneformer")
    torch.manual_seed(2)
    config = BertConfig(vocab_size=GENES, max_position_embeddings=64, hidden_act="relu", **SHAPE)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def _options(text_init: str, **more: object) -> ModelOptions:
    return ModelOptions(text_init=text_init, projection=8, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_geneformer_weights_load_by_name(
    geneformer: Path, text_init: str, tmp_path: Path, format: str
) -> None:
    folder = geneformer
    if format == "bin":
        folder = tmp_path
        BertConfig.from_pretrained(geneformer).save_pretrained(folder)
        torch.save(BertForMaskedLM.from_pretrained(geneformer).state_dict(), folder / "pytorch_model.bin")
    model = build_model(_options(text_init, cell_init=str(folder)), GENES + 1, 64, seed=0).eval()
    reference = BertForMaskedLM.from_pretrained(geneformer).eval()
    tokens = torch.randint(2, GENES, (1, 20), generator=torch.Generator().manual_seed(0))
    states = model.cell_states(Packed.from_sequences([tokens[0].numpy()]))
    expected = reference.bert(input_ids=tokens).last_hidden_state[0]
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    logits = model.gene_head(states)
    torch.testing.assert_close(logits[:, :GENES], reference(input_ids=tokens).logits[0], rtol=1e-5, atol=1e-5)
    assert model.cell_bert.embeddings.word_embeddings.num_embeddings == GENES + 1


def test_geneformer_v2_gives_the_same_states_under_our_numbers(text_init: str, tmp_path: Path) -> None:
    """V2: <pad> 0, <mask> 1, <cls> 2, <eos> 3, genes 4..29. Ours: genes 2..27, <cls> 28."""
    torch.manual_seed(2)
    reference = BertForMaskedLM(BertConfig(vocab_size=GENES, max_position_embeddings=64, **SHAPE)).eval()
    torch.nn.init.normal_(reference.cls.predictions.bias)
    reference.save_pretrained(tmp_path)
    options = _options(text_init, cell_init=str(tmp_path))
    model = build_model(options, GENES - 1, 64, seed=0).eval()
    genes = torch.randint(4, GENES, (25,), generator=torch.Generator().manual_seed(0))
    genes[:2] = torch.tensor([4, GENES - 1])
    ours = torch.cat([torch.tensor([GENES - 2]), genes - 2, torch.tensor([1])])
    theirs = torch.cat([torch.tensor([2]), genes, torch.tensor([1])])
    states = model.cell_states(Packed.from_sequences([ours.numpy()]))
    expected = reference.bert(input_ids=theirs[None]).last_hidden_state[0]
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    logits, expected = model.gene_head(states), reference(input_ids=theirs[None]).logits[0]
    order = [0, 1, *range(4, GENES), 2]
    torch.testing.assert_close(logits, expected[:, order], rtol=1e-5, atol=1e-5)
    assert build_model(options, GENES - 1, 64, seed=1).cell_bert.config.vocab_size == GENES - 1
    with pytest.raises(InputError, match=r"30 token embeddings, the corpus 28"):
        cell_config(options, GENES - 2, 64)


def test_langcells_own_cell_encoder_keeps_its_row_of_cls(geneformer: Path, text_init: str) -> None:
    """Equal sizes: the last row is `<cls>`, trained."""
    model = build_model(_options(text_init, cell_init=str(geneformer)), GENES, 64, seed=0)
    rows = model.cell_bert.embeddings.word_embeddings.weight
    expected = BertForMaskedLM.from_pretrained(geneformer).bert.embeddings.word_embeddings.weight
    assert torch.equal(rows, expected)


def test_text_weights_by_tensorflows_names_load(text_init: str, tmp_path: Path) -> None:
    """A checkpoint of a masked-language model: `bert.` before its names, gamma and beta in its norms."""
    BertConfig.from_pretrained(text_init).save_pretrained(tmp_path)
    state = BertModel.from_pretrained(text_init).state_dict()
    for name in list(state):
        if "LayerNorm" in name:
            state[name] = torch.rand(16)
    renamed = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): t
        for name, t in state.items()
    }
    torch.save({**renamed, "cls.predictions.bias": torch.zeros(8)}, tmp_path / "pytorch_model.bin")
    load_tokenizer(text_init).save_pretrained(tmp_path)
    loaded = build_model(_options(str(tmp_path)), 40, 64, seed=0).text_bert.state_dict()
    for name, tensor in state.items():
        assert name.startswith("pooler") or torch.equal(loaded[name], tensor), name


def test_a_vocabulary_that_does_not_fit_is_refused(geneformer: Path, text_init: str) -> None:
    with pytest.raises(InputError, match=r"vocabulary does not fit .*30 token embeddings, the corpus 768"):
        cell_config(_options(text_init, cell_init=str(geneformer)), 768, 64)
    with pytest.raises(InputError, match="64 positions"):
        cell_config(_options(text_init, cell_init=str(geneformer)), GENES + 1, 128)


def test_a_checkpoint_that_lacks_a_layer_is_refused(geneformer: Path, text_init: str, tmp_path: Path) -> None:
    BertConfig.from_pretrained(geneformer).save_pretrained(tmp_path)
    state = BertForMaskedLM.from_pretrained(geneformer).state_dict()
    state = {name: tensor for name, tensor in state.items() if "layer.1" not in name}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"missing \['encoder.layer.1"):
        build_model(_options(text_init, cell_init=str(tmp_path)), GENES + 1, 64, seed=0)


def test_a_pickle_with_code_is_not_run(geneformer: Path, text_init: str, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    BertConfig.from_pretrained(geneformer).save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"bert.x": Evil()}))
    with pytest.raises(InputError, match=r"more than tensors.*weights_only"):
        build_model(_options(text_init, cell_init=str(tmp_path)), GENES + 1, 64, seed=0)
    assert not (tmp_path / "ran").exists()


def test_text_weights_are_the_checkpoints_and_the_rest_is_seeded(text_init: str) -> None:
    first, again, other = (build_model(_options(text_init), 40, 64, seed=seed) for seed in (0, 0, 1))
    expected = BertModel.from_pretrained(text_init).state_dict()
    for name, parameter in first.text_bert.state_dict().items():
        if "crossattention" not in name:
            assert torch.equal(parameter, expected[name]), name
    same = first.state_dict()
    assert all(torch.equal(same[name], tensor) for name, tensor in again.state_dict().items())
    assert not torch.equal(same["cell_proj.weight"], other.state_dict()["cell_proj.weight"])


def test_export_loads_back_to_the_same_forward(text_init: str, tmp_path: Path) -> None:
    model = build_model(_options(text_init, cell_layers=1, cell_width=16, cell_heads=2), 40, 64, seed=0)
    model.eval()
    save_export(model, tmp_path, load_tokenizer(text_init), {"projection": 8, "pooling": "cls", "tau": 0.05})
    loaded, config = load_export(tmp_path)
    assert config["tau"] == 0.05
    cells, texts = Packed.from_sequences([[39, 3, 4], [39, 5]]), Packed.from_sequences([[2, 5, 6, 3]])
    for a, b in zip(_forward(model, cells, texts), _forward(loaded, cells, texts), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert load_tokenizer(str(tmp_path))("cell type")["input_ids"] == [2, 5, 6, 3]


def _forward(model: LangCell, cells: Packed, texts: Packed) -> tuple[torch.Tensor, ...]:
    states = model.cell_states(cells)
    pair = torch.tensor([1])
    return (
        model.project_cells(states, cells),
        model.project_texts(texts),
        model.match(states, cells, texts, pair),
    )


def test_half_an_export_is_refused(text_init: str, tmp_path: Path) -> None:
    model = build_model(_options(text_init, cell_layers=1, cell_width=16, cell_heads=2), 40, 64, seed=0)
    save_export(model, tmp_path, load_tokenizer(text_init), {"projection": 8, "pooling": "cls"})
    (tmp_path / "ctm_head.safetensors").unlink()
    with pytest.raises(InputError, match="not a whole export"):
        load_export(tmp_path)
