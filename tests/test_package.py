"""The package itself: its public names, who imports whom, and what a wheel holds."""

from __future__ import annotations

import ast
import logging
import os
import pathlib
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points

import pytest
import torch

import grass_compile
from grass_compile.passes.pipeline import PASSES

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "grass_compile"
PRIVATE = ("_aot", "_autograd", "_described", "_dynamo", "_fsdp", "_inductor", "_simulate")
LEAVES = (
    "_version", "errors", "checks", "keywords", "config", "report",
    *(f"distributed.{name}" for name in ("collectives", "crossed", "layout", "moving")), *PRIVATE,
)  # fmt: skip
MATH_OPERATORS = ("ops.once", "ops.rank_update", "ops.row_update")
ALLOWED = {
    "_autograd": (), "_dynamo": (), "_fsdp": (), "_inductor": (), "_aot": ("_autograd", "_dynamo", "_inductor"),
    "_described": (), "_simulate": ("_aot", "_described"),
    "_version": (), "errors": (), "report": ("errors",), "checks": ("errors",),
    "keywords": ("errors", "checks"),
    "config": ("errors", "checks", "keywords", "distributed.layout"),
    "distributed": ("_fsdp", "errors", "checks", "distributed"),
    "math": (*LEAVES, "math", *MATH_OPERATORS),
    "ops": (*LEAVES, "math", "ops"),
    "passes": (*LEAVES, "math", "ops", "passes"),
    "runtime": (*LEAVES, "distributed", "math", "ops", "runtime"),
    "optim": (*LEAVES, "math", "ops", "runtime", "optim"),
    "backend": (*LEAVES, "distributed", "math", "ops", "passes", "runtime", "optim", "backend"),
    "planner": (*LEAVES, "explain", "ops", "passes", "runtime", "optim", "backend", "planner"),
    "cli": (*LEAVES, "planner", "cli"),
}  # fmt: skip
"""What each part may import. The step is traced with the operators that it ends in."""


def imports(path: pathlib.Path) -> set[str]:
    """The modules of ours that a file imports, relative to the package, for type checking included."""
    here = path.relative_to(PACKAGE).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level], *(node.module or "").split(".")]
            base = [part for part in base if part]
            for alias in node.names:
                is_module = any(
                    (PACKAGE.joinpath(*base) / name).exists() for name in (f"{alias.name}.py", f"{alias.name}/__init__.py")
                )
                found.add(".".join([*base, alias.name] if is_module or not node.module else base))
    return found


def test_no_circles() -> None:
    """No file imports another that imports it in turn, in however many steps."""
    files = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): imports(path) for path in PACKAGE.rglob("*.py")}
    files = {name.removesuffix(".__init__"): found - {name.removesuffix(".__init__")} for name, found in files.items()}
    order: list[str] = []
    while ready := [name for name, found in files.items() if name not in order and not (found & files.keys()) - set(order)]:
        order += ready
    assert sorted(set(files) - set(order)) == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_import_direction(path: pathlib.Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part not in ALLOWED:
        return
    for module in imports(path):
        assert any(module == allowed or module.startswith(allowed + ".") for allowed in ALLOWED[part]), (part, module)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_torch_names_stay_in_their_files(path: pathlib.Path) -> None:
    if path.stem in PRIVATE:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        private = [m for m in modules if m.startswith("torch") and any(part.startswith("_") for part in m.split("."))]
        assert set(private) <= {"torch._subclasses.fake_tensor", "torch.utils._python_dispatch"}, private  # extension points


def test_nothing_imports_through_the_links() -> None:
    assert (ROOT / "passes").resolve() == PACKAGE / "passes" and (ROOT / "runtime").resolve() == PACKAGE / "runtime"
    for folder in ("grass_compile", "tests", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert not [name for name in names if name.split(".")[0] in ("passes", "runtime")], path


def test_public_names() -> None:
    names = {name for name in vars(grass_compile) if not name.startswith("_")}
    optimizers = {"Adafactor", "AdamW", "AdamW8bit", "Apollo", "Lion", "Muon", "Optimizer", "Rule", "SGD", "Sketchy"}
    errors = {"ConfigError", "GrassError", "GrassWarning", "GraphError", "NonFiniteError", "StateError"}
    public = {*optimizers, *errors, "Plan", "Report", "explain", "param_groups", "plan", "register_rule", "train_step"}
    modules = {
        "backend",
        "checks",
        "cli",
        "conformance",
        "distributed",
        "config",
        "errors",
        "explain",
        "keywords",
        "math",
        "ops",
        "optim",
        "passes",
        "planner",
        "report",
        "runtime",
    }
    assert public <= names and names <= public | modules | {"runtime"}
    assert (PACKAGE / "py.typed").exists()


def test_backend_is_found_without_an_import() -> None:
    assert [point.value for point in entry_points(group="torch_dynamo_backends", name="grass")] == ["grass_compile.backend:grass"]
    code = "import torch; print('grass' in torch.compiler.list_backends())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "True"


def test_wheel_holds_nothing_but_the_package(tmp_path: pathlib.Path) -> None:
    build = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed here")
    (path,) = build.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    tops = {name.split("/")[0] for name in zipfile.ZipFile(path).namelist()}
    assert tops == {"grass_compile", f"grass_compile-{grass_compile.__version__}.dist-info"}
    assert {"grass_compile/py.typed", "grass_compile/cli/explain.html.jinja"} <= set(zipfile.ZipFile(path).namelist())


def test_names_of_passes_are_their_modules() -> None:
    modules = {path.stem for folder in ("joint", "backward") for path in (PACKAGE / "passes" / folder).glob("*.py")}
    assert set(PASSES) <= modules


def test_logs_and_trace(tmp_path: pathlib.Path) -> None:
    code = """
import torch, grass_compile
model = torch.nn.Linear(16, 16)
optimizer = grass_compile.AdamW(model.named_parameters(), rank=4, preset="paper", step_in_backward=True)
compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
compiled(torch.randn(3, 16)).sum().backward()
optimizer.step()
optimizer.zero_grad()
with optimizer.accumulate():
    compiled(torch.randn(3, 16)).sum().backward()
optimizer.step()
"""
    environment = {**os.environ, "TORCH_LOGS": "+grass_compile", "TORCH_TRACE": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    for line in (
        "compiling: 1 weights projected",
        "detect: 1 weights projected, 0 dense",
        "rewrite: 1 weight gradients made compact",
        "forward: 1 of 1 weights choose new rows",
        "lower_anchors: 1 weights, 1 step",
        "forward: 0 of 1 weights choose new rows",
        "lower_anchors: 1 weights, 1 keep",
        "compiling a step: rank 4 along dimension",
    ):
        assert line in run.stderr
    trace = "".join(path.read_text() for path in tmp_path.iterdir())
    for name in ("grass_joint_before", "grass_joint_after", "grass_forward", "grass_backward"):
        assert f'"{name}"' in trace


def test_silence_without_logs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="grass_compile"):
        model = torch.nn.Linear(16, 16)
        optimizer = grass_compile.AdamW(model.named_parameters(), rank=4)
        torch.compile(model, backend="grass", options={"compiler": "aot_eager"})(torch.randn(3, 16)).sum().backward()
        optimizer.step()
    assert not caplog.records
