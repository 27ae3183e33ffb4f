"""The import rule of the package: a module imports only from its left, and megatron has a wall."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "prefixrl_mcore"
KERNELS = PACKAGE.parent / "kernels" / "prefixrl_kernels"

LAYERS = (
    {"config", "records"},
    {"data", "rewards", "advantages", "loss", "accounting"},
    {"rollout", "policy", "checkpoint"},
    {"trainer", "eval"},
    {"launch", "report", "commands", "cli", "demo"},
)
"""Parts of the package from left to right; ``observability`` may be imported from anywhere."""


def _imports(path: Path) -> set[str]:
    """Return the dotted names of all modules that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def _part(path: Path) -> str:
    """Return the part of the package that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _layer(part: str) -> int | None:
    return next((index for index, layer in enumerate(LAYERS) if part in layer), None)


def _importers_of(root: str) -> set[str]:
    """Return the parts that import a top-level module."""
    return {
        _part(path)
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == root for name in _imports(path))
    }


def test_every_part_has_a_layer() -> None:
    parts = {_part(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "observability"}
    assert parts == set().union(*LAYERS)


def test_modules_import_only_from_their_left() -> None:
    offenders = []
    for path in PACKAGE.rglob("*.py"):
        own = _layer(_part(path))
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] != "prefixrl_mcore" or len(parts) < 2 or own is None:
                continue
            other = _layer(parts[1])
            if other is not None and other > own:
                offenders.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert offenders == []


def test_megatron_is_imported_only_behind_the_policy_boundary() -> None:
    assert _importers_of("megatron") <= {"policy", "checkpoint"}


def test_sglang_is_imported_nowhere_but_in_rollout() -> None:
    assert _importers_of("sglang") <= {"rollout"}


def test_nemo_run_is_imported_only_by_launch() -> None:
    assert _importers_of("nemo_run") == {"launch"}


def test_torch_stays_out_of_config_records_rewards_and_launch() -> None:
    assert not _importers_of("torch") & {
        "config",
        "records",
        "rewards",
        "launch",
        "commands",
        "cli",
    }


def test_math_verify_is_imported_only_by_rewards() -> None:
    assert _importers_of("math_verify") <= {"rewards"}


def test_the_kernels_import_nothing_of_the_trainer() -> None:
    offenders = [
        path.name
        for path in KERNELS.rglob("*.py")
        if any(name.split(".")[0] in {"prefixrl_mcore", "megatron"} for name in _imports(path))
    ]
    assert offenders == []


def test_the_kernels_folder_is_not_a_package() -> None:
    assert not (KERNELS.parent / "__init__.py").exists()


def test_no_file_is_longer_than_600_lines() -> None:
    too_long = [
        str(path)
        for folder in (PACKAGE, KERNELS)
        for path in folder.rglob("*.py")
        if len(path.read_text().splitlines()) > 600
    ]
    assert too_long == []
