"""What distillation reads: loaders, splits, packed texts, tasks and batches. Nothing here needs PyTorch."""

import hashlib
import json
import random
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from bitnet_ref.distill import synthetic
from bitnet_ref.distill.corpus import permutation
from bitnet_ref.distill.data import (
    Example,
    PackedCorpus,
    given_splits,
    load_examples,
    normalised,
    split_examples,
)
from bitnet_ref.distill.tasks import (
    ClassificationTask,
    SummarisationTask,
    TextTask,
    accuracy,
    batches,
    collate,
    eval_batches,
    prompt_ends,
)
from bitnet_ref.distill.text import END_OF_TEXT, TextEncoder
from bitnet_ref.errors import FormatError


@pytest.fixture(scope="module")
def tokenizer():
    return synthetic.tokenizer()


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


# --- loaders --------------------------------------------------------------------------------------------------------

SST2 = "sentence\tlabel\nit 's a \"charming film \t1\nflat \t0\n"
MNLI = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
    "sentence1\tsentence2\tlabel1\tgold_label"
)
MNLI_ROW = "\t".join(["0", "31193", "31193n", "government", "( x )", "( y )", "( x )", "( y )", "A premise.", "So."])
QNLI = "index\tquestion\tsentence\tlabel\n7\tWhen did it rain?\tIt rained in May.\tentailment\n"


def test_glue_files_are_known_by_their_headers(tmp_path):
    found = load_examples(write(tmp_path / "train.tsv", SST2))
    # Quotes are characters in GLUE's files.
    assert found[0] == Example(("it 's a \"charming film ",), "positive", None, "train.tsv:2")
    assert found[1].label == "negative"
    found = load_examples(write(tmp_path / "dev_matched.tsv", f"{MNLI}\n{MNLI_ROW}\tneutral\tneutral\n"))
    assert found == [Example(("A premise.", "So."), "neutral", None, "31193n")]
    found = load_examples(write(tmp_path / "q.tsv", QNLI))
    assert found == [Example(("When did it rain?", "It rained in May."), "entailment", None, "7")]
    # Test files have no labels.
    tests = MNLI.replace("\tlabel1\tgold_label", "")
    found = load_examples(write(tmp_path / "test_matched.tsv", f"{tests}\n{MNLI_ROW}\n"))
    assert found[0].label is None and found[0].text == ("A premise.", "So.")
    assert load_examples(write(tmp_path / "test.tsv", "index\tsentence\n0\tone \n"))[0].label is None


def test_other_tasks_of_glue_are_not_taken_for_known_ones(tmp_path):
    path = write(tmp_path / "rte.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n")
    with pytest.raises(FormatError, match=r"rte.tsv, line 2 must have the column 'text'"):
        load_examples(path)
    found = load_examples(path, text=["sentence1", "sentence2"], label="label", id="index")
    assert found == [Example(("a", "b"), "entailment", None, "0")]


def test_jsonl_csv_and_tsv_columns(tmp_path):
    lines = [{"article": "Long — text.", "highlights": "Short.", "n": 3}, {"article": "b", "highlights": "c", "n": 4}]
    path = write(tmp_path / "x.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, lines)) + "\r\n\r\n")
    found = load_examples(path, text="article", target="highlights", id="n")
    assert found == [Example(("Long — text.",), None, "Short.", "3"), Example(("b",), None, "c", "4")]
    path = write(tmp_path / "x.csv", 'text,label\n"one, ""two""\nlines",1\nthree,0\n')
    found = load_examples(path, label="label", label_names=["no", "yes"])
    assert found[0] == Example(('one, "two"\nlines',), "yes", None, "x.csv:2")
    assert found[1] == Example(("three",), "no", None, "x.csv:4")
    path = write(tmp_path / "x.tsv", "1\t0.5\tgood\n2\t-1\tbad\n")
    assert load_examples(path, text=2, label=0) == [
        Example(("good",), "1", None, "x.tsv:1"),
        Example(("bad",), "2", None, "x.tsv:2"),
    ]
    assert [e.text for e in load_examples(path, text=2, header=True)] == [("bad",)]
    assert [e.text for e in load_examples(write(tmp_path / "x.txt", "a\n\n b \n"))] == [("a",), (" b ",)]


def test_reviews_are_labelled_by_the_sign_of_their_rating(tmp_path):
    path = write(tmp_path / "r.tsv", "1\t0.5\tGood.\r\n2\t-0.49\tSo so.\r\n3\t-0.5\tBad.\r\n4\t3\tVery — good.\r\n")
    found = load_examples(path, "vader-reviews")
    assert [(e.text[0], e.label, e.id) for e in found] == [
        ("Good.", "positive", "r.tsv:1"),
        ("Bad.", "negative", "r.tsv:3"),
        ("Very — good.", "positive", "r.tsv:4"),
    ]
    for bad in ("x\tNaN\tz", "x\t4.1\tz", "x\t1", "x\tmany\tz"):
        with pytest.raises(FormatError, match=r"r.tsv, line 2"):
            load_examples(write(path, f"1\t1\tgood\n{bad}\n"), "vader-reviews")


def test_trec_has_coarse_and_fine_labels(tmp_path):
    path = write(tmp_path / "train.label", "NUM:dist How far is it ?\nENTY:cremat Who sang Voil\xe0 ?\n", "latin-1")
    found = load_examples(path, "trec", encoding="latin-1")
    assert [(e.text[0], e.label) for e in found] == [("How far is it ?", "NUM"), ("Who sang Voilà ?", "ENTY")]
    assert load_examples(path, "trec", label="fine", encoding="latin-1")[1].label == "ENTY:cremat"
    with pytest.raises(FormatError, match=r"line 2 must be utf-8, got the byte 0xe0"):
        load_examples(path, "trec")
    with pytest.raises(FormatError, match=r"line 1 must be COARSE:fine and a question, got 'How far'"):
        load_examples(write(path, "How far\n"), "trec")


@pytest.mark.parametrize(
    ("name", "text", "arguments", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": }\n', {}, "a.jsonl, line 2 must be JSON"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', {}, r"line 2 must be a JSON object, got \[1\]"),
        ("a.jsonl", "[" * 100000 + "\n", {}, "line 1 must be JSON"),
        ("a.jsonl", '{"text": 5}\n', {}, "line 1: 'text' must be text that is not empty, got 5"),
        ("a.jsonl", '{"text": "\\ud800"}\n', {}, "line 1: 'text' must be valid Unicode"),
        ("a.jsonl", '{"text": " "}\n', {}, "must be text that is not empty"),
        ("a.jsonl", '{"text": "x", "y": 0.5}\n', {"label": "y"}, "label must be text or a whole number, got 0.5"),
        ("a.jsonl", '{"text": "x", "y": true}\n', {"label": "y"}, "label must be text or a whole number, got True"),
        ("a.jsonl", '{"text": "x", "y": "z"}\n', {"label": "y", "label_names": {"a": "b"}}, "one of a, got 'z'"),
        ("a.jsonl", '{"body": "x"}\n', {}, "line 1 must have the column 'text', it has 'body'"),
        ("a.csv", 'text\n"x\ny\n', {}, "line 2 must be CSV"),
        ("a.csv", "text,text\nx,y\n", {}, "columns must have different names"),
        ("a.tsv", "text\tlabel\nx\ty\tz\n", {"text": "text"}, "line 2 must have 2 columns as the first line, got 3"),
        ("a.tsv", "x\ty\n", {"text": 5}, "line 1 must have the column 5"),
        ("a.tsv", "sentence\tlabel\nx\t2\n", {}, "line 2: the label must be one of 0, 1, got '2'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, name, text, arguments, message):
    with pytest.raises(FormatError, match=message):
        load_examples(write(tmp_path / name, text), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "xml"}, "format must be one of glue-sst2, .*, got 'xml'"),
        ({}, r"the ending of a.dat tells no format"),
        ({"format": "trec", "text": "x"}, "text does not apply to the format trec"),
        ({"format": "trec", "label": "medium"}, "'coarse' or 'fine', got 'medium'"),
        ({"format": "jsonl", "header": True}, "header does not apply to the format jsonl"),
        ({"format": "tsv", "text": [0, "x"]}, "all by name or all by number"),
        ({"format": "text", "encoding": "klingon"}, "encoding must be one that Python knows"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_examples(write(tmp_path / "a.dat", "x\n"), **arguments)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FormatError, match=r"none.jsonl must be a readable file: No such file"):
        load_examples(tmp_path / "none.jsonl")
    with pytest.raises(FormatError, match=r"must have .parquet, .jsonl or .arrow files, it has none"):
        load_examples(tmp_path)


def test_a_folder_of_jsonl_splits(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train-00000-of-00002", "train-00001-of-00002", "training", "test-00000-of-00001"):
        write(tmp_path / "data" / f"{split}.jsonl", json.dumps({"text": split}) + "\n")
    found = load_examples(tmp_path, split="train")
    assert [e.text[0] for e in found] == ["train-00000-of-00002", "train-00001-of-00002"]
    with pytest.raises(ValueError, match="split must say which of test, train, training"):
        load_examples(tmp_path)
    with pytest.raises(FormatError, match="whose names begin with 'dev', it has none"):
        load_examples(tmp_path, split="dev")


def features(**columns):
    return {b"huggingface": json.dumps({"info": {"features": columns}}).encode()}


CLASSES = {"_type": "ClassLabel", "names": ["bad", "good"]}


def test_parquet_files_with_class_labels(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    (tmp_path / "data").mkdir()
    table = pa.table({"text": ["x", "y"], "label": [1, 0], "more": [None, None]})
    table = table.replace_schema_metadata(features(label=CLASSES))
    parquet.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet")
    found = load_examples(tmp_path, label="label")
    assert found == [
        Example(("x",), "good", None, "train-00000-of-00001.parquet:1"),
        Example(("y",), "bad", None, "train-00000-of-00001.parquet:2"),
    ]
    assert load_examples(tmp_path, label="label", label_names={"1": "+", "0": "-"})[0].label == "+"
    with pytest.raises(FormatError, match=r"row 1 must have the column 'sentence', it has 'label'"):
        load_examples(tmp_path, text="sentence", label="label")
    unlabelled = pa.table({"text": ["x"], "label": [-1]}).replace_schema_metadata(features(label=CLASSES))
    parquet.write_table(unlabelled, tmp_path / "u.parquet")
    with pytest.raises(FormatError, match=r"u.parquet, row 1: the label must be one of 2 classes, got -1"):
        load_examples(tmp_path / "u.parquet", label="label")
    with pytest.raises(FormatError, match=r"a parquet file that pyarrow reads"):
        load_examples(write(tmp_path / "b.parquet", "PAR1 not really PAR1"))


def test_folders_that_save_to_disk_wrote(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    write(tmp_path / "dataset_dict.json", '{"splits": ["train", "test"]}')
    folder = tmp_path / "train"
    folder.mkdir()
    table = pa.table({"text": ["x", "y"], "label": [1, 0]}).replace_schema_metadata(features(label=CLASSES))
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, rows in zip(names, (table[:1], table[1:]), strict=True):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(rows)
    write(folder / "state.json", json.dumps({"_data_files": [{"filename": name} for name in names]}))
    found = load_examples(tmp_path, label="label", split="train")
    assert [(e.text[0], e.label) for e in found] == [("x", "good"), ("y", "bad")]
    with pytest.raises(ValueError, match=r"split must be one of \['train', 'test'\] of .*, got None"):
        load_examples(tmp_path)
    with pytest.raises(FormatError, match="arrow file that pyarrow reads"):
        load_examples(write(tmp_path / "cut.arrow", "ARROW1"))


# --- splits ---------------------------------------------------------------------------------------------------------


def numbered(n):
    return [Example((f"sentence number {i} here",), "ab"[i % 2], id=str(i)) for i in range(n)]


def test_splits_do_not_hang_on_the_order_of_the_file():
    examples = numbered(1000)
    shuffled = random.Random(0).sample(examples, len(examples))
    assert split_examples(examples, (0.8, 0.1, 0.1), 0) == split_examples(shuffled, (0.8, 0.1, 0.1), 0)


def test_splits_are_these_on_every_machine():
    examples = numbered(1000)
    splits = split_examples(examples, (0.8, 0.1, 0.1), 0)
    share = [
        int(hashlib.sha256(f"0\0sentence number {i} here".encode()).hexdigest()[:16], 16) / 2**64 for i in range(1000)
    ]
    assert {e.id for e in splits.train} == {str(i) for i in range(1000) if share[i] < 0.8}
    assert {e.id for e in splits.test} == {str(i) for i in range(1000) if share[i] >= 0.9}
    assert [e.id for e in splits.dev[:3]] == [str(i) for i in np.argsort(share) if 0.8 <= share[i] < 0.9][:3]
    assert splits.sha256 == "8f551398229aed47a35e54aa14a61538478caf443b3fe9a3ba2955c050c88bb8"
    other = split_examples(numbered(1000), (0.8, 0.1, 0.1), 1)
    assert set(other.test) != set(splits.test)


def test_an_example_stays_where_it_is_when_others_come():
    small, large = (split_examples(numbered(n), (0.6, 0.2, 0.2), 5) for n in (300, 900))
    assert set(small.train) <= set(large.train) and set(small.test) <= set(large.test)


def test_sizes_of_splits_are_binomial():
    for seed in range(5):
        splits = split_examples(numbered(2000), (0.7, 0.2, 0.1), seed)
        for part, share in ((splits.train, 0.7), (splits.dev, 0.2), (splits.test, 0.1)):
            assert abs(len(part) - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5


def test_duplicates_and_conflicts_never_reach_two_splits():
    examples = numbered(200)
    copies = [Example((f"  Sentence NUMBER {i}, here!",), "ab"[i % 2]) for i in range(100)]
    conflict = [Example(("Sentence number 7 here",), "a"), Example(("odd one",), "a"), Example(("odd one",), "b")]
    splits = split_examples([*examples, *copies, *conflict], (0.5, 0.25, 0.25), 0)
    assert splits.duplicates_dropped == 99 and splits.conflicts_dropped == 5
    keys = [normalised(e.text) for part in (splits.train, splits.dev, splits.test) for e in part]
    assert len(keys) == len(set(keys)) == 199
    assert "dropped: 99 duplicates, 5 with conflicting labels" in splits.table()
    assert re.search(r"^all +\d+ +\d+ +\d+$", splits.table(), re.MULTILINE)


def test_what_counts_as_the_same_text():
    assert normalised(["A  good\nfilm."]) == normalised(["a “good” ﬁlm"])
    assert normalised([":-)"]) != normalised([":-("])
    assert normalised(["not good"]) != normalised(["good"])
    assert normalised(["a", "b"]) != normalised(["a b"])


@pytest.mark.parametrize("fractions", [(0.8, 0.2), (0.8, 0.2, 0.0), (0.8, 0.1, 0.2), (1.2, -0.1, -0.1)])
def test_fractions_must_be_three_shares(fractions):
    with pytest.raises(ValueError, match="three shares above 0 with sum 1"):
        split_examples(numbered(10), fractions, 0)


def test_empty_and_overlapping_splits_are_errors():
    with pytest.raises(ValueError, match="no split may be empty, got train 1, dev 0, test 0"):
        split_examples(numbered(1), (0.998, 0.001, 0.001), 0)
    a, b, c = numbered(30)[:10], numbered(30)[10:20], numbered(30)[20:]
    assert given_splits(a, b, c).counts["dev"] == {"a": 5, "b": 5}
    with pytest.raises(ValueError, match=r"must not overlap, 2 texts of train are in test or another too, such as 20"):
        given_splits([*a, *c[:2]], b, c)
    splits = given_splits([*a, *c[:2], a[0]], b, c, drop_overlaps=True)
    assert splits.train == a and splits.test == c
    assert splits.overlaps_dropped == 2 and splits.duplicates_dropped == 1
    with pytest.raises(ValueError, match="no split may be empty"):
        given_splits(a, [], c)


# --- tokenizers -----------------------------------------------------------------------------------------------------


def test_the_owner_of_a_tokenizer_changes_nothing(tokenizer):
    theirs = Tokenizer.from_str(tokenizer.to_str())
    theirs.enable_truncation(3)
    theirs.enable_padding(length=20)
    text = "the film was not dull ."
    assert TextEncoder(theirs).encode(text) == TextEncoder(tokenizer).encode(text)
    assert len(TextEncoder(theirs).encode(text)) == 6
    with pytest.raises(TypeError, match=r"tokenizers.Tokenizer or a fast tokenizer of transformers, got dict"):
        TextEncoder({})


def test_special_tokens_count_in_templates_only(tokenizer):
    encoder = TextEncoder(tokenizer)
    assert 0 not in encoder.encode(f"the film {END_OF_TEXT}")
    assert encoder.special_parts(f"a{END_OF_TEXT}{END_OF_TEXT} b") == ["a", 0, 0, " b"]
    task = TextTask(f"{END_OF_TEXT}{{text}} .")
    ids, labels = task.encode(tokenizer, Example((f"the film {END_OF_TEXT}",)))
    assert list(ids) == [0, *encoder.encode(f"the film {END_OF_TEXT} .")] and (labels == -100).all()
    assert (ids == 0).sum() == 1


def test_the_begin_of_text_token_comes_first_where_the_tokenizer_has_one(tokenizer):
    with_bos = Tokenizer.from_str(tokenizer.to_str())
    with_bos.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    assert TextEncoder(tokenizer).prefix == () and TextEncoder(with_bos).prefix == (0,)
    ids, _ = TextTask().encode(with_bos, Example(("the film",)))
    assert list(ids) == [0, *TextEncoder(tokenizer).encode("the film")]


# --- packed texts ---------------------------------------------------------------------------------------------------


def corpus(files, tokenizer, tmp_path, length=8, seed=0, **more):
    return PackedCorpus(files, tokenizer, length, seed, cache=tmp_path / "cache", end_of_text=END_OF_TEXT, **more)


@pytest.fixture
def texts(tmp_path):
    found = synthetic.texts(60, 3)
    first = write(tmp_path / "a.txt", "\n".join(found[:40]) + "\n\n \n")
    second = write(tmp_path / "b.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in found[40:]))
    return found, [first, second]


def test_windows_hold_the_texts_in_their_order(texts, tokenizer, tmp_path):
    found, files = texts
    packed = corpus(files, tokenizer, tmp_path, separator="\n")
    expected = [token for text in found for token in [*TextEncoder(tokenizer).encode(text), 0]]
    assert packed.n_documents == 60 and packed.n_bytes == sum(map(len, found)) and packed.n_tokens == len(expected)
    assert packed.windows == len(expected) // 8
    got = np.concatenate([packed.window(i) for i in range(packed.windows)])
    np.testing.assert_array_equal(got, expected[: len(got)])
    assert got.dtype == np.int64


def test_a_batch_is_a_function_of_seed_and_step(texts, tokenizer, tmp_path):
    packed = corpus(texts[1], tokenizer, tmp_path, separator="\n")
    n = packed.windows
    forward = [packed.batch(step, 5)["input_ids"] for step in range(2 * n // 5)]
    again = corpus(texts[1], tokenizer, tmp_path, separator="\n")
    for step in (len(forward) - 1, 0, 7):
        np.testing.assert_array_equal(again.batch(step, 5)["input_ids"], forward[step])
    every = sorted(map(tuple, np.concatenate(forward)[:n]))
    assert every == sorted(tuple(packed.window(i)) for i in range(n))  # an epoch has each window once
    assert not np.array_equal(np.concatenate(forward)[:n], np.concatenate(forward)[n : 2 * n])
    other = corpus(texts[1], tokenizer, tmp_path, separator="\n", seed=1)
    assert not np.array_equal(other.batch(0, 5)["input_ids"], forward[0])
    batch = packed.batch(3, 5)
    assert batch["attention_mask"].all() and np.array_equal(batch["labels"], batch["input_ids"])


def test_held_out_windows_are_never_trained_on(texts, tokenizer, tmp_path):
    whole = corpus(texts[1], tokenizer, tmp_path, separator="\n")
    packed = corpus(texts[1], tokenizer, tmp_path, separator="\n", held_out=0.1)
    assert packed.held_out_windows == int(0.1 * whole.windows)
    held = [packed.held_out_window(i) for i in range(packed.held_out_windows)]
    trained = [packed.window(i) for i in range(packed.windows)]
    assert sorted(map(tuple, held + trained)) == sorted(tuple(whole.window(i)) for i in range(whole.windows))
    # Each file gives its share, at its end.
    first = packed._file_tokens[0] // 8
    assert packed._held[0] < first < packed._held[-1] == whole.windows - 1
    got = [len(batch["input_ids"]) for batch in packed.held_out_batches(4)]
    assert sum(got) == packed.held_out_windows and max(got) == 4
    (few,) = packed.held_out_batches(4, limit=3)
    assert len(few["input_ids"]) == 3


def test_tokens_are_made_once(texts, tokenizer, tmp_path, monkeypatch):
    files = texts[1]
    packed = corpus(files, tokenizer, tmp_path, separator="\n")
    monkeypatch.setattr(TextEncoder, "encode_batch", lambda *_: pytest.fail("tokenised again"))
    again = corpus(files, tokenizer, tmp_path, length=16, seed=7, separator="\n")
    assert again.path == packed.path and again.n_bytes == packed.n_bytes
    monkeypatch.undo()
    # Other texts, separators and end tokens are other files; a cut one is made anew.
    assert corpus(files, tokenizer, tmp_path).path != packed.path
    packed.path.write_bytes(packed.path.read_bytes()[:-2])
    assert corpus(files, tokenizer, tmp_path, separator="\n").n_tokens == packed.n_tokens
    write(files[0], "another text altogether , and a longer one .\n")
    assert corpus(files, tokenizer, tmp_path, separator="\n").path != packed.path
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("separator", [None, "\n\n"])
def test_long_documents_are_read_in_pieces(tokenizer, tmp_path, monkeypatch, separator):
    monkeypatch.setattr("bitnet_ref.distill.corpus._PIECE", 50)
    lines = [f"line number {i} .\n" for i in range(40)]
    text = "".join(lines[:20]) + "\n" + "".join(lines[20:]) + "x" * 300
    packed = corpus([write(tmp_path / "a.txt", text)], tokenizer, tmp_path, separator=separator)
    tokens = np.concatenate([packed.window(i) for i in range(packed.windows)])
    decoded = TextEncoder(tokenizer).decode(tokens)
    whole = text if separator is None else text.replace("\n\n", "")
    assert whole.startswith(decoded) and len(whole) - len(decoded) < 50
    assert packed.n_documents == (1 if separator is None else 2)
    assert packed.n_bytes == len(whole)


def test_large_vocabularies_have_wider_tokens(tmp_path):
    vocabulary = {f"w{i}": i for i in range(70000)} | {END_OF_TEXT: 70000}
    large = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    large.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    packed = corpus([write(tmp_path / "a.txt", "w1 w69999")], large, tmp_path, length=2)
    np.testing.assert_array_equal(packed.window(0), [1, 69999])
    assert packed.path.stat().st_size == 3 * 4


def test_a_full_disk_leaves_nothing(texts, tokenizer, tmp_path, monkeypatch):
    def full(self, texts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TextEncoder, "encode_batch", full)
    with pytest.raises(OSError, match=r"tokens of the corpus must be written to .*No space left"):
        corpus(texts[1], tokenizer, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "data", "more", "error", "message"),
    [
        ("a.txt", b"good", {}, ValueError, "at least one window of 8 tokens to train on"),
        ("a.txt", b" \n", {}, ValueError, "texts must not be empty"),
        ("a.txt", b"the film was good " * 9, {"held_out": 0.01}, ValueError, "one to hold out"),
        ("a.txt", b"the film", {"held_out": 1.0}, ValueError, "held_out must be a share"),
        ("a.txt", b"the film", {"separator": ""}, ValueError, "separator must not be empty"),
        ("a.txt", b"the film", {"length": 1}, ValueError, "at least 2 tokens, got 1"),
        ("a.txt", b"\xff\xfe\xfd", {}, FormatError, "a.txt must be UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', {}, FormatError, "line 2 must be an object with text under"),
        ("a.jsonl", b"{\n", {}, FormatError, "line 1 must be JSON"),
    ],
)
def test_bad_corpora_are_refused(tokenizer, tmp_path, name, data, more, error, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=message):
        corpus([tmp_path / name], tokenizer, tmp_path, **more)
    with pytest.raises(FormatError, match=r"none.txt must be a readable file"):
        corpus([tmp_path / "none.txt"], tokenizer, tmp_path)


def test_the_end_of_text_must_be_known(texts, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="declares no end-of-text token: give end_of_text"):
        PackedCorpus(texts[1], tokenizer, 8, 0, cache=tmp_path)
    with pytest.raises(ValueError, match="'<end>' must be a token of the vocabulary"):
        PackedCorpus(texts[1], tokenizer, 8, 0, cache=tmp_path, end_of_text="<end>")


def test_permutations_are_these_on_every_machine():
    np.testing.assert_array_equal(permutation(10, 3, 1), [9, 5, 0, 1, 7, 2, 8, 3, 6, 4])
    assert sorted(permutation(1000, 0, 0)) == list(range(1000))
    assert not np.array_equal(permutation(1000, 0, 0), permutation(1000, 0, 1))


# --- tasks ----------------------------------------------------------------------------------------------------------

TASK = ClassificationTask(synthetic.TEMPLATE, synthetic.LABELS, 32)


def test_a_classification_scores_its_answer_alone(tokenizer):
    encoder = TextEncoder(tokenizer)
    ids, labels = TASK.encode(tokenizer, Example(("the film was good .",), "positive"))
    assert encoder.decode(ids) == "the film was good . i felt happy"
    assert (labels[:-1] == -100).all() and labels[-1] == ids[-1] == TASK.label_ids(tokenizer)["positive"]
    ids, labels = TASK.encode(tokenizer, Example(("the film was good .",)))
    assert encoder.decode(ids) == "the film was good . i felt" and (labels == -100).all()


def test_predictions_are_read_before_the_answer(tokenizer):
    examples = [*synthetic.sentences(20, 5), Example(("the film was dull .",), id="no label")]
    ids = TASK.label_ids(tokenizer)
    seen = []
    for batch, indices in eval_batches(TASK, tokenizer, examples, 4):
        logits = np.zeros((*batch["input_ids"].shape, tokenizer.get_vocab_size()))
        ends = prompt_ends(batch)
        for row, (end, i) in enumerate(zip(ends, indices, strict=True)):
            assert tokenizer.decode([batch["input_ids"][row, end]]).strip() == "felt"
            logits[row, end, ids[examples[i].label or "negative"]] = 1
            logits[row, end, 5] = 2  # a token that is no answer
        predicted = TASK.predict(logits[np.arange(len(ends)), ends], tokenizer)
        assert predicted == [examples[i].label or "negative" for i in indices]
        seen += indices.tolist()
    assert sorted(seen) == list(range(21))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"a": " happy", "b": " overjoyed"}, r"' overjoyed' for 'b' is \d+ tokens"),
        ({"a": " happy", "b": " happy"}, "' happy' for 'b' is the token of another label"),
        ({"a": "", "b": " sad"}, "'' for 'a' is 0 tokens"),
    ],
)
def test_labels_must_be_one_token_each(tokenizer, labels, message):
    with pytest.raises(ValueError, match=message):
        ClassificationTask("{text} i felt", labels).label_ids(tokenizer)


def test_a_label_may_not_merge_with_the_template(tokenizer):
    # "i fe" + "lt" is the word "felt" in this vocabulary.
    with pytest.raises(ValueError, match="'lt' for 'a' merges with the template"):
        ClassificationTask("{text} i fe", {"a": "lt", "b": " sad"}).label_ids(tokenizer)


@pytest.mark.parametrize(
    ("template", "texts", "message"),
    [
        ("no field", ("a",), "must have a field for the text"),
        ("{0", ("a",), "matching braces"),
        ("{premise}", ("a",), r"must be \{0\} to \{9\} or \{text\}, got \{premise\}"),
        ("{0!r}", ("a",), r"must be \{0\} to"),
        ("{0} {2}", ("a", "b"), r"one field for each text of an example: 2 in x, the template has \{0\}, \{2\}"),
        ("{0}", ("a", "b"), r"one field for each text of an example: 2 in x, the template has \{0\}$"),
    ],
)
def test_templates_that_do_not_fit_are_refused(tokenizer, template, texts, message):
    with pytest.raises(ValueError, match=message):
        TextTask(template).encode(tokenizer, Example(texts, id="x"))


def test_labels_of_another_task_are_refused(tokenizer):
    with pytest.raises(ValueError, match="labels must be positive, negative in this task, x has 'neutral'"):
        TASK.encode(tokenizer, Example(("the film",), "neutral", id="x"))
    with pytest.raises(ValueError, match="at least two labels"):
        ClassificationTask("{text}", {"a": " a"})


def test_long_texts_are_cut_and_the_template_is_not(tokenizer):
    encoder = TextEncoder(tokenizer)
    task = ClassificationTask("the story : {0} the plot : {1} i felt", synthetic.LABELS, 24)
    long, short = " ".join(["very"] * 50), "quite good"
    ids, _ = task.encode(tokenizer, Example((long, short), "negative"))
    text = encoder.decode(ids)
    assert len(ids) == 24 and text.endswith("the plot : quite good i felt sad") and text.startswith("the story : very")
    ids, _ = task.encode(tokenizer, Example((long, long), "negative"))
    assert len(ids) in (23, 24)
    counts = [part.count("very") for part in encoder.decode(ids).split("plot")]
    assert counts[0] == counts[1]
    data = batches(task, tokenizer, [Example((long, short), "negative"), Example((short, short), "positive")], 2, 0)
    assert data.truncated == 1
    with pytest.raises(ValueError, match="template and a token of each text must fit into 7 tokens"):
        ClassificationTask("the story : {0} the plot : {1}", synthetic.LABELS, 8).encode(
            tokenizer, Example((long, long), "negative")
        )


def test_a_summary_ends_unless_it_was_cut(tokenizer):
    task = SummarisationTask("{text} so", max_source=8, max_target=4, end_of_text=END_OF_TEXT)
    ids, labels = task.encode(tokenizer, Example(("the film was good .",), target=" the film"))
    answer = labels[labels != -100]
    assert list(answer) == [*TextEncoder(tokenizer).encode(" the film"), 0] and list(ids[-3:]) == list(answer)
    ids, labels = task.encode(tokenizer, Example(("the film " * 9,), target=" the film was very good"))
    assert len(ids) == 12 and (labels != -100).sum() == 4 and 0 not in ids
    with pytest.raises(ValueError, match="give end_of_text"):
        SummarisationTask("{text}").encode(tokenizer, Example(("a",), target="b"))


def test_scores_of_summaries():
    pytest.importorskip("rouge_score", reason="needs rouge-score")
    pytest.importorskip("sacrebleu", reason="needs sacrebleu")
    task = SummarisationTask("{text}")
    one = ["The cat sat on the mat. It was happy there."]
    assert task.scores(one, one) == pytest.approx(dict.fromkeys(("BLEU", "R1", "R2", "RL", "RLsum", "average"), 100))
    swapped = task.scores(["It was happy there. The cat sat on the mat."], one)
    # Sentences in another order: the same words, but no longest common subsequence of the whole.
    assert swapped["R1"] == pytest.approx(100) and swapped["RLsum"] == pytest.approx(100)
    assert swapped["RL"] == pytest.approx(60)
    with pytest.raises(ValueError, match="as many as references, at least 1, got 1 and 0"):
        task.scores(one, [])


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rouge_score", None)
    with pytest.raises(ImportError, match=r"pip install 'bitnet_ref\[summaries\]'"):
        SummarisationTask("{text}").scores(["a"], ["b"])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"a.parquet needs pyarrow: pip install 'bitnet_ref\[datasets\]'"):
        load_examples(write(tmp_path / "a.parquet", ""))


def test_accuracy():
    assert accuracy(["a", "b", "a", "a"], ["a", "b", "b", "a"]) == 0.75
    with pytest.raises(ValueError, match="at least 1, got 0 and 0"):
        accuracy([], [])


# --- batches --------------------------------------------------------------------------------------------------------


def test_batches_are_a_function_of_seed_and_step(tokenizer):
    examples = synthetic.sentences(203, 0)
    data = batches(TASK, tokenizer, examples, 8, 5)
    assert data.per_epoch == 25
    steps = [data.indices(step) for step in range(100)]
    again = batches(TASK, tokenizer, examples, 8, 5)
    for step in (99, 3, 40):
        np.testing.assert_array_equal(again.indices(step), steps[step])
        for name, value in data.batch(step).items():
            np.testing.assert_array_equal(again.batch(step)[name], value)
    for epoch in range(4):  # no example twice, other ones left out
        assert len(set(np.concatenate(steps[epoch * 25 : epoch * 25 + 25]).tolist())) == 200
    assert not np.array_equal(steps[0], steps[25])
    assert not np.array_equal(batches(TASK, tokenizer, examples, 8, 6).indices(0), steps[0])


def test_every_row_of_a_batch_is_its_example(tokenizer):
    examples = synthetic.sentences(64, 1)
    data = batches(TASK, tokenizer, examples, 8, 0, multiple=16)
    batch = data.batch(2)
    assert batch["input_ids"].shape[1] % 16 == 0
    for row, i in enumerate(data.indices(2)):
        ids, labels = TASK.encode(tokenizer, examples[i])
        n = len(ids)
        np.testing.assert_array_equal(batch["input_ids"][row, :n], ids)
        np.testing.assert_array_equal(batch["labels"][row, :n], labels)
        assert batch["attention_mask"][row].sum() == n and batch["attention_mask"][row, :n].all()
        assert (batch["labels"][row, n:] == -100).all()
    assert all(value.dtype == np.int64 for value in batch.values())


def test_like_lengths_come_together_and_mixed_over_time(tokenizer):
    rng = np.random.default_rng(0)
    examples = [Example((" ".join(["very"] * int(n)),)) for n in rng.integers(1, 120, 3200)]
    data = batches(TextTask(max_length=128), tokenizer, examples, 32, 0)
    made = [data.batch(step) for step in range(data.per_epoch)]
    padding = 1 - sum(b["attention_mask"].sum() for b in made) / sum(b["attention_mask"].size for b in made)
    assert padding < 0.08  # by chance it would be half of the longest: 0.5
    widths = np.array([b["input_ids"].shape[1] for b in made], float)
    assert abs(np.corrcoef(widths, np.arange(len(widths)))[0, 1]) < 0.3  # no curriculum from short to long


def test_too_few_examples_for_a_batch(tokenizer):
    with pytest.raises(ValueError, match="at least 8 examples for a batch, got 3"):
        batches(TASK, tokenizer, synthetic.sentences(3, 0), 8, 0)


def test_texts_without_labels_for_the_teacher(tokenizer):
    examples = [Example((text,)) for text in synthetic.texts(20, 0)]
    batch = batches(TextTask(max_length=64, next_token=True), tokenizer, examples, 4, 0).batch(0)
    np.testing.assert_array_equal(batch["labels"], np.where(batch["attention_mask"] == 1, batch["input_ids"], -100))
    batch = batches(TextTask(synthetic.TEMPLATE, 64), tokenizer, examples, 4, 0).batch(0)
    assert (batch["labels"] == -100).all()
    np.testing.assert_array_equal(prompt_ends(batch), batch["attention_mask"].sum(1) - 1)


def test_padding_may_be_any_token():
    rows = [(np.array([5, 6, 7]), np.array([-100, -100, 7])), (np.array([5]), np.array([-100]))]
    batch = collate(rows, multiple=1, pad=9)
    np.testing.assert_array_equal(batch["input_ids"], [[5, 6, 7], [5, 9, 9]])


# --- the made-up task -----------------------------------------------------------------------------------------------


def judged(text):
    """The label of a sentence, read from its words as a person would."""
    text = text.removesuffix(" .")
    if text.startswith("although "):
        clause = text.split(" , ")[1]
    elif " , but " in text:
        clause = text.split(" , but ")[1]
    else:
        clause = text.split(" , although ")[0]
    words = clause.split()
    good = words[-1] in synthetic._GOOD
    return "positive" if good != bool({"not", "never", "hardly"} & set(words)) else "negative"


def test_the_label_is_that_of_the_clause_that_decides():
    examples = synthetic.sentences(3000, 0)
    assert len({e.text for e in examples}) == 3000
    assert all(judged(e.text[0]) == e.label for e in examples)
    assert sum(e.label == "positive" for e in examples) == 1500
    assert examples == synthetic.sentences(4000, 0)[:3000]
    assert examples[0].text != synthetic.sentences(1, 1)[0].text


def test_single_words_do_not_tell_the_label():
    """The best guess from the presence of any one word is near chance, so a bag of words cannot learn it well."""
    examples = synthetic.sentences(4000, 0)
    positive = np.array([e.label == "positive" for e in examples])
    vocabulary = sorted({word for e in examples for word in e.text[0].split()})
    has = np.array([[word in set(e.text[0].split()) for word in vocabulary] for e in examples])
    train, test = np.arange(4000) < 3000, np.arange(4000) >= 3000
    x = np.c_[has, np.ones(4000)].astype(float)
    weights = np.linalg.lstsq(x[train], np.where(positive[train], 1.0, -1.0), rcond=None)[0]
    assert np.mean((x[test] @ weights > 0) == positive[test]) < 0.65


def test_words_of_the_made_up_language_are_tokens(tokenizer):
    encoder = TextEncoder(tokenizer)
    for text in (e.text[0] for e in synthetic.sentences(200, 9)):
        assert len(encoder.encode(" " + text)) == len(text.split())
    assert all(len(encoder.encode(word)) == 1 for word in synthetic.LABELS.values())
    assert tokenizer.to_str() == synthetic.tokenizer().to_str()


def test_texts_have_one_opinion():
    for text in synthetic.texts(200, 2):
        sentences = [part + " ." for part in text.removesuffix(" .").split(" . ")]
        felt = [part for part in sentences if part.startswith("i felt")]
        opinions = {judged(part) for part in sentences if part not in felt}
        assert len(opinions) == 1
        if felt:
            assert felt == [f"i felt{synthetic.LABELS[opinions.pop()]} ."]
