"""A test in the style of HumanEval or MBPP, made harder to fool by the code that it tests.

`Checks(text, entry_point).run(names)` runs the test against the names of a solution. The test is
rewritten: every comparison goes through `_compare`, every assert reports that it held. Writes
nothing.
"""

from __future__ import annotations

import ast
import builtins
import operator
import reprlib
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

BUILTINS = dict(vars(builtins))  # as they were before foreign code ran
__builtins__ = dict(BUILTINS)  # where the functions below look: no program can reach it by name
FILENAME = "test.py"
MAX_TEXT = 300

_ATOMS = {int, float, complex, bool, str, bytes, bytearray, type(None), range, type(...), slice}
_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
_CONTAINERS = (list, tuple, set, frozenset, deque, *_VIEWS)
# Methods by which an object can answer a comparison, or the arithmetic before one, as it likes.
_DECIDING = frozenset(
    f"__{name}__"
    for name in "eq ne lt le gt ge contains abs round float int complex index neg pos invert "
    "add sub mul matmul truediv floordiv mod divmod pow and or xor lshift rshift "
    "radd rsub rmul rmatmul rtruediv rfloordiv rmod rdivmod rpow rand ror rxor".split()
)
_NUMERIC_CALLS = frozenset("abs round float int complex sum min max pow divmod".split())
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made while running, not compiled into the interpreter
_OPERATORS: dict[str, Callable] = {
    "Eq": operator.eq,
    "NotEq": operator.ne,
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
    "In": lambda a, b: a in b,
    "NotIn": lambda a, b: a not in b,
}


_Nodes = list[ast.AST]
_DEFINITIONS = (
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef),
    *(ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Pass),
)


class Fault(Exception):
    """The test itself cannot be used, whatever the solution: its author has to act."""


class Failed(Exception):
    """A check did not hold; the message says which."""


class Checks:
    """A test, compiled before the solution runs; `num_held` counts the asserts that held."""

    def __init__(self, text: str, entry_point: str | None):
        self.text, self.entry_point = text, entry_point
        tree = _parse(text)
        functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "check"]
        self.has_check = bool(functions)
        nodes = list(_walk_code(tree))
        self.sites = [n for n in nodes if isinstance(n, ast.Assert)]
        _require_checks(tree, nodes, self.has_check, entry_point)
        numbers = {id(node): i for i, node in enumerate(self.sites)}
        required = [*_certain(tree.body), *(_certain(functions[-1].body) if functions else ())]
        self.required = {numbers[id(node)] for node in required}
        self.used = {n.id for n in nodes if isinstance(n, ast.Name)}
        self.shadows = _shadows(nodes, entry_point)
        self.modules = _import_all(nodes)
        self.code = _rewrite(tree, nodes, numbers)
        self.held: set[int] = set()
        self.num_held = 0
        self.compared: tuple | None = None
        self.exempt: frozenset = frozenset()

    def run(self, names: dict) -> None:
        """Run the test against the solution's names; Failed, or what the code raised."""
        space = self._namespace(names)
        exec(self.code, space)
        if self.has_check:
            if self.entry_point not in names:
                raise NameError(f"name {self.entry_point!r} is not defined")
            space["check"](names[self.entry_point])
        missing = sorted(self.required - self.held)
        if missing:
            raise Failed(f"{self._source(missing[0])}: skipped")

    def where(self, error: BaseException) -> str:
        """The line of the test in which an exception came up; empty when it was outside."""
        trace, line = error.__traceback__, 0
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == FILENAME:
                line = trace.tb_lineno
            trace = trace.tb_next
        lines = self.text.splitlines()
        return lines[line - 1].strip()[:MAX_TEXT] if 0 < line <= len(lines) else ""

    def _namespace(self, names: dict) -> dict:
        """The solution's names, but Python's own builtins and untouched modules for the test."""
        space = {}
        for name, value in names.items():
            special = name.startswith("__") and name.endswith("__")
            if special or (name in BUILTINS and name not in self.shadows):
                continue
            module = isinstance(value, types.ModuleType) and self.modules.get(value.__name__)
            space[name] = module or value
        self.exempt = frozenset(
            value for name in self.used if isinstance(value := space.get(name), type)
        )
        own = {**BUILTINS, "__import__": _importer(self.modules)}
        space.update({"__builtins__": own, "__name__": "test", "__file__": FILENAME})
        space.update({"__held__": self._hold, "__compare__": self._compare})
        space.update({"__operand__": self._operand, "__operands__": self._deep_operand})
        return space

    def _hold(self, site: int, value: object) -> bool:
        if not value:
            raise Failed(self._describe(site))
        self.held.add(site)
        self.num_held += 1
        self.compared = None
        return True

    def _compare(self, name: str, left: object, right: object) -> object:
        """`left OP right`, unless one of them would decide that for itself."""
        deciding = self._deciding(left) or self._deciding(right)
        if deciding and type(left) is not type(right):
            raise Failed(_refusal(deciding))
        self.compared = (left, right)
        return _OPERATORS[name](left, right)

    def _operand(self, value: object) -> object:
        if self._decides(type(value)):
            raise Failed(_refusal(type(value)))
        return value

    def _deep_operand(self, value: object) -> object:
        deciding = self._deciding(value)
        if deciding:
            raise Failed(_refusal(deciding))
        return value

    def _deciding(self, value: object) -> type | None:
        """The type within `value` that brings its own comparison or arithmetic, if one does."""
        for item in _walk(value):
            if type(item) not in _ATOMS and self._decides(type(item)):
                return type(item)
        return None

    def _decides(self, kind: type) -> bool:
        if kind in _ATOMS or kind in _CONTAINERS or kind is dict:
            return False
        if not self.exempt.isdisjoint(kind.__mro__):
            return False  # the test names the class: its methods are what is tested
        return any(_is_foreign(cls) for cls in kind.__mro__)

    def _source(self, site: int) -> str:
        text = ast.get_source_segment(self.text, self.sites[site]) or "assert"
        return " ".join(text.split())[:MAX_TEXT]

    def _describe(self, site: int) -> str:
        """The assert, and the values compared last when they are plain."""
        text = self._source(site)
        if self.compared is None or not all(_is_plain(value) for value in self.compared):
            return text
        short = reprlib.Repr()
        short.maxstring = short.maxlong = short.maxother = 80
        try:
            left, right = (short.repr(value) for value in self.compared)
        except ValueError:  # an int of more digits than Python prints
            return text
        return f"{text}: compared {left} with {right}"


def _parse(text: str) -> ast.Module:
    try:
        return ast.parse(text, FILENAME)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Fault(f"the test does not compile: {type(error).__name__}: {error}") from None


def _walk_code(root: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree without the insides of constant lists, which may be a megabyte."""
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        if not _is_data(node):
            stack.extend(ast.iter_child_nodes(node))


def _is_data(node: ast.AST | None) -> bool:
    """Whether a node is a constant, or a list of constants."""
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return all(map(_is_data, node.elts))
    if isinstance(node, ast.Dict):
        return all(map(_is_data, node.keys)) and all(map(_is_data, node.values))
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.operand, ast.Constant)
    return isinstance(node, ast.Constant)


def _require_checks(tree: ast.Module, nodes: _Nodes, has_check: bool, entry: str | None) -> None:
    """A test that checks nothing would pass everything: refuse it."""
    if has_check and entry is None:
        raise Fault("the test defines check(candidate), so entry_point has to name the candidate")
    calls = (n.func for n in nodes if isinstance(n, ast.Call))
    names = [f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in calls]
    if not any(isinstance(n, (ast.Assert, ast.Raise)) for n in nodes) and not any(
        name.startswith("assert") for name in names
    ):
        raise Fault("the test checks nothing: it holds no assert")
    if not has_check and not any(_acts(statement) for statement in tree.body):
        raise Fault("the test only defines names, so nothing would run; call what checks")


def _acts(statement: ast.stmt) -> bool:
    """Whether a statement at the top of a test may check something."""
    if isinstance(statement, ast.If):  # if __name__ == "__main__", which it never is
        return "__name__" not in {n.id for n in ast.walk(statement.test) if isinstance(n, ast.Name)}
    return not isinstance(statement, _DEFINITIONS) and not (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def _certain(body: list[ast.stmt]) -> Iterator[ast.Assert]:
    """The asserts that a run to the end of `body` has to pass."""
    for statement in body:
        if isinstance(statement, ast.Assert):
            yield statement
        elif any(isinstance(n, (ast.Return, ast.Yield)) for n in _walk_code(statement)):
            return


def _shadows(nodes: _Nodes, entry_point: str | None) -> set[str]:
    """Builtin names that the test means to take from the solution: MBPP has a `sum` of its own."""
    if entry_point is not None:
        return {entry_point}
    called = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    return set() if called - BUILTINS.keys() else called


def _import_all(nodes: _Nodes) -> dict[str, types.ModuleType]:
    """Copies, made before the solution runs, of the modules that the test imports."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    copies = {}
    for name in sorted(names):
        try:
            __import__(name)
        except Exception:
            continue  # the test's own import will say so
        for part in (name.partition(".")[0], name):
            copies[part] = types.ModuleType(part)
            vars(copies[part]).update(vars(sys.modules[part]))
    return copies


def _importer(copies: dict[str, types.ModuleType]) -> Callable:
    real = builtins.__import__

    def load(name, globals=None, locals=None, fromlist=(), level=0):  # as __import__ is called
        wanted = name if fromlist else name.partition(".")[0]
        if not level and name in copies:
            return copies[wanted]
        return real(name, globals, locals, fromlist, level)

    return load


def _rewrite(tree: ast.Module, nodes: _Nodes, numbers: dict[int, int]) -> types.CodeType:
    try:
        tree = _Rewriter(nodes, numbers).visit(tree)
        return compile(tree, FILENAME, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Fault(f"the test does not compile: {type(error).__name__}: {error}") from None


class _Rewriter(ast.NodeTransformer):
    """Sends asserts, comparisons, and the arithmetic and numeric calls before them through us."""

    def __init__(self, nodes: _Nodes, numbers: dict[int, int]):
        self.numbers = numbers
        imports = [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
        aliases = [alias for node in imports for alias in node.names]
        self.imported = {(a.asname or a.name).partition(".")[0] for a in aliases}

    def visit(self, node: ast.AST) -> Any:
        return node if _is_data(node) else super().visit(node)

    def visit_Assert(self, node: ast.Assert) -> ast.Assert:
        self.generic_visit(node)
        node.test = _call("__held__", ast.Constant(self.numbers[id(node)]), node.test)
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            return node
        if len(node.ops) == 1:
            name = ast.Constant(type(node.ops[0]).__name__)
            return ast.copy_location(_call("__compare__", name, node.left, *node.comparators), node)
        node.left = _call("__operands__", node.left)
        node.comparators = [_call("__operands__", value) for value in node.comparators]
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.BinOp:
        self.generic_visit(node)
        node.left, node.right = (_guard("__operand__", side) for side in (node.left, node.right))
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.UnaryOp:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Not):
            node.operand = _guard("__operand__", node.operand)
        return node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        function = node.func
        if isinstance(function, ast.Name):
            numeric = function.id in _NUMERIC_CALLS or function.id in self.imported
        else:
            root = function.value if isinstance(function, ast.Attribute) else None
            numeric = isinstance(root, ast.Name) and root.id in self.imported
        if numeric:
            node.args = [
                a if isinstance(a, ast.Starred) else _guard("__operands__", a) for a in node.args
            ]
        return node


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    like = arguments[-1]
    for argument in arguments[:-1]:
        ast.copy_location(argument, argument if hasattr(argument, "lineno") else like)
    function = ast.copy_location(ast.Name(name, ast.Load()), like)
    return ast.copy_location(ast.Call(function, list(arguments), []), like)


def _guard(name: str, value: ast.expr) -> ast.expr:
    return value if isinstance(value, ast.Constant) else _call(name, value)


def _walk(value: object) -> Iterator[object]:
    """A value and everything in the containers it is made of."""
    stack, seen = [value], set()
    while stack:
        item = stack.pop()
        yield item
        kind = type(item)
        if kind in _ATOMS or id(item) in seen:
            continue
        seen.add(id(item))
        for base in _CONTAINERS:
            if base in kind.__mro__:
                stack.extend(base.__iter__(item))  # type: ignore[arg-type]
        if dict in kind.__mro__:
            stack.extend(dict.keys(item))  # type: ignore[arg-type]
            stack.extend(dict.values(item))  # type: ignore[arg-type]


def _is_plain(value: object) -> bool:
    return all(type(x) in _ATOMS or type(x) in _CONTAINERS or type(x) is dict for x in _walk(value))


def _is_foreign(cls: type) -> bool:
    """Whether a class was made by the solution and has a method of its own that decides."""
    if not cls.__flags__ & _HEAP_TYPE or _DECIDING.isdisjoint(vars(cls)):
        return False
    name, path = vars(cls).get("__module__"), cls.__qualname__
    found = sys.modules.get(name) if type(name) is str and name != "solution" else None
    for part in path.split("."):
        found = getattr(found, part, None)
    return found is not cls


def _refusal(kind: type) -> str:
    return f"the result is a {kind.__name__}, which brings its own comparison: not accepted"
