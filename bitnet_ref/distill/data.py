"""Labelled and unlabelled examples from files, and splits that are the same on every machine.

>>> examples = load_examples("reviews.tsv", "vader-reviews")
>>> splits = split_examples(examples, (0.8, 0.1, 0.1), seed=0)
>>> print(splits.table())

Texts for continued pre-training are :class:`bitnet_ref.distill.corpus.PackedCorpus`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from bitnet_ref.distill.corpus import PackedCorpus
from bitnet_ref.errors import FormatError

__all__ = [
    "FORMATS",
    "Example",
    "PackedCorpus",
    "Splits",
    "given_splits",
    "load_examples",
    "normalised",
    "split_examples",
]


@dataclass(frozen=True, slots=True)
class Example:
    """A text, or several that belong together, and what is to be said about it.

    Attributes
    ----------
    text : tuple of str
        A sentence, or premise and hypothesis, question and sentence, an article.
    label : str or None
        Of a classification.
    target : str or None
        The text to write, such as a summary.
    id : str
        That of the file, or its name and line.
    """

    text: tuple[str, ...]
    label: str | None = None
    target: str | None = None
    id: str = ""


@dataclass(frozen=True)
class _Columns:
    """Which columns become what."""

    text: tuple[str | int, ...]
    label: str | int | None = None
    target: str | int | None = None
    id: str | int | None = None
    names: Mapping[str, str] | None = None
    optional_label: bool = False

    def named(self) -> list[str | int]:
        return [column for column in (*self.text, self.label, self.target, self.id) if column is not None]


_NLI = {name: name for name in ("entailment", "neutral", "contradiction")}
_GLUE = {
    "glue-sst2": _Columns(("sentence",), "label", names={"0": "negative", "1": "positive"}, optional_label=True),
    "glue-mnli": _Columns(("sentence1", "sentence2"), "gold_label", id="pairID", names=_NLI, optional_label=True),
    "glue-qnli": _Columns(
        ("question", "sentence"),
        "label",
        id="index",
        names={name: name for name in ("entailment", "not_entailment")},
        optional_label=True,
    ),
}
_GLUE_HEADERS = {
    "glue-mnli": [("pairID", "genre", "sentence1", "sentence2")],
    "glue-qnli": [("index", "question", "sentence")],
    "glue-sst2": [("sentence", "label"), ("index", "sentence")],
}

FORMATS = (*_GLUE, "jsonl", "csv", "tsv", "text", "trec", "vader-reviews", "hf")
"""``glue-*``: the TSV files of GLUE by their headers; a file without a label column (its tests) gives no labels.

``jsonl``: an object in each line. ``csv``: with quotes. ``tsv``: without quotes. ``text``: a text in each line.
``trec``: ``COARSE:fine text`` in each line. ``vader-reviews``: number, mean rating in [-4, 4] and sentence between
tabs; ``positive`` from 0.5, ``negative`` to -0.5, and what lies between them is no example of the task.
``hf``: a data set of the library ``datasets``: a folder that ``save_to_disk`` wrote, or one with ``.parquet``,
``.jsonl`` or ``.arrow`` files in it or under ``data/``; or one such file.
"""


def load_examples(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    text: str | int | Sequence[str | int] | None = None,
    label: str | int | None = None,
    target: str | int | None = None,
    id: str | int | None = None,
    header: bool | None = None,
    label_names: Mapping[str, str] | Sequence[str] | None = None,
    split: str | None = None,
    encoding: str = "utf-8",
) -> list[Example]:
    """Read a file or folder of examples.

    Parameters
    ----------
    path : path
    format : one of :data:`FORMATS`, optional
        By default from the ending of the name, and for ``.tsv`` from the header, if it is one of GLUE's.
    text : name or number of a column, or several, optional
        Of ``jsonl``, ``csv``, ``tsv`` and ``hf``; by default the column ``text``. Numbers count from 0.
    label, target, id : name or number of a column, optional
        Likewise. ``label`` of ``trec`` is ``"coarse"`` (default) or ``"fine"``.
    header : bool, optional
        Of ``csv`` and ``tsv``; by default there is one unless columns are given by number.
    label_names : mapping or sequence of str, optional
        New names: by the label in the file, or by its number from 0. A label without one is an error.
    split : str, optional
        Of ``hf``, if there are several: files whose name begins with it, or the folder of that name.
    encoding : str
        Of text files; a byte-order mark is skipped. TREC's own files are ``latin-1``.

    Returns
    -------
    list of Example
        Empty lines are none.

    Raises
    ------
    FormatError
        If a file is missing, or a line is not as the format says; the message has the line, the rule and what came.
    ValueError
        If an argument does not fit the format.
    ImportError
        If ``hf`` needs ``pyarrow`` and it is not installed.
    """
    path = Path(path)
    if format is None:
        format = _guess(path, encoding, text is None)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    free = format in ("jsonl", "csv", "tsv", "hf")
    given = {"text": text, "target": target, "id": id, "header": header, "split": split, "label": label}
    allowed = {"text", "label", "target", "id"} if free else {"label"} if format == "trec" else set()
    allowed |= {"header"} if format in ("csv", "tsv") else {"split"} if format == "hf" else set()
    for name, value in given.items():
        if value is not None and name not in allowed:
            raise ValueError(f"{name} does not apply to the format {format}, got {value!r}")
    if label_names is not None and not isinstance(label_names, Mapping):
        label_names = {str(number): name for number, name in enumerate(label_names)}

    if free:
        chosen = ("text",) if text is None else (text,) if isinstance(text, str | int) else tuple(text)
        columns = _Columns(chosen, label, target, id, label_names)
    elif format in _GLUE:
        columns = _GLUE[format] if label_names is None else _renamed(_GLUE[format], label_names)
    elif format == "trec":
        if label not in (None, "coarse", "fine"):
            raise ValueError(f"label of trec must be 'coarse' or 'fine', got {label!r}")
        columns = _Columns(("text",), label or "coarse", names=label_names)
    else:
        columns = _Columns(("text",), None if format == "text" else "label", names=label_names)

    if format == "hf":
        rows = _hf_rows(path, columns, split)
    elif format == "jsonl":
        rows = _jsonl_rows(path, encoding)
    elif format in ("csv", "tsv") or format in _GLUE:
        numbers = {isinstance(column, int) for column in columns.named()}
        if len(numbers) > 1:
            raise ValueError(f"columns must be given all by name or all by number, got {columns.named()}")
        with_header = not numbers.pop() if header is None else header
        rows = _table_rows(path, format == "csv", with_header, columns, encoding)
    else:
        rows = {"trec": _trec_rows, "vader-reviews": _vader_rows, "text": _text_rows}[format](path, encoding)
    return [_example(where, row, columns) for where, row in rows]


def _renamed(columns: _Columns, names: Mapping[str, str]) -> _Columns:
    return _Columns(columns.text, columns.label, columns.target, columns.id, names, columns.optional_label)


def _guess(path: Path, encoding: str, by_header: bool) -> str:
    if path.is_dir() or path.suffix in (".parquet", ".arrow"):
        return "hf"
    if path.suffix == ".tsv" and by_header:
        header = next(iter(_lines(path, encoding)), (0, ""))[1].split("\t")
        found = (name for name, signs in _GLUE_HEADERS.items() if any(set(sign) <= set(header) for sign in signs))
        return next(found, "tsv")
    kinds = {".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".txt": "text"}
    if path.suffix not in kinds:
        raise ValueError(f"the ending of {path.name} tells no format: give one of {', '.join(FORMATS)}")
    return kinds[path.suffix]


def _example(where: str, row: Mapping[Any, Any], columns: _Columns) -> Example:
    def value(column: str | int) -> Any:
        if column not in row:
            raise FormatError(f"{where} must have the column {column!r}, it has {', '.join(map(repr, row))}")
        return row[column]

    def text(column: str | int) -> str:
        found = value(column)
        if not isinstance(found, str) or not found.strip():
            raise FormatError(f"{where}: {column!r} must be text that is not empty, got {_short(found)}")
        try:
            found.encode()
        except UnicodeEncodeError:
            raise FormatError(f"{where}: {column!r} must be valid Unicode, got {_short(found)}") from None
        return found

    label = None
    if columns.label is not None and not (columns.optional_label and columns.label not in row):
        label = value(columns.label)
        if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
            raise FormatError(f"{where}: the label must be text or a whole number, got {_short(label)}")
        label = str(label)
        if columns.names is not None:
            if label not in columns.names:
                raise FormatError(f"{where}: the label must be one of {', '.join(columns.names)}, got {_short(label)}")
            label = columns.names[label]
    id = row.get(columns.id)
    return Example(
        tuple(text(column) for column in columns.text),
        label,
        None if columns.target is None else text(columns.target),
        where.replace(", line ", ":").replace(", row ", ":") if id is None else str(id),
    )


def _short(value: Any) -> str:
    found = repr(value)
    return found if len(found) <= 80 else found[:77] + "..."


# Readers: each yields (file and line for messages and numbers, columns by name or number).


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end), but for empty lines."""
    try:
        # newline="": a lone carriage return, or U+2028, is no end of a line here.
        with path.open(encoding="utf-8-sig" if encoding == "utf-8" else encoding, newline="") as file:
            for number, line in enumerate(file.read().split("\n"), 1):
                line = line.removesuffix("\r")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise FormatError(f"{path} must be a readable file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise FormatError(
            f"{path}, line {line} must be {encoding}, got the byte {error.object[error.start]:#x}"
        ) from error
    except LookupError:
        raise ValueError(f"encoding must be one that Python knows, got {encoding!r}") from None


def _where(path: Path, number: int) -> str:
    return f"{path.name}, line {number}"


def _jsonl_rows(path: Path, encoding: str) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    for number, line in _lines(path, encoding):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise FormatError(f"{_where(path, number)} must be JSON: {error}") from error
        if not isinstance(row, dict):
            raise FormatError(f"{_where(path, number)} must be a JSON object, got {_short(row)}")
        yield _where(path, number), row


def _table_rows(
    path: Path, quoted: bool, with_header: bool, columns: _Columns, encoding: str
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    names: Sequence[Any] | None = None
    width = None
    for number, cells in _quoted_cells(path, encoding) if quoted else _tab_cells(path, encoding):
        if width is None:
            width = len(cells)
            names = cells if with_header else range(width)
            if len(set(names)) != width:
                raise FormatError(f"{_where(path, number)}: columns must have different names, got {_short(cells)}")
            # With a header, columns may still be given by number.
            by_number = any(isinstance(column, int) for column in columns.named())
            names = range(width) if by_number else names
            if with_header:
                continue
        if len(cells) != width:
            raise FormatError(f"{_where(path, number)} must have {width} columns as the first line, got {len(cells)}")
        yield _where(path, number), dict(zip(names, cells, strict=True))


def _tab_cells(path: Path, encoding: str) -> Iterator[tuple[int, list[str]]]:
    return ((number, line.split("\t")) for number, line in _lines(path, encoding))


def _quoted_cells(path: Path, encoding: str) -> Iterator[tuple[int, list[str]]]:
    # The reader joins lines of a quoted cell, so it gets them with their ends, empty ones too.
    lines = dict(_lines(path, encoding))
    every = (lines.get(number, "") + "\n" for number in range(1, max(lines, default=0) + 1))
    reader = csv.reader(every, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise FormatError(f"{_where(path, first)} must be CSV: {error}") from error
        if cells is None:
            return
        if cells:
            yield first, cells


def _text_rows(path: Path, encoding: str) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    return ((_where(path, number), {"text": line}) for number, line in _lines(path, encoding))


def _trec_rows(path: Path, encoding: str) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    for number, line in _lines(path, encoding):
        found = re.fullmatch(r"((\w+):\w+) (.*)", line)
        if not found:
            raise FormatError(f"{_where(path, number)} must be COARSE:fine and a question, got {_short(line)}")
        yield _where(path, number), {"fine": found[1], "coarse": found[2], "text": found[3]}


def _vader_rows(path: Path, encoding: str) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    for number, cells in _tab_cells(path, encoding):
        try:
            _, mean, sentence = cells
            rating = float(mean)
        except ValueError:
            raise FormatError(
                f"{_where(path, number)} must be number, rating and sentence between tabs, got {_short(cells)}"
            ) from None
        if not -4 <= rating <= 4:  # NaN is outside as well
            raise FormatError(f"{_where(path, number)}: a rating must lie between -4 and 4, got {mean}")
        if abs(rating) >= 0.5:
            yield _where(path, number), {"text": sentence, "label": "positive" if rating > 0 else "negative"}


def _hf_rows(path: Path, columns: _Columns, split: str | None) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    if (path / "dataset_dict.json").is_file():
        splits = _json_file(path / "dataset_dict.json").get("splits")
        if split not in (splits or ()):
            raise ValueError(f"split must be one of {splits} of {path}, got {split!r}")
        path, split = path / split, None
    if path.is_file():
        files = [path]
    elif (path / "state.json").is_file():
        files = [path / str(entry.get("filename")) for entry in _json_file(path / "state.json")["_data_files"]]
    else:
        kinds = (".parquet", ".jsonl", ".arrow")
        files = sorted(f for folder in (path, path / "data") for f in folder.glob("*") if f.suffix in kinds)
        if split is not None:
            files = [f for f in files if re.match(re.escape(split) + r"(?![a-z0-9])", f.name)]
        # Shards are called like train-00000-of-00001.parquet.
        stems = sorted({re.sub(r"-\d+-of-\d+$", "", f.stem) for f in files})
        if len(stems) > 1:
            raise ValueError(f"split must say which of {', '.join(stems)} of {path} is meant, got {split!r}")
    if not files:
        what = "" if split is None else f" whose names begin with {split!r}"
        raise FormatError(f"{path} must have .parquet, .jsonl or .arrow files{what}, it has none")
    for file in files:
        yield from _jsonl_rows(file, "utf-8") if file.suffix == ".jsonl" else _arrow_rows(file, columns)


def _json_file(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} must be JSON: {error}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} must be a JSON object, got {_short(found)}")
    return found


def _arrow_rows(path: Path, columns: _Columns) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise ImportError(f"reading {path.name} needs pyarrow: pip install 'bitnet_ref[datasets]'") from error
    try:
        with pyarrow.memory_map(str(path)) as source:
            if path.suffix == ".parquet":
                reader = parquet.ParquetFile(source)
                schema, batches = reader.schema_arrow, None
            else:
                reader = ipc.open_stream(source)
                schema, batches = reader.schema, iter(reader)
            wanted = [column for column in columns.named() if column in schema.names]
            classes = _class_names(schema.metadata) if columns.names is None else {}
            number = 0
            for batch in reader.iter_batches(columns=wanted) if batches is None else batches:
                for row in batch.select(wanted).to_pylist():
                    number += 1
                    names = classes.get(columns.label)
                    if names and isinstance(row.get(columns.label), int):
                        index = row[columns.label]
                        if not 0 <= index < len(names):
                            raise FormatError(
                                f"{path.name}, row {number}: the label must be one of {len(names)} classes, got {index}"
                            )
                        row[columns.label] = names[index]
                    yield f"{path.name}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise FormatError(f"{path} must be a {path.suffix[1:]} file that pyarrow reads: {error}") from error


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Names of class labels by column, which ``datasets`` keeps in the schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {
        name: feature["names"]
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
    }


# Splits.


@dataclass(frozen=True)
class Splits:
    """Examples to train on, to choose by, and to report.

    Attributes
    ----------
    train, dev, test : list of Example
    duplicates_dropped : int
        Further copies of a text with the same label and target.
    conflicts_dropped : int
        All copies of texts that came with different labels: one of them is wrong, and nobody knows which.
    overlaps_dropped : int
        Texts of :func:`given_splits` that were in a later split too.
    """

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    duplicates_dropped: int = 0
    conflicts_dropped: int = 0
    overlaps_dropped: int = 0

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Examples of each split by label; under "" those without one."""
        return {
            name: dict(sorted(Counter(example.label or "" for example in part).items())) for name, part in self._parts()
        }

    @property
    def sha256(self) -> str:
        """Of all examples in their splits, in hex: what a result is reported with."""
        digest = hashlib.sha256()
        for name, part in self._parts():
            digest.update(json.dumps([name, [[e.text, e.label, e.target] for e in part]]).encode())
        return digest.hexdigest()

    def table(self) -> str:
        """The counts as text."""
        counts = self.counts
        labels = sorted({label for split in counts.values() for label in split})
        rows = [["label", *counts]]
        rows += [[label or "(none)", *(f"{split.get(label, 0):,}" for split in counts.values())] for label in labels]
        rows.append(["all", *(f"{sum(split.values()):,}" for split in counts.values())])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        dropped = (
            f"dropped: {self.duplicates_dropped:,} duplicates, {self.conflicts_dropped:,} with conflicting labels, "
            f"{self.overlaps_dropped:,} that were in two splits"
        )
        return "\n".join([*lines, dropped])

    def _parts(self) -> list[tuple[str, list[Example]]]:
        return [("train", self.train), ("dev", self.dev), ("test", self.test)]


def normalised(text: Sequence[str]) -> str:
    """What counts as the same text: NFKC, case folded, and only its words.

    Case, punctuation and spaces differ between copies of a sentence more than they change it. A text without a word
    keeps its characters.
    """
    parts = []
    for part in text:
        folded = unicodedata.normalize("NFKC", part).casefold()
        parts.append(" ".join(re.findall(r"\w+", folded)) or " ".join(folded.split()))
    return "\x1f".join(parts)


def split_examples(examples: Iterable[Example], fractions: Sequence[float], seed: int) -> Splits:
    """Assign every example to a split by the hash of its normalised text and the seed, never by its position.

    Parameters
    ----------
    examples : iterable of Example
    fractions : three numbers
        Shares of train, dev and test, each above 0, with sum 1. What a split gets is binomial around them.
    seed : int

    Returns
    -------
    Splits
        In an order that comes from the hash as well, so the order of `examples` changes nothing but ids of duplicates.
        An example stays in its split when others are added.

    Raises
    ------
    ValueError
        If the fractions are no such numbers, or a split is empty.
    """
    fractions = [Fraction(str(fraction)) for fraction in fractions]
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > Fraction(1, 10**9):
        raise ValueError(f"fractions must be three shares above 0 with sum 1, got {list(map(float, fractions))}")
    kept, duplicates, conflicts = _unique(examples)
    hashed = ((hashlib.sha256(f"{int(seed)}\0{key}".encode()).digest(), example) for key, example in kept.items())
    first, second = fractions[0] * 2**64, (fractions[0] + fractions[1]) * 2**64
    train, dev, test = [], [], []
    for digest, example in sorted(hashed, key=lambda pair: pair[0]):
        at = int.from_bytes(digest[:8], "big")
        (train if at < first else dev if at < second else test).append(example)
    return _checked(Splits(train, dev, test, duplicates, conflicts))


def given_splits(
    train: Iterable[Example], dev: Iterable[Example], test: Iterable[Example], *, drop_overlaps: bool = False
) -> Splits:
    """Splits that a data set brings, each without duplicates.

    Parameters
    ----------
    train, dev, test : iterable of Example
    drop_overlaps : bool
        Whether a text in two splits is kept in the later one only (train, dev, test) and counted, instead of an error.

    Returns
    -------
    Splits
        Each in the order in which it came.

    Raises
    ------
    ValueError
        If a split is empty, or splits overlap.
    """
    parts, duplicates, conflicts, overlaps = [], 0, 0, 0
    later: dict[str, str] = {}
    for name, part in (("test", test), ("dev", dev), ("train", train)):
        kept, n_duplicates, n_conflicts = _unique(part)
        duplicates, conflicts = duplicates + n_duplicates, conflicts + n_conflicts
        shared = [key for key in kept if key in later]
        if shared and not drop_overlaps:
            example = kept[shared[0]]
            raise ValueError(
                f"splits must not overlap, {len(shared)} texts of {name} are in {later[shared[0]]} or another too, "
                f"such as {example.id}: {_short(example.text[0])}"
            )
        overlaps += len(shared)
        parts.insert(0, [example for key, example in kept.items() if key not in later])
        later |= dict.fromkeys(kept, name)
    return _checked(Splits(*parts, duplicates, conflicts, overlaps))


def _unique(examples: Iterable[Example]) -> tuple[dict[str, Example], int, int]:
    """The examples by normalised text, and how many duplicates and conflicts were dropped."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(normalised(example.text), []).append(example)
    kept, duplicates, conflicts = {}, 0, 0
    for key, group in groups.items():
        if len({example.label for example in group}) > 1:
            conflicts += len(group)
            continue
        # Which copy stays must not hang on the order of the file either.
        kept[key] = min(group, key=lambda example: (example.text, example.target or "", example.id))
        duplicates += len(group) - 1
    return kept, duplicates, conflicts


def _checked(splits: Splits) -> Splits:
    sizes = [f"{name} {len(part)}" for name, part in splits._parts()]
    if not all(part for _, part in splits._parts()):
        raise ValueError(f"no split may be empty, got {', '.join(sizes)}")
    return splits
