"""Citations name papers that are listed, and the public API is documented."""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import tokenize
from pathlib import Path

import pytest

import bitnet_ref as br

ROOT = Path(__file__).resolve().parent.parent
LISTED = dict(re.findall(r"^\[([^\]]+)\] +(\S.*)$", br.__doc__, re.MULTILINE))

# A citation is [Key] or [Key, Table 1]: not the text of a Markdown link, nor what follows a name or a call. A key has a
# capital letter and at least three characters, or is the name of a program such as bitnet.cpp; the rest is notation.
CITATION = re.compile(r"(?<![\w)\]])\[(?=[^\],]*(?:[A-Z]|\.cpp))([A-Za-z0-9][A-Za-z0-9.+-]{2,})(?:, [^\]]*)?\](?!\()")

PATTERNS = (
    "bitnet_ref/**/*.py bitnet_ref/**/*.j2 paper_figures/*.py pyx/* templates/**/* meson.build "
    "docs/**/*.md *.md notebooks/*.ipynb"
)
FILES = [
    path
    for pattern in PATTERNS.split()
    for path in sorted(ROOT.glob(pattern))
    if path.is_file() and path.suffix != ".pyc" and path.name != "_table.py"
]


def prose(path):
    """What a reader reads in a file: texts and comments of Python, Markdown less its code, all of other files."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        texts = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
        comments = (
            t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT
        )
        return "\n".join([*(value for value in texts if isinstance(value, str)), *comments])
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    if path.suffix in (".md", ".ipynb"):
        text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"`[^`\n]*`", "", text)
    return text


def keys(text):
    return set(CITATION.findall(text))


def test_the_list_of_papers():
    assert set(LISTED) >= {
        "BitNet",
        "B158",
        "B158-FAQ",
        "2B4T",
        "BitDistill",
        "bitnet.cpp",
        "T-MAC",
        "Horowitz",
        "PokeBNN",
    }
    for key, title in LISTED.items():
        assert CITATION.fullmatch(f"[{key}]"), key  # the pattern below would find it
        assert re.search(r"arXiv \d{4}\.\d{5}|ISSCC \d{4}|microsoft/unilm, \d{4}", title), title


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_key_is_in_the_list(path):
    assert keys(prose(path)) <= set(LISTED)


def test_keys_are_found():
    text = """See [BitNet, Table 1] and [2B4T], [bitnet.cpp, arXiv 2410.16144, Tables 4 and 6]; as [MiniLM, Eq. 3].
    Not: (M, K), [M, K], [distill], [-128, 127], W[Row], list(X)[Row], [README](README.md), x[t, K], [p, 0], [T].
    """
    assert keys(text) == {"BitNet", "2B4T", "bitnet.cpp", "MiniLM"}
    used = set().union(*(keys(prose(path)) for path in FILES if path.name != "__init__.py"))
    assert used >= {"BitNet", "B158", "2B4T", "BitDistill", "bitnet.cpp", "T-MAC", "Horowitz"}


def test_an_unknown_key_fails(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('"""As in [MiniLM]."""\nx = 1  # [2B4T, Table 3], not [FooBar, Table 1]\ny = dict[str, int]\n')
    assert keys(prose(path)) - set(LISTED) == {"MiniLM", "FooBar"}
    page = tmp_path / "page.md"
    page.write_text("[MiniLM] but not `[FooBar]` nor\n```\n[BarFoo]\n```\nnor [Link](x.md)\n")
    assert keys(prose(page)) == {"MiniLM"}


# --- docstrings of the public API -----------------------------------------------------------------------------------


def missing(thing):
    """Sections that the docstring of a public function or class should have and has not."""
    doc = inspect.getdoc(thing) or ""
    if not doc:
        return ["docstring"]
    if inspect.isclass(thing):
        if issubclass(thing, BaseException):
            return []
        wanted = ["Parameters"] if inspect.signature(thing).parameters else []
        methods = [(name, value) for name, value in vars(thing).items() if inspect.isfunction(value)]
        public = [value for name, value in methods if not name.startswith("_") or name == "__call__"]
        inner = [f"{method.__name__}: docstring" for method in public if not method.__doc__]
    else:
        signature = inspect.signature(thing)
        wanted = ["Parameters"] if signature.parameters else []
        if wanted and signature.return_annotation not in (None, "None", inspect.Signature.empty):
            wanted.append("Returns")
        inner = []
    return [section for section in wanted if f"\n{section}\n{'-' * len(section)}\n" not in doc] + inner


PUBLIC = [name for name in br.__all__ if callable(getattr(br, name))]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    assert missing(getattr(br, name)) == []


def test_public_names():
    assert br.__all__ == sorted(br.__all__) and all(hasattr(br, name) for name in br.__all__)
    assert len(PUBLIC) >= 9
    annotated = [getattr(br, name) for name in PUBLIC if inspect.isfunction(getattr(br, name))]
    for function in annotated:
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def test_missing_sections_are_found():
    def bare(x: int) -> int:
        return x

    def partly(x: int) -> int:
        """Something.

        Parameters
        ----------
        x : int
        """
        return x

    assert missing(bare) == ["docstring"]
    assert missing(partly) == ["Returns"]
