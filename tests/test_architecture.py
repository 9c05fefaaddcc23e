"""The rules of DESIGN section 1 that a reader of the tree relies on."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import manifold_unlearn

ROOT = Path(manifold_unlearn.__file__).parent
LAYERS = [
    {"cli"},
    {"sweep"},
    {"demo", "attack_report"},
    {"pipeline"},
    {"report"},
    {"attack"},
    {"evaluate", "recipe"},
    {"finetune", "circuit"},
    {"erase", "steer", "dictionary", "phenomenology"},
    {"intervene", "comparison"},
    {"activations", "manifold", "testbed"},
    {"artifact", "arrays", "conformal", "sequences"},
]
"""Higher may import lower; rooms of one layer do not know each other, but for ALLOWED."""
ALLOWED = {("testbed", "activations")}
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

LANGUAGE_MODELS = {"transformers", "tokenizers", "huggingface_hub"}
MEET_TRANSFORMERS = {
    "activations",
    "attack",
    "circuit",
    "evaluate",
    "finetune",
    "intervene",
    "testbed",
}
ON_TOP = {"numpy", "safetensors", "scipy", "sklearn", "torch", "tqdm"}
"""What a module may import when it is imported; all else waits in the function that needs it."""
FORBIDDEN = {"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal", "torchvision"}
BASES = {"BaseEstimator", "Module", "Function"}  # the last: a gradient written by hand
VAGUE = {"utils", "util", "helpers", "common", "misc", "core", "base"}


def room_of(module):
    """``manifold_unlearn.erase.subspace`` stands in ``erase``; the package itself in no room."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(tree):
    """Every (module, names, inside a function, for types only), wherever it stands."""

    def walk(node, inside, typed):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield child, alias.name, [], inside, typed
            elif isinstance(child, ast.ImportFrom):
                yield child, child.module, [a.name for a in child.names], inside, typed
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                yield from walk(child, inside, True)
            else:
                deeper = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                yield from walk(child, inside or deeper, typed)

    yield from walk(tree, False, False)


def violations(module, source):
    """What a module does that the house does not allow."""
    tree, room, found = ast.parse(source), room_of(module), []
    origin = {}
    for node, name, names, inside, typed in imports(tree):
        if getattr(node, "level", 0):
            found.append("relative import")
            continue
        top = name.split(".")[0]
        for alias in node.names:
            origin[(alias.asname or alias.name).split(".")[0]] = top
        if top == "manifold_unlearn":
            targets = [name] if "." in name else [f"{name}.{n}" for n in names]
            found += [f for t in targets if (f := _against_layers(room, t, inside))]
            continue
        if top in FORBIDDEN:
            found.append(f"imports {top}")
        if top in LANGUAGE_MODELS and room not in MEET_TRANSFORMERS:
            found.append(f"{room} meets {top}")
        standard = top in sys.stdlib_module_names
        if not (standard or inside or typed or top in ON_TOP):
            found.append(f"imports {top} outside a function")
    for node in ast.walk(tree):
        found += _against_calls(module, node)
        if isinstance(node, ast.ClassDef):
            found += _against_bases(node, origin)
    return found


def _against_layers(room, target, inside):
    aim = room_of(target)
    if room in ("", aim) or target == "manifold_unlearn.__version__":
        return None
    if aim not in LEVEL or room not in LEVEL:
        return f"{room} imports {target}, which is in no layer"
    if LEVEL[room] < LEVEL[aim] or (room, aim) in ALLOWED:
        return None
    return f"{room} imports {aim}"


READS_CHECKPOINTS = "manifold_unlearn.dictionary.formats."
"""Here alone torch.load is called, on the files of others, with weights_only=True."""


def _against_calls(module, node):
    if isinstance(node, ast.ImportFrom) and node.module == "torch":
        return ["calls torch.load"] * any(name.name == "load" for name in node.names)
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        keywords = {k.arg: k.value for k in node.keywords}
        if called == "print" and room_of(module) != "cli":
            return ["prints"]
        if called == "torch.load":
            only = keywords.get("weights_only")
            safe = only is not None and ast.unparse(only) == "True"
            if not (safe and module.startswith(READS_CHECKPOINTS)):
                return ["calls torch.load"]
        if (code := keywords.get("trust_remote_code")) and ast.unparse(code) != "False":
            return ["trusts remote code"]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        if any(k and ast.unparse(k) == "'trust_remote_code'" and ast.unparse(v) != "False"
               for k, v in pairs):  # fmt: skip
            return ["trusts remote code"]
    return []


def _against_bases(node, origin):
    for base in node.bases:
        written = ast.unparse(base)
        source, last = origin.get(written.split(".")[0]), written.split(".")[-1].split("[")[0]
        foreign = source and source != "manifold_unlearn" and source not in sys.stdlib_module_names
        if foreign and last not in BASES and not last.endswith("Mixin"):
            return [f"subclasses {written}"]
    return []


FILES = sorted(ROOT.rglob("*.py"))


def dotted(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_a_module_keeps_the_rules_of_the_house(path):
    source = path.read_text(encoding="utf-8")
    assert violations(dotted(path), source) == []
    assert source.count("\n") <= 500
    assert path.stem not in VAGUE
    assert ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize(
    ("room", "line", "words"),
    [
        ("erase", "from manifold_unlearn.evaluate.metrics import x", "erase imports evaluate"),
        ("intervene", "def f():\n from manifold_unlearn.erase import x", "intervene imports erase"),
        ("manifold", "from manifold_unlearn import activations", "manifold imports activations"),
        ("activations", "import manifold_unlearn.testbed.facts", "activations imports testbed"),
        ("artifact", "from manifold_unlearn.arrays import x", "artifact imports arrays"),
        ("erase", "if TYPE_CHECKING:\n from manifold_unlearn.report import x", "imports report"),
        ("erase", "from manifold_unlearn import capture", "in no layer"),
        ("attic", "from manifold_unlearn.arrays import x", "in no layer"),
        ("erase", "from . import x", "relative import"),
        ("erase", "def f():\n import transformers", "erase meets transformers"),
        ("activations", "import transformers", "outside a function"),
        ("manifold", "import geomstats.geometry", "outside a function"),
        ("report", "try:\n import matplotlib\nexcept ImportError: pass", "outside a function"),
        ("erase", "class A:\n import faiss", "outside a function"),
        ("erase", "def f():\n import pickle", "imports pickle"),
        ("erase", "def f():\n print(1)", "prints"),
        ("erase", "import torch\ntorch.load('x')", "calls torch.load"),
        ("erase", "import torch\ntorch.load('x', weights_only=True)", "calls torch.load"),
        ("erase", "from torch import load", "calls torch.load"),
        ("dictionary", "import torch\ntorch.load('x', weights_only=True)", "calls torch.load"),
        ("dictionary.formats", "import torch\ntorch.load('x')", "calls torch.load"),
        ("dictionary.formats", "import torch\ntorch.load('x', weights_only=y)", "calls torch.load"),
        ("dictionary.formats", "def f():\n import pickle", "imports pickle"),
        ("activations", "f(trust_remote_code=True)", "trusts remote code"),
        ("activations", "f(**{'trust_remote_code': x})", "trusts remote code"),
        ("erase", "from sklearn.linear_model import Ridge\nclass A(Ridge): pass", "subclasses"),
    ],
)
def test_a_breach_of_the_rules_is_found(room, line, words):
    assert any(words in found for found in violations(f"manifold_unlearn.{room}.x", line))


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("erase", "from manifold_unlearn.manifold.kernels import x"),
        ("testbed", "from manifold_unlearn.activations.corpus import Item"),
        ("activations", "def f():\n import transformers"),
        ("report", "def f():\n import matplotlib"),
        ("report", "if TYPE_CHECKING:\n from matplotlib.figure import Figure"),
        ("cli", "print(1)"),
        ("dictionary.formats", "import torch\ntorch.load('x', weights_only=True)"),
        ("erase", "import torch.nn as nn\nclass A(nn.Module): pass"),
        ("erase", "from sklearn.base import OneToOneMixin\nclass A(OneToOneMixin): pass"),
    ],
)  # fmt: skip
def test_what_the_house_allows_passes(room, line):
    assert violations(f"manifold_unlearn.{room}.x", line) == []


def test_every_room_has_its_layer():
    rooms = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert rooms - {"__init__"} <= LEVEL.keys()


def test_testbed_uses_only_public_names_of_activations():
    for path in (ROOT / "testbed").glob("*.py"):
        for _, name, names, _, _ in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if (name or "").startswith("manifold_unlearn.activations"):
                assert not [n for n in names if n.startswith("_")], path


def test_importing_the_package_is_light():
    """In a fresh interpreter: no transformers, no matplotlib, nothing of an extra."""
    code = (
        "import sys, manifold_unlearn\n"
        "heavy = 'transformers tokenizers matplotlib geomstats pydiffmap gguf'.split()\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "print(callable(manifold_unlearn.intervene))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["[]", "True"]


def public_names():
    return sorted(manifold_unlearn.__all__)


@pytest.mark.parametrize("name", public_names())
def test_a_public_name_resolves_and_says_what_it_is(name):
    found = getattr(manifold_unlearn, name)
    assert name in dir(manifold_unlearn)
    assert inspect.getdoc(found)
    if inspect.isclass(found):
        for member, value in vars(found).items():
            if not member.startswith("_") and inspect.isfunction(value):
                assert inspect.getdoc(getattr(found, member)), member


@pytest.mark.parametrize(
    "room", ["comparison", "evaluate", "manifold", "phenomenology", "report", "steer"]
)
def test_the_names_of_a_room_resolve_and_say_what_they_are(room):
    module = getattr(manifold_unlearn, room)
    for name in module.__all__:
        found = getattr(module, name)
        if inspect.isclass(found) or inspect.isfunction(found):
            assert inspect.getdoc(found), name


def test_no_other_name_resolves():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        manifold_unlearn.nonsense  # noqa: B018


def test_intervene_stays_the_function_whatever_of_its_room_is_imported():
    for path in (ROOT / "intervene").glob("[a-z]*.py"):
        importlib.import_module(f"manifold_unlearn.intervene.{path.stem}")
    hooks = importlib.import_module("manifold_unlearn.intervene.hooks")
    assert manifold_unlearn.intervene is hooks.intervene
