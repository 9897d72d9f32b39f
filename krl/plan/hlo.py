"""What a compiled program computes, moves and sends, read from its text, each loop counted as often as it runs.

XLA's own `cost_analysis()` counts the body of a loop once, so of a decoder whose layers are scanned it sees one layer,
and of a decoding loop one token. Here the text that XLA prints of the program for one device is followed from its
entry: a loop's body counts times its iterations, which stand in the text for `lax.scan` and are given by the caller
where they depend on data.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Names of other values, and what waits for a copy that was counted where it began.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id", "after-all"}
_SLICES = {"dynamic-slice", "slice", "gather"}  # read no more of their first operand than they return
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")


class Collective(NamedTuple):
    """Something that devices do together."""

    kind: str  # one of COLLECTIVES
    size: float  # bytes on a device, of the operand or of the result, whichever is larger
    group: int  # devices that do it together
    times: float  # how often

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all, by the algorithms that send the least."""
        rounds = 2 if self.kind == "all-reduce" else 1  # a reduce-scatter and an all-gather
        share = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return self.times * self.size * rounds * share


class Cost(NamedTuple):
    """What a program asks of one device."""

    flops: float  # of products of matrices alone; a multiplication and an addition are two
    bytes: float  # read and written in the device's main memory
    collectives: tuple[Collective, ...]
    kernels: tuple[tuple[str, float], ...]  # (name, times) of kernels whose FLOPs the text does not tell

    @property
    def sent(self) -> float:
        """Bytes that a device sends to others."""
        return sum(one.sent for one in self.collectives)

    def times(self, factor: float) -> "Cost":
        """The same so often."""
        return Cost(
            self.flops * factor,
            self.bytes * factor,
            tuple(one._replace(times=one.times * factor) for one in self.collectives),
            tuple((name, times * factor) for name, times in self.kernels),
        )


class Operation(NamedTuple):
    """A line of a computation."""

    name: str
    kind: str  # "dot", "fusion", "while" and so on
    shape: str  # of the result, as text
    operands: tuple[str, ...]  # their names
    inside: str  # what stands between the parentheses
    rest: str  # what follows them
    root: bool  # whether it is the computation's result


Computation = dict[str, Operation]  # by name


def read_cost(text: str, trips: Sequence[float] = ()) -> Cost:
    """What one run of a compiled program costs a device.

    Args:
        text: `compiled.as_text()`.
        trips: iterations of loops that end by data, the outermost first; a loop that counts to a constant, as
            `lax.scan` does, needs none.

    Raises:
        ValueError: a loop that ends by data and has no number in trips.
    """
    devices = re.search(r"num_partitions=(\d+)", text)
    computations, entry = parse(text.replace("replica_groups={}", f"replica_groups=[1,{devices[1] if devices else 1}]"))
    return _cost(computations, entry, tuple(trips))


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """(computations by name, the name of the entry)."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if line[:1] in ("%", "E") and line.endswith("{"):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            entry = name if line.startswith("ENTRY ") else entry
            current = computations.setdefault(name, {})
        elif line.startswith("  ") and " = " in line:
            operation = _operation(line)
            current[operation.name] = operation
    return computations, entry


def _operation(line: str) -> Operation:
    """`%name = shape kind(operands), attributes`, perhaps after ROOT."""
    name, right = re.sub(r"/\*.*?\*/", "", line).strip().split(" = ", 1)
    end = _closing(right) if right.startswith("(") else right.index(" ")
    shape, right = right[:end], right[end:].strip()
    begin = right.index("(")
    end = begin + _closing(right[begin:])
    inside = right[begin + 1 : end - 1]
    return Operation(
        name=name.removeprefix("ROOT ").lstrip("%"), kind=right[:begin], shape=shape, inside=inside, rest=right[end:],
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)), root=name.startswith("ROOT "),
    )  # fmt: skip


def _result(computation: Computation) -> str:
    return next(one.name for one in computation.values() if one.root)


def _closing(text: str) -> int:
    """Where the parenthesis that text begins with has been closed."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place + 1
    raise ValueError(f"a parenthesis is never closed in {text[:80]!r}")


def _named(rest: str, attribute: str) -> list[str]:
    """The computations that an attribute such as `body=%name` or `branch_computations={%a, %b}` names."""
    found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", rest)
    return re.findall(r"%([\w.\-]+)", found[1]) if found else []


# ---------------------------------------------------------------- the whole


def _cost(computations: dict[str, Computation], name: str, trips: tuple[float, ...]) -> Cost:
    costs = [_of_operation(computations, computations[name], one, trips) for one in computations[name].values()]
    return Cost(
        sum(cost.flops for cost in costs),
        sum(cost.bytes for cost in costs),
        tuple(one for cost in costs for one in cost.collectives),
        tuple(one for cost in costs for one in cost.kernels),
    )


def _of_operation(computations, computation: Computation, one: Operation, trips: tuple[float, ...]) -> Cost:
    if one.kind == "while":
        return _of_loop(computations, computation, one, trips)
    if one.kind == "conditional":
        branches = [
            _cost(computations, name, trips)
            for attribute in ("branch_computations", "true_computation", "false_computation")
            for name in _named(one.rest, attribute)
        ]
        return max(branches, key=lambda cost: (cost.flops, cost.bytes))
    if one.kind in ("call", "call-start", "async-start"):
        called = _named(one.rest, "to_apply") + _named(one.rest, "calls")
        return _cost(computations, called[0], trips)
    kind = one.kind.removesuffix("-start")
    if one.kind in _FREE or one.kind.endswith(("-done", "-update")):
        return Cost(0, 0, (), ())
    flops = _flops(computations, computation, one)
    together = (_collective(computation, one, kind),) if kind in COLLECTIVES else ()
    unknown = one.kind == "custom-call" and not flops and '"tpu_custom_call"' in one.rest
    return Cost(flops, _bytes(computations, computation, one), together, ((one.name, 1.0),) if unknown else ())


def _of_loop(computations, computation: Computation, one: Operation, trips: tuple[float, ...]) -> Cost:
    """A loop's body as often as it runs."""
    times = _iterations(computations, computation, one)
    if times is None:
        if not trips:
            raise ValueError(f"the loop {one.name} ends by data, and nothing says how often it runs")
        times, trips = trips[0], trips[1:]
    return _cost(computations, _named(one.rest, "body")[0], trips).times(times)


def _iterations(computations, computation: Computation, one: Operation) -> float | None:
    """How often a loop runs if the text says so, as a number or by `index < constant`; None if data decide."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', one.rest)
    if known:
        return float(known[1])
    condition = computations[_named(one.rest, "condition")[0]]
    body = computations[_named(one.rest, "body")[0]]
    for test in condition.values():
        if test.kind == "compare" and "direction=LT" in test.rest:
            index, bound = (condition[name] for name in test.operands)
            if bound.kind != "constant" or index.kind != "get-tuple-element":
                return None
            place = int(index.rest.split("index=")[1].split(",")[0])
            begin = _source(computation, _source(computation, one.operands[0]).operands[place])
            after = _source(body, body[_result(body)].operands[place])
            added = [body[name] for name in after.operands if body[name].kind == "constant"]
            step = int(added[0].inside) if after.kind == "add" and added else 1
            first = int(begin.inside) if begin.kind == "constant" else 0
            return float(math.ceil((int(bound.inside) - first) / step))
    return None


def _source(computation: Computation, name: str) -> Operation:
    """Where a value comes from, behind its copies."""
    one = computation[name]
    return _source(computation, one.operands[0]) if one.kind in ("copy", "bitcast") else one


# ---------------------------------------------------------------- arrays


def _arrays(shape: str) -> list[tuple[tuple[int, ...], float]]:
    """(dimensions, bytes) of the arrays of a shape; an array on the chip or on the host, marked S(n), has 0 bytes."""
    found = []
    for dtype, sizes, layout in _ARRAY.findall(shape):
        dimensions = tuple(int(size) for size in sizes.split(",") if size)
        bits = re.search(r"\d+", dtype)
        width = 1.0 if dtype == "pred" else int(bits[0]) / 8 if bits else 0.0
        found.append((dimensions, 0.0 if "S(" in layout else width * math.prod(dimensions)))
    return found


def _size(shape: str) -> float:
    """Bytes in main memory."""
    return sum(size for _, size in _arrays(shape))


def _dimensions(computation: Computation, name: str) -> tuple[int, ...]:
    return _arrays(computation[name].shape)[0][0]


# ---------------------------------------------------------------- FLOPs


def _flops(computations, computation: Computation, one: Operation) -> float:
    if one.kind == "fusion":
        body = _fused(computations, one)
        return sum(_flops(computations, body, inner) for inner in body.values())
    if one.kind == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    elif one.kind == "custom-call":  # a library's product of matrices
        contracted = re.search(r'"lhs_contracting_dimensions":\[([\d,"]*)\]', one.rest)
        if not contracted:
            told = re.search(r'"flops":"?(\d+)', one.rest)  # the estimate of a kernel's author
            return float(told[1]) if told else 0.0
    elif one.kind == "convolution":
        return _convolution_flops(computation, one)
    else:
        return 0.0
    left = _dimensions(computation, one.operands[0])
    axes = [int(axis) for axis in re.findall(r"\d+", contracted[1])] if contracted else []
    return 2.0 * math.prod(_arrays(one.shape)[0][0]) * math.prod(left[axis] for axis in axes)


def _convolution_flops(computation: Computation, one: Operation) -> float:
    """A TPU's products of matrices are convolutions, batches their windows: taps on padding or holes are no work."""
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    assert found, one.rest
    left, right, out = found.groups()
    inputs, kernel = (_dimensions(computation, name) for name in one.operands[:2])
    results = _arrays(one.shape)[0][0]
    window = re.search(r"window=\{([^}]*)\}", one.rest)
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    flops = 2.0 * results[out.index("b")] * results[out.index("f")] * kernel[right.index("i")]
    for number in range(len(left) - 2):
        axis = str(number)

        def option(name: str, default: str, number: int = number) -> str:
            return options[name].split("x")[number] if name in options else default

        stride, spread, holes = (int(option(name, "1")) for name in ("stride", "rhs_dilate", "lhs_dilate"))
        before = int(option("pad", "0_0").split("_")[0])
        taps, places = np.arange(kernel[right.index(axis)]), np.arange(results[out.index(axis)])
        read = places[:, None] * stride + taps * spread - before
        length = (inputs[left.index(axis)] - 1) * holes + 1
        flops *= ((read >= 0) & (read < length) & (read % holes == 0)).sum()
    return float(flops)


# ---------------------------------------------------------------- bytes


def _bytes(computations, computation: Computation, one: Operation) -> float:
    """Read and written in main memory: every operand and the result, but of slices no more than the slice."""
    if one.kind.endswith("-start"):  # the result has what is read in it too
        return _size(one.shape)
    if one.kind in _SLICES:
        return 2 * _size(one.shape)
    if one.kind in ("dynamic-update-slice", "scatter"):
        return 2 * _size(computation[one.operands[1 if one.kind == "dynamic-update-slice" else -1]].shape)
    if one.kind == "fusion":
        body = _fused(computations, one)
        inputs = [name for name, inner in body.items() if inner.kind == "parameter"]
        return sum(_read(body, name) for name in inputs) + _written(body, _result(body), one.shape)
    return sum(_size(computation[name].shape) for name in one.operands) + _size(one.shape)


def _fused(computations, one: Operation) -> Computation:
    """The computation of a fusion, with those of the fusions in it written out."""
    body: Computation = {}
    for name, inner in computations[_named(one.rest, "calls")[0]].items():
        if inner.kind != "fusion":
            body[name] = inner
            continue
        within = _fused(computations, inner)
        for part in within.values():
            operands = tuple(f"{name}/{operand}" for operand in part.operands)
            part = part._replace(name=f"{name}/{part.name}", operands=operands, root=False)
            if part.kind == "parameter":
                part = part._replace(kind="bitcast", operands=(inner.operands[int(part.inside)],))
            body[part.name] = part
        body[name] = inner._replace(kind="bitcast", operands=(f"{name}/{_result(within)}",))
    return body


def _read(body: Computation, name: str) -> float:
    """What a fusion reads of one of its inputs, or of the same under another name."""
    whole, read = _size(body[name].shape), 0.0
    for user in body.values():
        if name not in user.operands:
            continue
        first = user.operands[0] == name
        if user.kind in _SLICES and first:
            read += _size(user.shape) if whole else 0
        elif user.kind == "bitcast" or (user.kind == "dynamic-update-slice" and first):  # the latter writes in place
            read += _read(body, user.name)
        else:
            return whole
    return min(read, whole)


def _written(body: Computation, name: str, shape: str) -> float:
    """What a fusion writes as one of its results, of this shape."""
    one = body[name]
    if one.kind == "tuple":
        shapes = [match[0] for match in _ARRAY.finditer(shape)]
        return sum(_written(body, part, of) for part, of in zip(one.operands, shapes, strict=True))
    if one.kind == "bitcast":
        return _written(body, one.operands[0], shape)
    if one.kind == "dynamic-update-slice":
        return _size(body[one.operands[1]].shape) if _size(shape) else 0.0
    return _size(shape)


# ---------------------------------------------------------------- collectives


def _collective(computation: Computation, one: Operation, kind: str) -> Collective:
    given = sum(_bytes_anywhere(computation[name].shape) for name in one.operands)
    result = _bytes_anywhere(one.shape)
    if one.kind.endswith("-start") and one.shape.startswith("("):
        result -= given  # it is in the result too
    return Collective(kind, max(given, result), _group(one.rest), 1.0)


def _bytes_anywhere(shape: str) -> float:
    return _size(re.sub(r"S\(\d+\)", "", shape))


def _group(rest: str) -> int:
    """Devices in a group: {{0,1},{2,3}}, [2,4]<=[8], or mesh['a'=2,'b'=4] {'b'}."""
    found = re.search(
        r"replica_groups=(mesh\[(?P<mesh>[^\]]*)\] \{(?P<axes>[^}]*)\}|\[(?P<grid>[\d,]+)\]|\{\{(?P<list>[\d,]*)\})",
        rest,
    )
    if not found:
        return 2  # a permutation has pairs
    if found["grid"]:
        return int(found["grid"].split(",")[-1])
    if found["mesh"]:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found["mesh"]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", found["axes"]))
    return len(found["list"].split(","))
