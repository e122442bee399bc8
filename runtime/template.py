"""A checkpoint's chat template: a program by a stranger, run in Jinja's sandbox within limits of its own.

Jinja's sandbox keeps a template away from Python; it does not bound time and memory. Here every operation is charged to
a :class:`_Meter` before it is done, by the size of what it takes: loops by their rounds, operators, filters, tests,
methods and outputs by the characters and elements that they are given. What multiplies (``*``, ``replace``, ``join``,
formats) is computed ahead. Values that share their parts count as often as they would be written out.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from jinja2 import TemplateError, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, _PassArg
from jinja2.visitor import NodeTransformer

from vlmtrim.runtime.errors import RuntimeRefusal

SOURCE = 256 << 10  # characters of a template; the longest that models ship have 20,000
NODES = 20_000  # of its syntax tree
STEPS = 1_000_000  # loop rounds, calls and operators of one rendering
SECONDS = 10.0  # of one rendering; the other limits are reached first, unless the machine is very slow
_WORK = 32  # what a rendering may touch, in multiples of what it may return
_ELEMENT = 16  # what an element of a list costs, in characters
_BITS = 4096  # of an integer
_DEPTH = 64  # of lists in lists
_SMALL = 100  # an indentation, a precision

_METER = " meter"  # names with a space cannot be written in a template
_EACH, _MEASURED, _JOINED = " each", " measured", " joined"
_words = lambda text: frozenset(text.split())  # noqa: E731
_SHALLOW = frozenset({"length", "count", "first", "last", "list", "default", "d", "reverse", "safe"})
_FILTERS = _SHALLOW | _words(
    "abs capitalize dictsort e escape float format indent int items join lower map max min reject rejectattr replace "
    "round select selectattr sort string title tojson trim unique upper"
)
_METHODS: Mapping[type, frozenset[str]] = {
    str: _words(
        "capitalize casefold count endswith find format format_map index isalnum isalpha isascii isdecimal isdigit "
        "islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind "
        "rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"
    ),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    LoopContext: frozenset({"changed", "cycle"}),
}
_ALLOWED = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock),
    *(nodes.FilterBlock, nodes.Scope, nodes.Assign, nodes.AssignBlock, nodes.With, nodes.Break, nodes.Continue),
    *(nodes.Const, nodes.Name, nodes.NSRef, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair, nodes.Keyword),
    *(nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice, nodes.Concat),
    *(nodes.Compare, nodes.Operand, nodes.BinExpr, nodes.UnaryExpr),
)


class ChatTemplate:
    """A compiled template.

    Args:
        text: Jinja, as Hugging Face's chat templates are written.
        limit: most characters that it may return.

    Raises:
        RuntimeRefusal: it is no valid Jinja, too large, or uses what no chat template needs.
    """

    def __init__(self, text: str, limit: int):
        if len(text) > SOURCE:
            raise RuntimeRefusal(f"the bundle's chat template has {len(text)} characters, {SOURCE} are allowed")
        self._limit = limit
        environment = _Environment()
        try:
            tree = environment.parse(text)
            _check(tree)
            self._template = environment.from_string(_Metering().visit(tree))
        except (TemplateError, SyntaxError, ValueError, OverflowError) as error:
            raise RuntimeRefusal(f"the bundle's chat template is not valid Jinja: {_brief(error)}") from error
        except (RecursionError, MemoryError) as error:
            raise RuntimeRefusal(
                "the bundle's chat template is not valid Jinja that fits: it nests too deeply"
            ) from error

    def render(self, **variables: Any) -> str:
        """The template's text. Raises RuntimeRefusal where it fails, refuses the conversation or exceeds a limit."""
        meter = _Meter(self._limit)
        pieces, length = [], 0
        try:
            for piece in self._template.generate({**variables, _METER: meter}):
                length += len(piece)
                if length > self._limit:
                    raise _excess(f"it writes more than the {self._limit} characters that a conversation can hold")
                pieces.append(piece)
        except RuntimeRefusal:
            raise
        except RecursionError as error:
            raise _excess("it nests too deeply") from error
        except MemoryError as error:
            raise _excess("it needs too much memory") from error
        except Exception as error:  # a template is a program; whatever it raises, the bundle's template is at fault
            raise RuntimeRefusal(
                f"the bundle's chat template fails: {type(error).__name__}: {_brief(error)}"
            ) from error
        return "".join(pieces)


def _excess(what: str) -> RuntimeRefusal:
    return RuntimeRefusal(f"the bundle's chat template is refused: {what}")


def _brief(error: BaseException) -> str:
    text = str(error)
    return text if len(text) <= 200 else text[:200] + "..."


class _Meter:
    """What one rendering has used up."""

    def __init__(self, limit: int):
        self.limit = limit
        self._steps, self._work = STEPS, _WORK * limit
        self._end = time.monotonic() + SECONDS

    def step(self) -> None:
        """Charge one operation."""
        self._steps -= 1
        if self._steps < 0 or time.monotonic() > self._end:
            raise _excess(f"one rendering takes more than {STEPS} steps or {SECONDS:g} seconds")

    def most(self, size: int) -> None:
        """Refuse a value that would have ``size`` characters."""
        if size > self.limit:
            raise _excess(f"it makes a value of more than {self.limit} characters")

    def measure(self, *values: Any, deep: bool = True) -> int:
        """Charge one operation on these values; returns their characters, elements counted as several."""
        self.step()
        size, stack = 0, [(value, 0) for value in values]
        while stack:
            value, depth = stack.pop()
            if isinstance(value, str | bytes):
                size += len(value)
            elif isinstance(value, int):
                size += value.bit_length() // 8
            elif (parts := _parts(value)) is not None:
                size += _ELEMENT * len(parts)
                if depth == _DEPTH:
                    raise _excess(f"its lists nest deeper than {_DEPTH}")
                if deep and size <= self.limit and not isinstance(value, range):
                    stack.extend((part, depth + 1) for part in parts)
            if size > self.limit:
                self.most(size)
        self._work -= size
        if self._work < 0:
            raise _excess(
                f"one rendering handles more than {_WORK} times the {self.limit} characters that it may write"
            )
        return size

    def result(self, value: Any) -> Any:
        """Charge what an operation returned; a lazy one is carried out."""
        if isinstance(value, Iterator):
            drawn = []
            for item in value:
                self.step()
                drawn.append(item)
                self.most(_ELEMENT * len(drawn))
            value = drawn
        self.measure(value)
        return value


def _parts(value: Any) -> Any:
    """The elements of a container, None of anything else."""
    if isinstance(value, Namespace):
        value = value._Namespace__attrs  # type: ignore[attr-defined]
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    if isinstance(value, ItemsView | KeysView | ValuesView):
        return list(value)
    return value if isinstance(value, list | tuple | set | frozenset | range) else None


def _multiplied(meter: _Meter, name: str, subject: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a filter, method or operator whose result would be far larger than what it takes."""
    given = [*args, *kwargs.values()]
    if name == "replace":
        texts = [str(part) for part in (subject, *given)[:3]]
        if len(texts) == 3:
            meter.most(len(texts[0]) + texts[0].count(texts[1]) * len(texts[2]))
    elif name == "join":
        between = max((len(part) for part in (subject, *given) if isinstance(part, str)), default=0)
        counts = (len(part) for part in (subject, *given) if hasattr(part, "__len__"))
        meter.most(max(counts, default=0) * between + meter.measure(subject, *given))
    elif name in ("format", "format_map", "%"):
        form = str(subject)
        if re.search(r"\d{3}|\*|:[^{}]*\{", form):
            raise _excess("it formats with a width of more than 99, or a computed one")
        meter.most((form.count("%") + form.count("{")) * (100 + meter.measure(*given)) + len(form))
    elif name in ("indent", "round", "tojson"):
        sizes = [part if isinstance(part, int) else len(part) for part in given if isinstance(part, int | str)]
        if any(abs(size) > _SMALL for size in sizes):
            raise _excess(f"it gives {name} a number above {_SMALL}")
        if name == "indent":
            meter.most(str(subject).count("\n") * _SMALL + len(str(subject)))


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, every operation metered."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, LoopControlExtension],
            finalize=_finalize,
            optimized=False,  # nothing is computed ahead, outside the meter
        )
        known = {**self.filters, "tojson": _tojson}
        self.filters = {name: _metered(known[name], name) for name in _FILTERS}
        self.filters |= {_EACH: _each, _MEASURED: _measured, _JOINED: _joined}
        self.tests = {name: _metered(test, name) for name, test in self.tests.items()}
        self.globals = {
            "range": self.globals["range"],
            "dict": dict,
            "namespace": Namespace,
            "raise_exception": _raise_exception,
        }

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator between two values."""
        meter: _Meter = context.parent[_METER]
        size = meter.measure(left, right)
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "*" and whole and left.bit_length() + right.bit_length() > _BITS:
            raise _excess("it computes with numbers that are too large")
        if operator == "*" and not whole:
            meter.most(size * max((number for number in (left, right) if isinstance(number, int)), default=1))
        if operator == "**" and whole and left.bit_length() * right > _BITS:
            raise _excess("it computes with numbers that are too large")
        if operator == "%" and isinstance(left, str):
            _multiplied(meter, operator, left, (right,), {})
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A function, a macro, or a method of a value."""
        meter: _Meter = __context.parent[_METER]
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if not isinstance(__obj, Macro | Undefined) and not any(
            __obj is known for known in _functions(__self, __context)
        ):
            name = getattr(method, "__name__", "")
            if not any(isinstance(owner, kind) and name in names for kind, names in _METHODS.items()):
                raise SecurityError(f"{name or type(__obj).__name__} cannot be called in a chat template")
            meter.measure(owner, *args)
            _multiplied(meter, name, owner, args, kwargs)
        meter.measure(*args, *(value for key, value in kwargs.items() if not key.startswith("_")))
        return meter.result(super().call(__context, __obj, *args, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """``obj[argument]``."""
        return (
            self.undefined(obj=obj, name="a tuple") if isinstance(argument, tuple) else super().getitem(obj, argument)
        )


def _functions(environment: _Environment, context: Context) -> tuple[Any, ...]:
    return (*environment.globals.values(), context.parent.get("strftime_now"))


def _metered(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A filter or test of Jinja's that is charged before it runs."""
    passes = _PassArg.from_obj(function)

    @pass_context
    def metered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter: _Meter = context.parent[_METER]
        meter.measure(value, *args, *kwargs.values(), deep=name not in _SHALLOW)
        _multiplied(meter, name, value, args, kwargs)
        first = {
            _PassArg.context: context,
            _PassArg.eval_context: context.eval_ctx,
            _PassArg.environment: context.environment,
        }
        given = () if passes is None else (first[passes],)
        found = function(*given, value, *args, **kwargs)
        return found if isinstance(found, bool | int) else meter.result(found)

    return metered


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    context.parent[_METER].measure(value)
    return value


@pass_context
def _measured(context: Context, value: Any) -> Any:
    context.parent[_METER].measure(value)
    return value


@pass_context
def _joined(context: Context, values: list[Any]) -> str:
    context.parent[_METER].measure(values)
    return "".join(map(str, values))


@pass_context
def _each(context: Context, values: Any) -> Iterator[Any]:
    meter: _Meter = context.parent[_METER]
    for value in values:
        meter.step()
        yield value


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, **settings: Any) -> str:
    """As transformers writes JSON in templates: without HTML's escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **settings)


def _raise_exception(message: str) -> None:
    raise RuntimeRefusal(f"the chat template refuses the conversation: {str(message)[:1000]}")


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's text for training; for us it is transparent."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        """The body as a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _check(tree: nodes.Template) -> None:
    """Refuse what is too large, and statements that reach for other templates or recurse unseen."""
    count, stack = 0, [tree]
    while stack:
        node = stack.pop()
        count += 1
        if count > NODES:
            raise _excess(f"it has more than {NODES} parts")
        if not isinstance(node, _ALLOWED) or (isinstance(node, nodes.For) and node.recursive):
            raise _excess(f"it uses {type(node).__name__.lower()}, which no chat template needs (line {node.lineno})")
        stack.extend(node.iter_child_nodes())  # type: ignore[arg-type]


class _Metering(NodeTransformer):
    """Sends through the meter what Jinja would compile into plain Python: loops, comparisons, ``~``, slices, text."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through(_EACH, node.iter)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        for side in (node, *node.ops):
            if not isinstance(side.expr, nodes.Const):
                side.expr = _through(_MEASURED, side.expr)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through(_JOINED, nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _through(_MEASURED, node.node)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _through(_MEASURED, node.key)
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno)  # template text would be written past the meter


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
