"""The layers of the package, read from its source: who may import whom, and what."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

import imagenet_swa

PACKAGE = Path(imagenet_swa.__file__).parent
MAX_LINES = 350

# From low to high. A module imports from lower layers only, never from its own.
LAYERS = [
    ["config.errors"],
    ["config.network", "config.data", "config.training", "config.safety"],
    ["config.__init__"],
    [
        *("__init__", "files", "plain", "status", "schedule", "vgg", "lock"),
        *("analysis.__init__", "analysis.significance", "analysis.widths"),
        *("data.__init__", "data.imagenet", "data.cifar", "data.native.__init__"),
        *("data.sampling", "data.buffers", "data.streams", "selftest.whole"),
    ],
    [
        *("libraries", "optim", "sameness", "stop", "watch", "outbox", "weight_files", "arguments"),
        *("bench.alternatives", "report.paper", "report.runs"),
        *("data.storage", "data.resize", "data.restart", "data.findings", "data.workers"),
        *("selftest.__init__", "selftest.tally"),
    ],
    [
        *("runtime", "models", "report.groups", "report.plots", "report.tables"),
        *("analysis.landscape_plots", "analysis.average_plots", "selftest.blows"),
        *("data.tars", "data.lists"),
    ],
    [
        *("agreement", "averaging", "batchnorm", "ending", "plan", "records", "rehearsal", "report.document", "analysis.vectors"),
        *("data.index", "data.prepare.labels"),
    ],
    ["checkpoint", "report.findings", "report.gains", "report.summary_tables", "data.batch", "data.encoded", "data.shards"],
    [
        *("evaluate", "stepper", "report.single", "report.summary", "analysis.captures"),
        *("data.prepare.copies", "data.crops", "data.synthetic", "data.sources"),
    ],
    [
        *("engine", "results", "report.__init__", "analysis.soups"),
        *("data.dali_pipeline", "data.torch_loader", "data.examine", "data.index_cache", "data.prepare.parquet"),
    ],
    ["data.dali", "data.prepare.cifar", "bench.results", "study"],
    ["data.loaders", "data.verify", "data.prepare.archives", "bench.measure"],
    ["session", "bench.__init__", "data.prepare.units"],
    ["state", "doctor", "analysis.answers", "analysis.points", "data.prepare.journal", "data.prepare.report"],
    ["run", "bench.trainee", "analysis.averages", "analysis.ensemble", "analysis.landscape", "data.prepare.__init__"],
    ["finetune", "bench.saving", "bench.agreeing", "selftest.compare", "selftest.small_run", "selftest.ranks"],
    ["bench.safety_results", "selftest.campaign"],
    ["bench.safety"],
    ["cli"],
    ["train", "__main__", "selftest.mother"],
]
LAYER_OF = {module: number for number, layer in enumerate(LAYERS) for module in layer}
WITHOUT_TORCH = [
    *[module for module in chain(*LAYERS[:4]) if module != "vgg"],
    *("cli", "study"),
    *("data.storage", "data.index", "data.sources", "data.index_cache", "data.encoded", "data.resize", "data.restart"),
    *("data.crops", "data.shards", "data.examine", "data.findings", "data.verify"),
    *[module for module in chain(*LAYERS) if module.startswith(("data.prepare.", "report."))],
    "data.workers",
]
HEAVY = ("torch", "torchvision", "timm", "accelerate")


def module_files() -> dict[str, Path]:
    """Every module of the package by its name below `imagenet_swa`."""
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def syntax_tree(path: Path) -> ast.Module:
    """A file as Python reads it."""
    return ast.parse(path.read_text())


def imported_names(path: Path, *, at_import_time_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports: `from a import b` gives a.b, which may be a module or something in one."""
    skipped = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda) if at_import_time_only else ()
    waiting: list[ast.AST] = [syntax_tree(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting += [child for child in ast.iter_child_nodes(node) if not isinstance(child, skipped)]


def imported_modules(path: Path) -> set[str]:
    """The package's own modules that a file imports, by the names that LAYERS uses."""
    modules = set()
    for name in imported_names(path):
        if name.split(".")[0] == "imagenet_swa":
            inner = name.removeprefix("imagenet_swa").removeprefix(".")
            outer = inner.rpartition(".")[0]
            candidates = (inner, f"{inner}.__init__", outer, f"{outer}.__init__", "__init__")
            modules.add(next(candidate for candidate in candidates if candidate in LAYER_OF))
    return modules


def imports_package(path: Path, package: str, **how: bool) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in imported_names(path, **how))


def importers_of(package: str) -> set[str]:
    return {module for module, path in module_files().items() if imports_package(path, package)}


def test_every_module_has_a_layer_and_every_layer_its_modules():
    """The list of layers above names each module once, and no module that does not exist."""
    assert set(module_files()) == set(LAYER_OF)
    assert len(LAYER_OF) == sum(map(len, LAYERS))


@pytest.mark.parametrize("module", LAYER_OF)
def test_imports_go_to_lower_layers_only(module: str):
    """A module imports, at its top or inside its functions, only from layers below its own."""
    wrong = {other for other in imported_modules(module_files()[module]) if LAYER_OF[other] >= LAYER_OF[module]}
    assert not wrong, f"{module} imports {sorted(wrong)}, which are not below it"


def test_the_reading_of_imports_sees_what_is_there():
    """The checks above rest on finding imports: those of some modules as a reader sees them."""
    files = module_files()
    assert imported_modules(files["data.index"]) == {"config.__init__", "files", "plain", "data.imagenet", "data.storage"}
    assert imported_modules(files["averaging"]) == {"models"}
    assert "data.native.__init__" in imported_modules(files["data.resize"])
    assert imported_modules(files["cli"]) >= {"__init__", "config.__init__", "finetune", "report.__init__", "doctor"}
    assert imported_modules(files["data.loaders"]) >= {"data.dali", "data.torch_loader"}
    assert imported_modules(files["schedule"]) == {"config.__init__", "config.training"}


@pytest.mark.parametrize("module", WITHOUT_TORCH)
@pytest.mark.parametrize("package", HEAVY)
def test_light_modules_import_nothing_heavy(module: str, package: str):
    """What reads and checks data, settings, facts and reports never import torch, timm, accelerate; the command line not at its
    top.
    """
    assert not imports_package(module_files()[module], package, at_import_time_only=module == "cli")


def test_light_modules_load_nothing_heavy():
    """A fresh Python that imported all of them, the parser used, has loaded neither torch nor timm nor accelerate nor DALI."""
    names = ["imagenet_swa" + f".{name}".replace(".__init__", "") for name in WITHOUT_TORCH]
    program = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        "from imagenet_swa.cli import main\nassert main([]) == 2\nassert main(['train', '--sede=1']) == 2\n"
        f"print([name for name in {[*HEAVY, 'nvidia.dali', 'matplotlib']} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_packages_import_nothing():
    """Importing a module brings in no other through the packages that it lies in."""
    for module in ("__init__", "data.__init__"):
        assert not list(imported_names(module_files()[module]))


@pytest.mark.parametrize(
    ("package", "modules"),
    [
        ("nvidia", {"data.dali", "data.dali_pipeline", "doctor", "bench.alternatives"}),
        ("jsonargparse", {"arguments"}),
        ("accelerate", {"runtime"}),
        ("timm", {"libraries", "models", "state"}),
        ("matplotlib", {"report.plots", "analysis.average_plots", "analysis.landscape_plots", "bench.results"}),
        (
            "PIL",
            {
                "data.torch_loader",
                "data.encoded",
                "data.examine",
                "data.prepare.__init__",
                "data.prepare.copies",
                "data.prepare.cifar",
                "selftest.small_run",
            },
        ),
        ("ctypes", {"data.native.__init__", "data.resize", "data.restart", "data.buffers"}),
        ("scipy", {"data.prepare.labels", "analysis.significance"}),
    ],
)
def test_a_library_has_its_module(package: str, modules: set[str]):
    """DALI, the parser, Accelerate, timm, plots, PIL, C code and SciPy are known to the modules whose duty they are, no other."""
    assert importers_of(package) == modules


def test_dali_is_imported_only_when_needed():
    """The program runs without DALI: only data.dali and its pipeline import it at the top, and nobody imports them there."""
    for module, path in module_files().items():
        if module not in ("data.dali", "data.dali_pipeline"):
            assert not imports_package(path, "nvidia", at_import_time_only=True), module
            assert not imports_package(path, "imagenet_swa.data.dali", at_import_time_only=True), module


def test_files_are_short():
    """No file is longer than a reader can keep in mind."""
    lengths = {name: len(path.read_text().splitlines()) for name, path in module_files().items()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_every_module_says_what_it_is_for():
    """Each file begins with a docstring."""
    for name, path in module_files().items():
        assert ast.get_docstring(syntax_tree(path)), name
