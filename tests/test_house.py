"""The rules of the rooms: who may import whom, and that nobody does so behind a type checker's back."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [
    "fast",
    "formats",
    "evaluation",
    "synthesis",
    "training",
    "harness",
    "corpora",
    "benchmark",
    "experiments",
    "jobs",
    "image_density_experiments",
]
# From the ground up; a room imports its own floor's package and those below, never above.
FLOORS = [
    {"harness"},
    {"config", "spline", "formats"},
    {"audio", "modules", "linear_prediction"},
    {"data", "corpora", "fast"},
    {"model"},
    {"checkpoint", "evaluation", "synthesis"},
    {"vocoder", "training"},
    {"jobs"},
    {"train", "benchmark", "experiments"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
HUB = "hubconf.py"  # an interface, not a room; torch.hub looks for it at the root, by this name
# Rooms whose command lines, within a function, reach the rooms above that do the work.
COMMAND_LINES = {"data": {"corpora.command", "corpora"}, "checkpoint": {"jobs.files", "jobs"}}
MOST_LINES = 425  # of a room; "about 400"
MOST_STATEMENT_LINES = 60  # of a function: a screen
KERNELS = {"fast.gpu_kernel", "fast.gpu_training_kernel"}  # one launch each; a call within a kernel is inlined
FILES = sorted(
    path
    for path in (*ROOT.glob("*.py"), *(file for package in PACKAGES for file in (ROOT / package).rglob("*.py")))
    if path.name not in ("__init__.py", HUB)
)
ROOMS = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}


def imported(path: Path, lazily: bool = True) -> set[str]:
    """The rooms that a file names in its imports; lazily: also inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if lazily else tree.body
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & ROOMS


def area(room: str) -> str:
    return room.split(".")[0]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_the_root_is_ten_rooms_at_most():
    assert len([path for path in ROOT.glob("*.py") if path.name != HUB]) <= 10


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path):
    room = name_of(path)
    if area(room) == "image_density_experiments":
        allowed = {"image_density_experiments", "harness", "spline"}
        assert {area(name) for name in imported(path)} <= allowed
        return
    for name in imported(path) - (COMMAND_LINES.get(room, set()) - imported(path, lazily=False)):
        assert area(name) == area(room) or LEVEL[area(name)] < LEVEL[area(room)], f"{room} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_room_is_imported_for_its_types_only(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            inside = {n.module for n in ast.walk(node) if isinstance(n, ast.ImportFrom)}
            assert not {area(name) for name in inside} & {area(name) for name in ROOMS}


def test_there_is_no_circle():
    """Lazy imports count too, but for those of command lines."""
    edges = {name_of(path): imported(path) - COMMAND_LINES.get(name_of(path), set()) for path in FILES}
    done: set[str] = set()

    def walk(room: str, above: tuple[str, ...]) -> None:
        assert room not in above, " -> ".join((*above, room))
        if room not in done:
            for name in edges[room]:
                walk(name, (*above, room))
            done.add(room)

    for room in edges:
        walk(room, ())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_rooms_and_functions_stay_readable(path):
    """A room of about 400 lines, a function of a screen and six parameters at most; kernels are one function each."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and name_of(path) not in KERNELS:
            assert node.end_lineno - node.lineno < MOST_STATEMENT_LINES, node.name
            named = [one.arg for one in (*node.args.posonlyargs, *node.args.args) if one.arg not in ("self", "cls")]
            assert len(named) <= 6 or node.name == "__init__", f"{node.name}: {named}"


@pytest.mark.parametrize("path", sorted((ROOT / "fast").glob("[a-z]*.py")), ids=name_of)
def test_every_fast_room_names_its_twin(path):
    first = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]
    assert "`" in first, "its first line names what it is equal to"
    assert first.startswith(("Twin of `", "Weights of `"))


@pytest.mark.parametrize("name", ["model.py", "modules.py"])
def test_the_papers_rooms_hold_truth_only(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for word in ("cuda", "device", "dtype", "cache", "autocast", "compile", "workspace", "channels_last", "bfloat16"):
        assert word not in text.lower(), f"{name} speaks of {word}"


def test_from_the_likelihood_to_the_convolution_are_four_calls():
    """Flow.forward, Estimator.forward, EstimatorLayer.forward, Conv.forward."""
    import sys

    import torch

    from fast.estimators import Execution
    from tests.support.vocoders import random_input, random_vocoder

    model = random_vocoder()
    model.execution = Execution(plain=True)
    names: list[str] = []
    conv2d = torch.nn.functional.conv2d

    def note(*arguments, **options):
        frame = sys._getframe(1)
        chain = []
        while frame is not None:
            if Path(frame.f_code.co_filename).parent == ROOT:
                chain.append(frame.f_code.co_qualname)
            frame = frame.f_back
        names.append(chain[: chain.index("FlowVocoder.forward")])
        return conv2d(*arguments, **options)

    torch.nn.functional.conv2d = note
    try:
        model(*random_input(model))
    finally:
        torch.nn.functional.conv2d = conv2d
    assert max(map(len, names)) == 4
    assert ["Conv.forward", "EstimatorLayer.forward", "Estimator.forward", "Flow.forward"] in names


# Docstrings begin with a noun or a verb, and so say what a thing is or does.
OTHER_WORDS = "That Those Of As What Where How Why Whether Within In Which When While From By On For To With Without It"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_docstrings_begin_with_a_noun_or_a_verb(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        name = getattr(node, "name", "the room")
        if not name.startswith("_") and (text := ast.get_docstring(node)):
            first, line = text.split(maxsplit=1)[0].rstrip(",:;"), text.splitlines()[0]
            assert first not in OTHER_WORDS.split() and not text.startswith("The same "), f"{name}: {line}"
