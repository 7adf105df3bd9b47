"""The rules of the house: who may import whom, without circles, and one door for each foreign library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Package -> packages of ours that it may import.
LADDER = {
    "protos": set(),
    "networks": set(),
    "teacher_service": {"networks", "protos"},
    "edge_agent": {"networks", "protos"},
    "benchmarks": {"benchmarks", "edge_agent", "networks", "protos", "teacher_service"},
}

# (package, library) -> the modules that may import it; a package without a row may import it anywhere.
DOORS = {
    ("edge_agent", "grpc"): {"edge_agent.kserve", "edge_agent.teacher"},
    ("edge_agent", "tritonclient"): {"edge_agent.kserve", "edge_agent.kserve_reading"},
    ("edge_agent", "rich"): {"edge_agent.console"},
    ("edge_agent", "structlog"): set(),
    ("edge_agent", "sqlalchemy"): set(),
    ("teacher_service", "grpc"): {
        "teacher_service.auth",
        "teacher_service.health",
        "teacher_service.interceptors",
        "teacher_service.server",
        "teacher_service.tls",
        "teacher_service.cli",
        "teacher_service.ledger_remote",
    },
    ("teacher_service", "grpc_health"): {
        "teacher_service.health",
        "teacher_service.server",
        "teacher_service.cli",
    },
    ("teacher_service", "grpc_reflection"): {"teacher_service.server"},
    ("teacher_service", "sqlalchemy"): {
        "teacher_service.ledger_sql",
        "teacher_service.ledger_store",
        "teacher_service.ledger_tables",
        "teacher_service.migrations",
        "teacher_service.migrations.versions.v0001_ledger",
        "teacher_service.migrations.versions.v0002_grants_and_pruning",
        "teacher_service.migrations.versions.v0003_terms",
    },
    ("teacher_service", "alembic"): {
        "teacher_service.migrations",
        "teacher_service.migrations.env",
        "teacher_service.migrations.versions.v0001_ledger",
        "teacher_service.migrations.versions.v0002_grants_and_pruning",
        "teacher_service.migrations.versions.v0003_terms",
    },
    ("teacher_service", "prometheus_client"): {"teacher_service.metrics"},
    ("teacher_service", "tritonclient"): {"teacher_service.kserve", "teacher_service.server"},
    ("teacher_service", "torch"): {"teacher_service.torch_engine"},
    ("teacher_service", "rich"): set(),
    ("teacher_service", "PIL"): set(),
    ("edge_agent", "PIL"): {"edge_agent.data"},
    ("networks", "grpc"): set(),
    ("networks", "rich"): set(),
    ("protos", "torch"): set(),
    ("protos", "PIL"): {"protos.mosaic"},
}
ENVIRONMENT_READERS = {"teacher_service.cli", "teacher_service.cli_parts", "edge_agent.cli"}
GENERATED = ("_pb2", "_pb2_grpc")


def modules_of(package: str) -> dict[str, ast.Module]:
    """Module name -> syntax tree, the generated ones left out."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        if path.stem.endswith(GENERATED):
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text("utf-8"))
    return found


def names_imported(node: ast.AST) -> list[str]:
    """Every dotted name that an import statement may load: of ``from a import b``, both ``a`` and ``a.b``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide who is imported"
        module = node.module or ""
        return [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return []


def imports(tree: ast.AST) -> set[str]:
    """Whatever is imported anywhere in a module, inside functions too."""
    return {name for node in ast.walk(tree) for name in names_imported(node)}


def imports_on_loading(tree: ast.Module) -> set[str]:
    """What is imported when the module is loaded: not inside functions, not for type checkers alone."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        found.update(names_imported(node))
        waiting.extend(ast.iter_child_nodes(node))
    return found


def ladder_broken(package: str, modules: dict[str, ast.Module]) -> list[str]:
    allowed = LADDER[package] | {package}
    return [
        f"{module} imports {name}"
        for module, tree in modules.items()
        for name in sorted(imports(tree))
        if name.partition(".")[0] in LADDER and name.partition(".")[0] not in allowed
    ]


def circle(modules: dict[str, ast.Module]) -> list[str]:
    """Modules that import each other in a circle; empty where there is none."""
    edges = {module: imports_on_loading(tree) & modules.keys() - {module} for module, tree in modules.items()}
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for other in sorted(edges[module]):
                if found := walk(other, [*path, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in modules if (found := walk(module, []))), [])


def doors_broken(package: str, modules: dict[str, ast.Module]) -> list[str]:
    return [
        f"{module} imports {library}"
        for (owner, library), doors in DOORS.items()
        if owner == package
        for module, tree in modules.items()
        if module not in doors and any(name.partition(".")[0] == library for name in imports(tree))
    ]


def environment_readers(modules: dict[str, ast.Module]) -> set[str]:
    readers = set()
    for module, tree in modules.items():
        for node in ast.walk(tree):
            reads = isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "putenv", "environb"}
            if reads or any(name in {"os.environ", "os.getenv"} for name in names_imported(node)):
                readers.add(module)
    return readers


EVERY_PACKAGE = pytest.mark.parametrize("package", sorted(LADDER))


def test_every_package_of_ours_is_on_the_ladder() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"tests"} == set(LADDER)


@EVERY_PACKAGE
def test_imports_go_down_the_ladder_only(package: str) -> None:
    assert ladder_broken(package, modules_of(package)) == []


@EVERY_PACKAGE
def test_no_package_imports_itself_in_a_circle(package: str) -> None:
    assert circle(modules_of(package)) == []


@EVERY_PACKAGE
def test_foreign_libraries_come_in_by_their_doors(package: str) -> None:
    assert doors_broken(package, modules_of(package)) == []


def test_every_door_is_in_use() -> None:
    for (package, library), doors in DOORS.items():
        modules = modules_of(package)
        for door in doors:
            assert any(name.partition(".")[0] == library for name in imports(modules[door])), f"{door}: {library}"


@pytest.mark.parametrize("package", ["protos", "networks", "teacher_service", "edge_agent"])
def test_only_the_command_lines_read_the_environment(package: str) -> None:
    assert environment_readers(modules_of(package)) <= ENVIRONMENT_READERS


def test_nothing_of_ours_imports_the_tests() -> None:
    for package in LADDER:
        assert not [
            name for tree in modules_of(package).values() for name in imports(tree) if name.startswith("tests")
        ]


@pytest.mark.parametrize(
    "module",
    [
        "protos.codec",
        "protos.errors",
        "protos.mekd.v1.teacher_inference_pb2_grpc",
        "protos.mekd.v1.quota_ledger_pb2_grpc",
        "teacher_service.batcher",
        "teacher_service.engine",
        "teacher_service.ledger",
        "teacher_service.ledger_memory",
        "teacher_service.ledger_sql",
        "teacher_service.ledger_store",
        "teacher_service.inference",
        "teacher_service.kserve",
        "teacher_service.server",
        "teacher_service.cli",
        "teacher_service.admin_cli",
    ],
)
def test_money_and_wire_do_not_load_torch_even_through_others(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


# --- the checks themselves can fail ---


def parsed(**sources: str) -> dict[str, ast.Module]:
    return {name.replace("__", "."): ast.parse(source) for name, source in sources.items()}


@pytest.mark.parametrize(
    "source",
    [
        "import edge_agent.journal",
        "from edge_agent import journal",
        "def late():\n    import edge_agent",
        "try:\n    import benchmarks.demo\nexcept ImportError:\n    pass",
    ],
)
def test_the_ladder_check_sees_a_step_up(source: str) -> None:
    assert len(ladder_broken("teacher_service", parsed(teacher_service__x=source))) >= 1


def test_the_circle_check_sees_a_circle_and_only_those_on_loading() -> None:
    assert circle(parsed(p__a="from p import b", p__b="import p.c", p__c="from p.a import x")) == [
        "p.a",
        "p.b",
        "p.c",
        "p.a",
    ]
    assert circle(parsed(p__a="from p import b", p__b="def late():\n    import p.a")) == []
    assert circle(parsed(p__a="from p import b, c", p__b="import p.c", p__c="")) == []


def test_the_door_check_sees_a_second_door() -> None:
    assert doors_broken("edge_agent", parsed(edge_agent__teacher="import grpc", edge_agent__x="")) == []
    for source in ("import grpc.aio", "from grpc import aio", "def late():\n    import grpc"):
        assert doors_broken("edge_agent", parsed(edge_agent__x=source)) == ["edge_agent.x imports grpc"]


@pytest.mark.parametrize(
    "source", ["import os\nos.environ['X']", "from os import environ", "import os\nos.getenv('X')"]
)
def test_the_environment_check_sees_a_reader(source: str) -> None:
    assert environment_readers(parsed(p__x=source)) == {"p.x"}
