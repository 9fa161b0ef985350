"""Every way to leave out or weaken one operation that orders memory in the kernels: each must be noticed."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from triton.runtime.jit import JITFunction

from tests.emulator.emulator import Key, key_of

_ORDERING = {"wait", "arrive", "expect", "fence_async_shared", "store_wait", "mbarrier_arrive"}


@dataclass(frozen=True)
class PlantedFault:
    """A function of a kernel in which one operation is changed, in words and as code."""

    function: Callable
    description: str
    changed: types.FunctionType

    @property
    def replaced(self) -> dict[Key, Callable]:
        return {key_of(self.function): self.changed}

    def __str__(self) -> str:
        return f"{self.function.__name__}: {self.description}"


def functions_of(kernel: JITFunction) -> list[types.FunctionType]:
    """A kernel's function and those that it calls, directly or not."""
    found: list[types.FunctionType] = []
    new = [kernel.fn]
    while new:
        function = new.pop()
        if function not in found:
            found.append(function)
            called = (function.__globals__.get(name) for name in function.__code__.co_names)
            new += [other.fn for other in called if isinstance(other, JITFunction)]
    return found


def faults_in(function: types.FunctionType) -> Iterator[PlantedFault]:
    """The faults of one function; of several that read alike, the later ones are numbered."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    nodes = list(ast.walk(tree))
    seen: Counter[str] = Counter()
    for number, node in enumerate(nodes):
        for what, change in _changes(node):
            changed_tree = copy.deepcopy(tree)
            change(list(ast.walk(changed_tree))[number])
            description = f"{what} `{ast.unparse(node)}`"
            seen[description] += 1
            if seen[description] > 1:
                description += f" #{seen[description]}"
            yield PlantedFault(function, description, _compile(ast.fix_missing_locations(changed_tree)))


def _compile(tree: ast.Module) -> types.FunctionType:
    names: dict[str, types.FunctionType] = {}  # annotations stay strings, as in this file
    exec(compile(tree, "fault", "exec"), names)
    return next(value for value in names.values() if isinstance(value, types.FunctionType))


def _changes(node: ast.AST) -> Iterator[tuple[str, Callable[[ast.AST], None]]]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _name(node.value) in _ORDERING:
        yield "without", _leave_out
    if isinstance(node, ast.Call) and _name(node) == "wait":
        yield "the other phase in", lambda call: _rewrite(call.args, 1, "({}) ^ 1")
    if isinstance(node, ast.Call) and _name(node) == "store_wait":
        yield "one store more in flight in", lambda call: _rewrite(call.args, 0, "({}) + 1")
    if isinstance(node, ast.Call) and _name(node) == "warpgroup_mma_wait":
        yield "one product more in flight in", _add_to_outstanding


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _leave_out(statement: ast.Expr) -> None:
    statement.value = ast.Constant(None)


def _rewrite(arguments: list[ast.expr], number: int, form: str) -> None:
    arguments[number] = ast.parse(form.format(ast.unparse(arguments[number])), mode="eval").body


def _add_to_outstanding(call: ast.Call) -> None:
    keyword = next(keyword for keyword in call.keywords if keyword.arg == "num_outstanding")
    values = [keyword.value]
    _rewrite(values, 0, "({}) + 1")
    keyword.value = values[0]
