"""Which module imports which, read from the code: inside functions, for types alone and by a module's name, too."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

Arrows = Mapping[str, Mapping[str, int]]
"""By module: the modules that it imports, and on which line."""


def arrows(root: Path, *packages: str) -> Arrows:
    """Of all modules of the packages under `root`, the imports of each other."""
    files = {_name(path.relative_to(root)): path for package in packages for path in (root / package).rglob("*.py")}
    found: dict[str, dict[str, int]] = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found[module] = {}
        tree = ast.parse(path.read_text())
        named = ((name, line) for name, line in _named(tree) if name in files)
        for target, line in (*_imports(tree, package), *named):
            known = next((name for name in (target, target.rpartition(".")[0]) if name in files), None)
            if known is not None and known != module:
                found[module].setdefault(known, line)
    return found


def cycle(graph: Arrows) -> list[str]:
    """Modules that import each other in a ring, the first one again at its end; empty where there is none."""
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for target in graph.get(module, ()):
                if ring := follow(target, [*path, module]):
                    return ring
            done.add(module)
        return []

    return next((ring for module in graph if (ring := follow(module, []))), [])


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.Module, package: str) -> Iterator[tuple[str, int]]:
    """What could be a module: `from a import b` is a.b, or a where b is no module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def _named(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Dotted names, of which those of modules are imports, too: a.b after `import a`, "a.b" for importlib or -m."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node), node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            yield node.value, node.lineno
