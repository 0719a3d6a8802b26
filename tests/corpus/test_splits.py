import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langcell.corpus.options import CorpusOptions
from langcell.corpus.schema import HELD_OUT, TEST, TRAIN, VAL
from langcell.corpus.splits import assign_splits, count_splits, split_columns
from langcell.errors import InputError

LABELS = {"CL:0000236": "B cell", "CL:0000623": "natural killer cell", "CL:0000084": "T cell"}


def make_obs(types, datasets=None, donors=None, joinid=None) -> pa.Table:
    """obs as a Census has it: strings dictionary-encoded, categories that no cell has among them."""
    n = len(types)
    columns = {
        "cell_type_ontology_term_id": types,
        "cell_type": [LABELS.get(t, t) for t in types],
        "term": types,
        "dataset_id": datasets or ["d0"] * n,
        "donor_id": donors or ["p0"] * n,
    }
    table = {"soma_joinid": pa.array(range(n) if joinid is None else joinid, pa.int64())}
    for name, values in columns.items():
        categories = ["absent", *sorted(set(values), reverse=True)]
        codes = pa.array([categories.index(v) for v in values], pa.int16())
        table[name] = pa.DictionaryArray.from_arrays(codes, categories)
    return pa.table(table)


cells = st.lists(
    st.tuples(st.sampled_from(sorted(LABELS)), st.sampled_from("abcdef"), st.sampled_from("xyz")),
    min_size=1,
    max_size=120,
)
shares = st.tuples(st.sampled_from([0.0, 0.1, 0.3]), st.sampled_from([0.0, 0.02, 0.25]))


@settings(max_examples=60, deadline=None)
@given(cells, shares, st.integers(0, 3), st.randoms(use_true_random=False))
def test_rows_in_any_order_and_any_encoding_get_the_same_split(cells, shares, seed, random):
    types, datasets, donors = map(list, zip(*cells, strict=True))
    options = CorpusOptions(test_share=shares[0], val_share=shares[1], split_seed=seed)
    obs = make_obs(types, datasets, donors)
    expected = assign_splits(obs, options, [], [])

    order = random.sample(range(len(cells)), len(cells))
    shuffled = obs.take(order)
    plain = pa.table({n: c.cast(pa.string()) if n != "soma_joinid" else c for n, c in zip(
        shuffled.column_names, shuffled.columns, strict=True)})  # fmt: skip
    chunked = pa.concat_tables([plain.slice(0, 5), plain.slice(5)])
    for table in (shuffled, chunked):
        assert (assign_splits(table, options, [], []) == expected[order]).all()


@settings(max_examples=60, deadline=None)
@given(cells, shares)
def test_cells_are_split_in_exact_shares_of_each_type(cells, shares):
    types = np.array([c[0] for c in cells])
    options = CorpusOptions(split_by="cell", test_share=shares[0], val_share=shares[1])
    split = assign_splits(make_obs(types.tolist()), options, [], [])
    for name in set(types):
        counts = np.bincount(split[types == name], minlength=4)
        n = counts.sum()
        n_test = min(int(shares[0] * n + 0.5), n - 1)
        n_val = min(int(shares[1] * n + 0.5), n - 1 - n_test)
        assert counts.tolist() == [n - n_test - n_val, n_val, n_test, 0]


@settings(max_examples=60, deadline=None)
@given(cells, st.sampled_from(["dataset", "donor", "auto"]))
def test_no_group_stands_in_two_splits(cells, kind):
    types, datasets, donors = map(list, zip(*cells, strict=True))
    n_datasets, n_donors = len(set(datasets)), len(set(zip(datasets, donors, strict=True)))
    options = CorpusOptions(split_by=kind, test_share=0.3, val_share=0.1)
    obs = make_obs(types, datasets, donors)
    if (n_datasets if kind == "dataset" else n_donors) < 3:
        if kind != "auto":
            with pytest.raises(InputError, match=f"{kind} needs at least 3"):
                assign_splits(obs, options, [], [])
        return
    split = assign_splits(obs, options, [], [])
    whole = datasets if n_datasets >= 3 and kind != "donor" else list(zip(datasets, donors, strict=True))
    splits_of = {g: set(split[[w == g for w in whole]].tolist()) for g in set(whole)}
    assert all(len(found) == 1 for found in splits_of.values())
    groups = [next(iter(found)) for found in splits_of.values()]
    n_test = min(max(int(0.3 * len(groups) + 0.5), 1), len(groups) - 2)
    n_val = max(int(0.1 * len(groups) + 0.5), 1)
    assert (groups.count(TEST), groups.count(VAL)) == (n_test, n_val)
    assert groups.count(TRAIN) >= 1


def test_donors_of_two_datasets_are_not_one_donor():
    n = 400
    datasets = ["d0", "d1"] * (n // 2)
    donors = [f"p{i // 2 % 10}" for i in range(n)]
    options = CorpusOptions(split_by="donor", test_share=0.5, val_share=0.0)
    split = assign_splits(make_obs(["CL:0000236"] * n, datasets, donors), options, [], [])
    mixed = {d: {split[i] for i in range(n) if donors[i] == d} for d in set(donors)}
    assert any(len(found) == 2 for found in mixed.values())
    assert (split == TEST).sum() == n // 2


def test_another_seed_is_another_split_and_a_joinid_keeps_its_own():
    types = ["CL:0000236"] * 1000
    a, b = (assign_splits(make_obs(types), CorpusOptions(split_seed=s), [], []) for s in (0, 1))
    assert count_splits(a) == count_splits(b) == {"train": 880, "val": 20, "test": 100, "held_out": 0}
    overlap = ((a == TEST) & (b == TEST)).sum()
    assert overlap < 30  # two independent draws of 100 in 1,000 share 10 on average


def test_held_out_comes_first_by_id_label_or_dataset():
    types = ["CL:0000236", "CL:0000623", "CL:0000084", "CL:0000084"] * 25
    datasets = ["d0", "d0", "d0", "d1"] * 25
    options = CorpusOptions(split_by="cell", test_share=0.2, val_share=0.2)
    for name in ("CL:0000623", "natural killer cell", "Natural Killer Cell"):
        split = assign_splits(make_obs(types, datasets), options, [name], ["d1"])
        expected = [t == "CL:0000623" or d == "d1" for t, d in zip(types, datasets, strict=True)]
        assert ((split == HELD_OUT) == expected).all()
    assert count_splits(split) == {"train": 30, "val": 10, "test": 10, "held_out": 50}
    # Held-out datasets are no group of the rest: two are left, too few for test and val.
    three = ["d0", "d1", "d2", "d2"] * 25
    with pytest.raises(InputError, match="have 2"):
        assign_splits(make_obs(types, three), CorpusOptions(split_by="dataset"), [], ["d2"])


def test_a_type_is_its_term_or_else_its_label():
    types = ["CL:0000236", "CL:0000623"] * 50
    obs = make_obs(types)
    at = obs.column_names.index("cell_type_ontology_term_id")
    labels_alone = obs.set_column(at, obs.column_names[at], pa.array(["unknown"] * 100))
    options = CorpusOptions(split_by="cell", test_share=0.2, val_share=0.2)
    for name in ("CL:0000623", "natural killer cell"):  # the id stands in no column of the data
        split = assign_splits(labels_alone, options, [name], [])
        assert (split == assign_splits(obs, options, [name], [])).all()
    at = obs.column_names.index("term")
    unresolved = labels_alone.set_column(at, "term", pa.array([""] * 100))
    assert (assign_splits(unresolved, options, [], []) == assign_splits(obs, options, [], [])).all()


def test_mistakes_are_named():
    obs = make_obs(["CL:0000236", "CL:0000623"] * 5)
    options = CorpusOptions()
    with pytest.raises(InputError, match=r"held_out_types: 'natural kiler cel' .*'natural killer cell'"):
        assign_splits(obs, options, ["natural kiler cel"], [])
    with pytest.raises(InputError, match=r"held_out_types: 'CL:0000237' .*'CL:0000236'"):
        assign_splits(obs, options, ["CL:0000237"], [])
    with pytest.raises(InputError, match="held_out_types: 'absent'"):
        assign_splits(obs, options, ["absent"], [])
    with pytest.raises(InputError, match=r"held_out_datasets: 'd9' .*'d0'"):
        assign_splits(obs, options, [], ["d9"])
    with pytest.raises(InputError, match="nothing is left to train on"):
        assign_splits(obs, options, ["B cell", "CL:0000623"], [])
    for bad in (
        CorpusOptions(split_by="tissue"),
        CorpusOptions(test_share=-0.1),
        CorpusOptions(test_share=0.6, val_share=0.5),
    ):
        with pytest.raises(InputError, match=r"corpus\."):
            assign_splits(obs, bad, [], [])


def test_only_columns_that_a_rule_reads_are_asked_of_obs():
    obs = make_obs(["CL:0000236"] * 40)
    options = CorpusOptions(split_by="cell")
    columns = split_columns(options, [])
    assert columns == ["cell_type", "cell_type_ontology_term_id"]
    few = obs.select(["soma_joinid", "term", *columns])
    assert (assign_splits(few, options, [], []) == assign_splits(obs, options, [], [])).all()
    assert split_columns(CorpusOptions(), []) == [*columns, "dataset_id", "donor_id"]
    assert split_columns(options, ["d0"]) == [*columns, "dataset_id"]
