"""Who may import whom, read from the sources: above all, the reference never sees what it judges."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_ref import distill

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bitnet_ref"

ANY = None
# Module (with everything below it): parts of bitnet_ref that it may import, packages from outside that it may import.
# "bitnet_ref" alone stands for the public names of the package itself. The longest prefix counts.
RULES = {
    "bitnet_ref": ({"kernels", "errors", "linear", "reference", "runtime"}, set()),  # runtime: only when asked for
    "bitnet_ref.errors": (set(), set()),
    "bitnet_ref.reference": ({"reference", "errors"}, {"numpy", "scipy"}),
    "bitnet_ref._native": ({"_native"}, set()),
    "bitnet_ref.kernels": ({"_native", "errors", "reference.packing"}, {"numpy"}),
    "bitnet_ref.linear": ({"kernels", "reference"}, {"numpy"}),
    "bitnet_ref.verify": ({"kernels", "reference", "errors"}, {"numpy"}),
    "bitnet_ref.testing": (set(), {"numpy", "hypothesis"}),
    "bitnet_ref.formats": ({"", "formats", "reference", "errors"}, {"numpy", "gguf", "safetensors"}),
    "bitnet_ref.runtime": (
        {"", "runtime", "kernels", "formats", "reference", "errors"},
        {"numpy", "safetensors", "tokenizers"},
    ),
    "bitnet_ref.runtime._chat_worker": (set(), {"jinja2"}),
    "bitnet_ref.runtime.steps": ({"", "_native", "kernels", "reference", "errors"}, {"numpy"}),
    "bitnet_ref.distill": ({"distill", "formats", "reference", "errors"}, ANY),
    # What training reads needs no PyTorch, and is tested without it.
    "bitnet_ref.distill.config": (set(), set()),
    "bitnet_ref.distill.results": ({"errors"}, set()),
    "bitnet_ref.distill.text": (set(), {"tokenizers"}),
    "bitnet_ref.distill.corpus": ({"distill.text", "errors"}, {"numpy"}),
    "bitnet_ref.distill.data": ({"distill.corpus", "errors"}, {"pyarrow"}),
    "bitnet_ref.distill.synthetic": ({"distill.data", "distill.text"}, {"numpy", "tokenizers"}),
    "bitnet_ref.distill.tasks": (
        {"distill.corpus", "distill.data", "distill.text"},
        {"numpy", "rouge_score", "sacrebleu"},
    ),
    "bitnet_ref.measure": ({"", "measure", "kernels", "linear", "runtime", "reference", "errors", "formats"}, ANY),
    "bitnet_ref.report": (ANY, ANY),
    "bitnet_ref.commands": (ANY, ANY),
    "bitnet_ref.commands.distill": (ANY, {"click", "numpy", "rich"}),  # imports training code when a command runs
    "bitnet_ref.cli": (ANY, ANY),
    "bitnet_ref.paper_figures": (ANY, ANY),
}
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "_table.py")  # generated: two constants
SOURCES += sorted(ROOT.glob("paper_figures/*.py"))  # where the package holds only a link to them


def module_name(path):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "paper_figures":
        parts.insert(0, "bitnet_ref")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exists(module):
    path = ROOT.joinpath(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def imports(source, module):
    """Modules that a source imports, anywhere in it but under ``if __name__ == "__main__"``."""
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:  # from . import x: relative to the package that holds the module, or that it is
                up = node.level - ROOT.joinpath(*module.split(".")).is_dir()
                origin = ".".join([*module.split(".")[: -up or None], *filter(None, [origin])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                # A name of the package is a module if there is one, and otherwise one of its public names.
                found.add(inner if exists(inner) or origin.endswith("_native") else origin)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def violations(source, module):
    """What a source imports against the rules."""
    rule = max((name for name in RULES if f"{module}.".startswith(f"{name}.")), key=len)
    if rule == "bitnet_ref" and module != "bitnet_ref":
        return [f"{module} has no rule"]
    inside, outside = RULES[rule]
    found = []
    for imported in sorted(imports(source, module)):
        top, _, rest = imported.partition(".")
        training = rule.startswith(("bitnet_ref.distill", "bitnet_ref.commands.distill"))
        if not training and (top == "torch" or rest.split(".")[0] == "distill"):
            found.append(imported)  # training code has a part of its own, which nothing here needs
        elif top == "bitnet_ref":
            allowed = inside is ANY or any(
                rest == part or rest.startswith(f"{part}.") for part in inside if part or not rest
            )
            if not allowed:
                found.append(imported)
        elif top not in sys.stdlib_module_names and outside is not ANY and top not in outside:
            found.append(imported)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_module_imports_only_what_its_layer_may(path):
    assert violations(path.read_text(encoding="utf-8"), module_name(path)) == []


def test_every_part_was_looked_at():
    seen = {module_name(path) for path in SOURCES}
    assert {"bitnet_ref", "bitnet_ref.kernels", "bitnet_ref.reference.packing.tl2", "bitnet_ref._native"} <= seen
    assert seen >= {name for name in RULES if exists(name)}


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("bitnet_ref.reference.norm", "import bitnet_ref.kernels", ["bitnet_ref.kernels"]),
        ("bitnet_ref.reference.norm", "from bitnet_ref import kernels", ["bitnet_ref.kernels"]),
        ("bitnet_ref.reference.norm", "from bitnet_ref import matmul", ["bitnet_ref"]),
        ("bitnet_ref.reference.norm", "def f():\n    from bitnet_ref._native import cpu", ["bitnet_ref._native.cpu"]),
        ("bitnet_ref.reference.norm", "from .. import kernels", ["bitnet_ref.kernels"]),
        ("bitnet_ref.reference.norm", "from ..linear import BitLinear", ["bitnet_ref.linear"]),
        ("bitnet_ref.reference.norm", "from . import matmul\nfrom .packing import i2", []),
        ("bitnet_ref.reference", "from .. import kernels\nfrom . import matmul", ["bitnet_ref.kernels"]),
        ("bitnet_ref.reference.norm", "import numpy as np, torch", ["torch"]),
        ("bitnet_ref.reference.norm", "from scipy.special import erf\nimport math", []),
        (
            "bitnet_ref.kernels",
            "from bitnet_ref.reference.quantize import quantize_weights",
            ["bitnet_ref.reference.quantize"],
        ),
        ("bitnet_ref.kernels", "from bitnet_ref.reference.packing.i2 import I2", []),
        ("bitnet_ref.kernels", "if __name__ == '__main__':\n    from bitnet_ref.cli import main", []),
        ("bitnet_ref.kernels", "if True:\n    from bitnet_ref.cli import main", ["bitnet_ref.cli"]),
        ("bitnet_ref.linear", "from bitnet_ref._native import matmul", ["bitnet_ref._native.matmul"]),
        ("bitnet_ref.testing", "from bitnet_ref.reference.packing import pack", ["bitnet_ref.reference.packing"]),
        ("bitnet_ref.formats.hf", "import transformers", ["transformers"]),
        ("bitnet_ref.measure.speed", "from bitnet_ref import report", ["bitnet_ref.report"]),
        ("bitnet_ref.measure.speed", "import bitnet_ref, matplotlib", []),
        ("bitnet_ref.linear", "import bitnet_ref", ["bitnet_ref"]),
        ("bitnet_ref.cli", "import torch", ["torch"]),
        ("bitnet_ref.report.html", "from bitnet_ref.distill import losses", ["bitnet_ref.distill.losses"]),
        ("bitnet_ref.distill.data", "import torch", ["torch"]),
        ("bitnet_ref.distill.tasks", "from bitnet_ref.distill import losses", ["bitnet_ref.distill.losses"]),
        ("bitnet_ref.distill.tasks", "from bitnet_ref.distill.data import Example", []),
        ("bitnet_ref.unheard_of", "import math", ["bitnet_ref.unheard_of has no rule"]),
    ],
)
def test_the_rules_are_enforced(module, source, expected):
    assert violations(source, module) == expected


# --- files that would run code ----------------------------------------------------------------------------------------

PICKLES = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def runs_code_of_files(source):
    """Names by which a module could run code that a file brings: pickles in any guise, eval, exec."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
            owner = getattr(getattr(node.func, "value", None), "id", None)
            builtin = isinstance(node.func, ast.Name) and called in ("eval", "exec")
            if (
                (owner, called) == ("torch", "load")
                or builtin
                or any(word.arg == "allow_pickle" for word in node.keywords)
            ):
                found.append(ast.unparse(node.func))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_pickle_anywhere(path):
    assert runs_code_of_files(path.read_text(encoding="utf-8")) == []


def test_pickles_are_found():
    source = "import pickle\nfrom joblib import load\nimport torch\ntorch.load(f)\neval(x)\nnp.load(f, allow_pickle=a)"
    assert runs_code_of_files(source) == ["pickle", "joblib", "torch.load", "eval", "np.load"]


# --- compiled code and templates ------------------------------------------------------------------------------------

NOT_PYTHON = sorted(p for folder in ("pyx", "templates") for p in (ROOT / folder).rglob("*") if p.is_file())
IMPORTS_US = re.compile(r"^\s*(?:from\s+bitnet_ref\b|c?import\s+(?:[\w., ]+,\s*)?bitnet_ref\b)", re.MULTILINE)


@pytest.mark.parametrize("path", [p for p in NOT_PYTHON if "__pycache__" not in p.parts], ids=lambda path: path.name)
def test_templates_and_compiled_code_never_import_the_package(path):
    assert not IMPORTS_US.search(path.read_text(encoding="utf-8"))


def test_the_pattern_finds_imports():
    for line in (
        "import bitnet_ref",
        "    from bitnet_ref.kernels import get",
        "cimport numpy, bitnet_ref",
        "from bitnet_ref cimport x",
    ):
        assert IMPORTS_US.search(f"x = 1\n{line}\n")
    assert not IMPORTS_US.search('KERNEL = PyCapsule_New(p, b"bitnet_ref.lut/1", NULL)')
    assert len(NOT_PYTHON) > 15


# --- figures and notebooks: public names only -----------------------------------------------------------------------


def private_uses(source):
    """Underscore modules or names of bitnet_ref that a source imports or reaches through an imported name."""
    tree = ast.parse(source)
    found, names = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "bitnet_ref":
                    found += [alias.name] * ("._" in alias.name)
                    names.add(alias.asname or "bitnet_ref")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bitnet_ref":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found += [full] * bool(re.search(r"\._(?!_)", full))
                names.add(alias.asname or alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr) and not node.attr.startswith("_repr_"):
            base = node.value
            while isinstance(base, ast.Attribute | ast.Call):
                base = base.value if isinstance(base, ast.Attribute) else base.func
            found += [ast.unparse(node)] * (isinstance(base, ast.Name) and base.id in names)
    return found


def notebook_code(path):
    """The Python of a notebook's code cells; lines for IPython itself left out."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code").splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


@pytest.mark.parametrize("path", sorted(ROOT.glob("paper_figures/*.py")), ids=lambda path: path.name)
def test_figures_use_public_names(path):
    assert private_uses(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.name)
def test_notebooks_use_public_names(path):
    source = notebook_code(path)
    assert "bitnet_ref" in source
    assert private_uses(source) == []
    found = imports(source, path.name)
    # PyTorch is an extra: only what shows training may need it.
    trains = any(name.startswith("bitnet_ref.distill") for name in found)
    assert trains or not any(name.split(".")[0] == "torch" for name in found)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import bitnet_ref._native.cpu", ["bitnet_ref._native.cpu"]),
        ("from bitnet_ref._native import cpu", ["bitnet_ref._native.cpu"]),
        ("from bitnet_ref.kernels import _load", ["bitnet_ref.kernels._load"]),
        ("import bitnet_ref as br\nbr.kernels._load(x)", ["br.kernels._load"]),
        ("import bitnet_ref as br\nbr.kernels.get(n)._capsule", ["br.kernels.get(n)._capsule"]),
        ("import bitnet_ref as br\nbr.__version__\nbr.kernels.compiled()\nbr.pack(w, 'i2')._repr_html_()", []),
        ("import numpy as np\nnp._core", []),
    ],
)
def test_private_uses_are_found(source, expected):
    assert private_uses(source) == expected


# --- what an import costs -------------------------------------------------------------------------------------------


def test_importing_the_package_stays_light():
    """The public API needs NumPy only: no plotting, no command line, no file formats, no test library."""
    code = "import sys, bitnet_ref; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert "numpy" in loaded
    assert loaded.isdisjoint(
        {"matplotlib", "rich", "click", "jinja2", "gguf", "safetensors", "hypothesis", "torch", "pytest"}
    )


# --- what distillation gives at its top -----------------------------------------------------------------------------


@pytest.mark.parametrize("module", distill.PIECES)
def test_pieces_are_public_names_of_their_modules(module):
    tree = ast.parse((PACKAGE / "distill" / f"{module}.py").read_text(encoding="utf-8"))
    (names,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
    assert set(distill.PIECES[module]) <= set(ast.literal_eval(names))


def test_distillation_is_imported_piece_by_piece():
    code = (
        "import sys\n"
        "sys.modules['torch'] = None  # as if it were not installed\n"
        "from bitnet_ref import distill\n"
        "print(distill.load_config('tiny').seeds)\n"
        "assert 'BitLinear' in dir(distill) and 'losses' in dir(distill)\n"
        "for name in ('BitLinear', 'losses', 'nothing'):\n"
        "    try:\n"
        "        getattr(distill, name)\n"
        "    except (ImportError, AttributeError) as error:\n"
        "        print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "(0,)",
        "BitLinear needs torch, which is not installed: pip install 'bitnet_ref[distill]'",
        "losses needs torch, which is not installed: pip install 'bitnet_ref[distill]'",
        "module 'bitnet_ref.distill' has no attribute 'nothing'",
    ]
