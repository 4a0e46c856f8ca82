"""Markdown tables of benchmark rows (one dict a measurement, as benchmarks.run and benchmarks.accuracy write them)."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.cases import WORKS

Row = dict[str, Any]

MIB, GIB = 2**20, 2**30
BARE = "bare products"
OURS = "asft_kernels"
SHAPE = ("model", "loss", "N", "M", "D", "V", "pairs", "dtype")
OUR_DEFAULT = {"cpu": f"{OURS} torch", "cuda": f"{OURS} triton"}


def groups(rows: Iterable[Row], *fields: str) -> dict[tuple, list[Row]]:
    """Rows by the values of these fields, in order of appearance."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[f] for f in fields), []).append(row)
    return found


def once(rows: Iterable[Row]) -> list[Row]:
    """Without the bare products and ours that a later run measured again, to compare other contestants with."""
    return [row for row in rows if not row.get("again")]


def markdown(header: list[str], lines: Iterable[list[str]], *, words: int = 2) -> list[str]:
    """A table whose first columns are words and stand to the left; figures stand to the right."""
    rule = ["---" if i < words else "---:" for i in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *lines)]


def sources(rows: list[Row], folder: str = "") -> str:
    """Machine, versions, commit, command, rounds and files of the rows that a table is made of."""

    def of(field: str) -> str:
        return ", ".join(dict.fromkeys(str(r["about"][field]) for r in rows if r["about"].get(field)))

    packages = dict.fromkeys((r["package"], r["version"]) for r in rows if r.get("version"))
    versions = ", ".join(f"{package} {version}" for package, version in packages if package not in (OURS, "torch"))
    machine = [of("machine"), of("capability")]
    machine += [f"{of(field)} {unit}" for field, unit in (("memory_gib", "GiB"), ("threads", "threads")) if of(field)]
    parts = [
        ", ".join(filter(None, machine)),
        f"driver {of('driver')}" if of("driver") else "",
        f"CUDA {of('cuda')}" if of("cuda") else "",
        f"Python {of('python')}, torch {of('torch')}{', triton ' + of('triton') if of('triton') else ''}"
        f"{', ' + versions if versions else ''}",
        f"commit {of('commit')}",
        f"`{of('command')}`, {of('date')}",
    ]
    rounds = sorted({r["rounds"] for r in rows if r.get("rounds")})
    if rounds:
        apart = [bool(r.get("apart")) for r in rows if r.get("rounds")]
        how = f", {'each' if all(apart) else 'in some sets each'} in processes of its own" if any(apart) else ""
        parts.append(f"median of {' to '.join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))} rounds{how}")
    repeated = sorted({r["round_seconds"] for r in rows if r.get("round_seconds")})
    if repeated:
        parts.append(f"in a round shorter calls are repeated for {', '.join(f'{x:g}' for x in repeated)} s")
    if of("failed_checks"):
        parts.append(f"**some after failed checks on this machine: {of('failed_checks')}**")
    limits = [f"{x / GIB:.1f}" for x in sorted({r["memory_limit"] for r in rows if r.get("memory_limit")})]
    if limits:
        parts.append(f"a contestant may take {' to '.join(dict.fromkeys((limits[0], limits[-1])))} GiB")
    files = ", ".join(f"[{file}]({folder}{file})" for file in sorted({r["file"] for r in rows}))
    return f"<sub>{'; '.join(filter(None, parts))}; rows in {files}.</sub>"


def contestant_table(rows: list[Row]) -> list[str]:
    """Who took part, what sets each apart, and what its first call costs."""
    lines = []
    for (contestant, package), line in groups(rows, "contestant", "package").items():
        first = [r["first_call_s"] for r in line if r["first_call_s"] is not None]
        cells = [f"{max(x):.1f}" if x else "–" for x in ([r["import_s"] for r in line if r["import_s"]], first)]
        lines.append([contestant, f"{package} {line[-1]['version']}", line[-1].get("note") or "–", *cells])
    header = ["contestant", "package", "note", "import, s", "first tiny call, at most, s"]
    return markdown(header, lines, words=3)


# --- cost -------------------------------------------------------------------------------------------------------------

# name, value of a row, format; the smallest is the best
COST: list[tuple[str, Callable[[Row], float | None], str]] = [
    ("seconds", lambda r: r["seconds"], "#.3g"),
    ("× bare products", lambda r: r["ratio"], ".2f"),
    ("extra MiB", lambda r: None if r["extra_bytes"] is None else r["extra_bytes"] / MIB, ".0f"),
    ("error of loss", lambda r: r["err_loss"], ".0e"),
    ("of dH", lambda r: r["err_dh"], ".1e"),
    ("of dW", lambda r: r["err_dw"], ".1e"),
]


def shape_of(row: Row) -> str:
    """A case in words, without the gradients wanted."""
    tokens = f"N = {row['N']}" + (f" of {row['M']} positions" if row["M"] != row["N"] else "")
    model = f"{row['model']}: " if row["model"] else ""
    return f"{model}{tokens}, D = {row['D']}, V = {row['V']}, {row['pairs']} pairs, {row['dtype']}"


def by_work(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda r: WORKS.index(r["work"]))  # stable: contestants keep their order


def best(rows: list[Row], value: Callable[[Row], float | None], style: str) -> str | None:
    """The smallest figure as printed, over contestants whose answer is right; the yardstick is no contestant."""
    figures = [value(r) for r in rows if r["status"] == "ok" and r["contestant"] != BARE]
    known = [x for x in figures if x is not None]
    return in_style(min(known), style) if known else None


def in_style(figure: float, style: str) -> str:
    return format(figure, style).removesuffix(".")  # "#.3g" keeps zeros, and of 123 the point


def cost_table(rows: list[Row]) -> list[str]:
    """Contestants of one shape and loss by the gradients wanted; the best in each column is bold.

    What another run measured later stands below what it was compared with there.
    """
    lines = []
    for work, contestants in groups(by_work(rows), "work").items():
        tops = [best(contestants, value, style) for _, value, style in COST]
        for r in contestants:
            cells = [work[0], r["contestant"] + ", again" * bool(r.get("again"))]
            if r["status"] == "ok":
                for (_, value, style), top in zip(COST, tops, strict=True):
                    figure = value(r)
                    text = "–" if figure is None else in_style(figure, style)
                    cells.append(f"**{text}**" if text == top and r["contestant"] != BARE else text)
                cells.append(f"{r['seconds_min']:#.3g}–{r['seconds_max']:#.3g}")
            else:
                cells += [f"{r['status']}: {one_line(r['reason'])}", *["–"] * len(COST)]
            lines.append(cells)
    return markdown(["gradients", "contestant", *(name for name, *_ in COST), "range, s"], lines)


def tiles(rows: list[Row]) -> list[str]:
    """The tiles of our Triton kernels in these rows, in one line; none: no line."""
    found = groups((r for r in rows if r.get("tile")), "contestant", "tile")
    said = "; ".join(f"{contestant}: {tile}" for contestant, tile in found)
    return [f"Tiles: {said}."] if said else []


def one_line(reason: str | None) -> str:
    """A reason that fits into a cell."""
    text = " ".join((reason or "no reason given").split()).replace("|", "\\|")
    return text if len(text) <= 120 else text[:119] + "…"


def answering_peers(rows: list[Row]) -> list[Row]:
    return [r for r in rows if r["status"] == "ok" and r["package"] != OURS and r["contestant"] != BARE]


def peers_ahead(rows: list[Row]) -> list[str]:
    """Where a peer's time or memory is below that of our default call, at one shape, in words."""
    found = []
    for (work, _), contestants in groups(by_work(rows), "work", "run").items():
        ours = {r["contestant"]: r for r in contestants if r["package"] == OURS}
        default = ours.pop(OUR_DEFAULT[rows[0]["device"]], None)
        if default is None:
            continue
        peers = answering_peers(contestants)
        for what, field in (("time", "seconds"), ("memory", "extra_bytes")):
            for peer in sorted((r for r in peers if r[field] is not None), key=lambda r: r[field]):
                if default["status"] != "ok":
                    found.append(f"{peer['contestant']} in {what}, {work} (ours: {default['status']})")
                elif default[field] is not None and peer[field] < 0.995 * default[field]:
                    shares = [f"{peer[field] / default[field]:.2f} × ours"]
                    shares += [
                        f"{peer[field] / r[field]:.2f} × {name.removeprefix(f'{OURS} ')}"
                        for name, r in ours.items()
                        if r["status"] == "ok" and r[field]
                    ]
                    found.append(f"{peer['contestant']} in {what}, {work} ({'; '.join(shares)})")
    return found


def peer_table(rows: list[Row]) -> list[str]:
    """Time and memory of each peer over our default's in the same case, least to most over the cases."""
    ours = {case_of(r): r for r in rows if r["contestant"] == OUR_DEFAULT[r["device"]] and r["status"] == "ok"}
    lines = []
    peers = [r for r in once(rows) if r["package"] != OURS and r["contestant"] != BARE and case_of(r) in ours]
    by_dtype = sorted(peers, key=lambda r: r["dtype"] != "float32")
    for (dtype, contestant), line in groups(by_dtype, "dtype", "contestant").items():
        right = [(r, ours[case_of(r)]) for r in line if r["status"] == "ok"]
        cells = [span([r["seconds"] / o["seconds"] for r, o in right if r["work"] == work]) for work in WORKS]
        memory = [r["extra_bytes"] / o["extra_bytes"] for r, o in right if r["extra_bytes"] and o["extra_bytes"]]
        lines.append([dtype, contestant, *cells, span(memory), outcomes(line)])
    return markdown(["dtype", "peer", *(f"time, {work}" for work in WORKS), "memory", "cases"], lines)


def outcomes(rows: list[Row]) -> str:
    """How many cases there were, and of how many there is no time, for which reason."""
    count = Counter(r["status"] for r in rows)
    return ", ".join([str(len(rows)), *(f"{n} {status}" for status, n in count.items() if status != "ok")])


def case_of(row: Row) -> tuple:
    """With the run: nothing is compared with what another one measured."""
    return tuple(row[field] for field in ("set", *SHAPE, "work", "run"))


def span(ratios: list[float]) -> str:
    """Least to most; bold where the least is below 1."""
    if not ratios:
        return "–"
    text = "–".join(dict.fromkeys(f"{x:.2f}" for x in (min(ratios), max(ratios))))
    return f"**{text}**" if min(ratios) < 0.995 else text


def twin_table(rows: list[Row]) -> list[str]:
    """Our time in bf16 over that in fp32, where the same shape was measured in both; none: no lines."""
    fields = [field for field in SHAPE if field != "dtype"]
    lines = []
    right = [r for r in once(rows) if r["package"] == OURS and r["status"] == "ok"]
    for (contestant, work, *_), line in groups(right, "contestant", "work", *fields).items():
        at = {r["dtype"]: r for r in line}
        if {"float32", "bfloat16"} <= at.keys():
            single, low = at["float32"]["seconds"], at["bfloat16"]["seconds"]
            shape = f"N = {line[0]['N']}, D = {line[0]['D']}, V = {line[0]['V']}"
            lines.append(
                [shape, contestant, work, in_style(single, "#.3g"), in_style(low, "#.3g"), f"{low / single:.2f}"]
            )
    return markdown(["shape", "contestant", "gradients", "fp32, s", "bf16, s", "ratio"], lines, words=3) * bool(lines)


def verdict(rows: list[Row]) -> str:
    if not answering_peers(rows):
        return "No peer was measured here."
    found = peers_ahead(rows)
    return f"**A peer wins:** {'; '.join(found)}." if found else "No peer takes less time or memory here."


# --- accuracy ---------------------------------------------------------------------------------------------------------


def accuracy_table(rows: list[Row]) -> list[str]:
    """Relative errors against float64 as the number of pairs grows, one inputs and dtype; the best is bold."""
    pairs = sorted({r["pairs"] for r in rows})
    lines = []
    for name, field, floor in (
        ("loss", "err_loss", None),
        ("dH", "err_dh", "rounding_dh"),
        ("dW", "err_dw", "rounding_dw"),
    ):
        tops = {n: best([r for r in rows if r["pairs"] == n], lambda r: r[field], ".2e") for n in pairs}  # noqa: B023
        if floor:
            once = {r["pairs"]: r[floor] for r in rows if r[floor] is not None}
            lines.append(
                [name, "*the exact gradient, rounded once*", *(f"{once[n]:.2e}" if n in once else "–" for n in pairs)]
            )
        for (contestant,), line in groups(rows, "contestant").items():
            if contestant == BARE:
                continue
            at = {r["pairs"]: r for r in line}
            cells = []
            for n in pairs:
                r = at.get(n)
                text = "–" if r is None or r[field] is None else f"{r[field]:.2e}"
                text = f"**{text}**" if text == tops[n] else text
                cells.append(text if r is None or r["status"] == "ok" else f"{text} {r['status']}")
            lines.append([name, contestant, *cells])
    return markdown(["error of", "contestant", *(f"{n} pair{'s' if n > 1 else ''}" for n in pairs)], lines)
