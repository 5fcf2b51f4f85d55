"""The screen of `mcrelay top`, without a screen: a state, what a key makes of it, and the lines that show it.

press() has what keys do, layout() what is seen: never more lines than there are rows, never more cells in one than
there are columns, and never a character that is not printed as itself, whatever things are called. Only rows that are
seen are laid out. The selection stays with its row wherever that is sorted to; without one, the view stays at the top.

Knows nothing of curses, time or the daemon. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, NamedTuple

from mcrelay import cells
from mcrelay.cells import human
from mcrelay.rates import Rates
from mcrelay.top_details import Text, details
from mcrelay.top_tables import GAP, TABLES, VIEWS, Style, View, percent, rate_text, reasons_text, subject

INTERVALS: Final = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
FILTER_MAX: Final = 100  # characters
FAR: Final = 10**9  # rows: beyond the end of any list
HINTS: Final = "q quit  h help  Tab view  / filter  < > sort  r reverse  space pause  + - interval  Enter details"
HELP: Final = """\
mcrelay top

1 2 3 4, Tab   rules, outputs, workers, interfaces
/              filter: show what has a text in its name, id, input or outputs
               (Enter: done; Esc: show all)
< >            sort by the column to the left or right; v is descending
r              reverse the order
arrows, j k    select a row; also PgUp, PgDn, End; Home selects nothing
Enter          details of the row: all that is counted, and for drops why
               they happen and what to do
Esc            back; in a table: select nothing, then show all
space, p       pause, and go on
+ -            read the counters more or less often
q              quit

Rates are of the time between the last two readings, bits of UDP payload.
PKT/S   packets that matched the rule, or that the worker received
COPY/S  datagrams sent, of all outputs; OUT/S their bits
DROP/S  copies that did not leave; of a worker: packets of which none left
LOSS    the share of those that nobody wants: a paused output has none
OVERR/S frames that the kernel dropped, as workers read too slowly
MERGE/S frames that a device had merged, and which had to be dropped
POOL    receive slots in use; BATCH packets a turn; SEND copies a send"""

Key = str  # a character, or the name of a key that writes none


class Span(NamedTuple):
    text: str
    style: Style = "plain"


Line = tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Sort:
    column: int
    is_descending: bool


def _first_sort(view: View) -> Sort:
    table = TABLES[view]
    return Sort(table.sort, table.columns[table.sort].is_number)


@dataclass(frozen=True, slots=True)
class State:
    """What somebody has chosen to see. `step` is how far the selection is to go, which layout() does, as it knows the
    rows; `first` and `height` are of the rows that it last showed."""

    interval_s: float = 1.0
    view: View = "rules"
    sorts: tuple[Sort, ...] = tuple(map(_first_sort, VIEWS))
    filter: str = ""
    is_typing: bool = False  # the filter
    is_paused: bool = False
    page: Literal["table", "details", "help"] = "table"
    selected: str | None = None
    at: int = 0  # where that was
    step: int = 0
    first: int = 0
    height: int = 1
    scroll: int = 0  # of details and help
    is_done: bool = False

    @property
    def sort(self) -> Sort:
        return self.sorts[VIEWS.index(self.view)]


@dataclass(frozen=True, slots=True)
class Screen:
    """`state` is the one to go on with."""

    lines: tuple[Line, ...]
    state: State


# --- keys ------------------------------------------------------------------------------------------------------------


def press(state: State, key: Key) -> State:
    """The state after a key: a character, or one of up, down, pageup, pagedown, home, end, left, right, enter, escape,
    tab, backtab and backspace. Others do nothing."""
    if state.is_typing:
        return _type(state, key)
    if state.page != "table":
        return _press_page(state, key)
    return _press_table(state, key)


def _type(state: State, key: Key) -> State:
    match key:
        case "enter":
            return replace(state, is_typing=False)
        case "escape":
            return replace(state, is_typing=False, filter="", first=0)
        case "backspace":
            return replace(state, filter=state.filter[:-1], is_typing=bool(state.filter), first=0)
        case "up" | "down" | "pageup" | "pagedown":
            return _press_table(state, key)
    if len(key) == 1 and key.isprintable() and len(state.filter) < FILTER_MAX:
        return replace(state, filter=state.filter + key, first=0)
    return state


def _press_page(state: State, key: Key) -> State:
    match key:
        case "q" | "escape" | "enter" | "left" | "backspace":
            return replace(state, page="table", scroll=0)
        case "h" | "?":
            return replace(state, page="help", scroll=0)
    steps = {"up": -1, "k": -1, "down": 1, "j": 1, "home": -FAR, "end": FAR}
    steps |= {"pageup": -state.height, "pagedown": state.height, " ": state.height}
    return replace(state, scroll=min(FAR, max(0, state.scroll + steps[key]))) if key in steps else state


def _press_table(state: State, key: Key) -> State:
    match key:
        case "q":
            return replace(state, is_done=True)
        case "1" | "2" | "3" | "4":
            return _see(state, VIEWS[int(key) - 1])
        case "tab" | "backtab":
            step = 1 if key == "tab" else -1
            return _see(state, VIEWS[(VIEWS.index(state.view) + step) % len(VIEWS)])
        case "h" | "?":
            return replace(state, page="help", scroll=0)
        case "/":
            return replace(state, is_typing=True)
        case "<" | "left":
            return _sort_by(state, state.sort.column - 1)
        case ">" | "right":
            return _sort_by(state, state.sort.column + 1)
        case "r":
            return _sorted(state, replace(state.sort, is_descending=not state.sort.is_descending))
        case " " | "p":
            return replace(state, is_paused=not state.is_paused)
        case "+" | "=":
            return replace(state, interval_s=min((s for s in INTERVALS if s > state.interval_s), default=INTERVALS[-1]))
        case "-":
            return replace(state, interval_s=max((s for s in INTERVALS if s < state.interval_s), default=INTERVALS[0]))
        case "enter":
            return replace(state, page="details", scroll=0, step=0 if state.selected else 1)
        case "escape":
            return _unselected(state) if state.selected else replace(state, filter="", first=0)
        case "home":
            return _unselected(state)
    steps = {"up": -1, "k": -1, "down": 1, "j": 1, "pageup": -state.height, "pagedown": state.height, "end": FAR}
    return replace(state, step=state.step + steps[key]) if key in steps else state


def _see(state: State, view: View) -> State:
    return state if view == state.view else replace(_unselected(state), view=view)


def _unselected(state: State) -> State:
    return replace(state, selected=None, at=0, step=0, first=0)


def _sort_by(state: State, column: int) -> State:
    columns = TABLES[state.view].columns
    column = min(len(columns) - 1, max(0, column))
    if column == state.sort.column:
        return state
    return _sorted(state, Sort(column, columns[column].is_number))


def _sorted(state: State, sort: Sort) -> State:
    at = VIEWS.index(state.view)
    return replace(state, sorts=(*state.sorts[:at], sort, *state.sorts[at + 1 :]))


# --- lines -----------------------------------------------------------------------------------------------------------


def layout(state: State, shown: Rates | None, size: tuple[int, int], *, heading: str = "", notice: str = "") -> Screen:
    """What is seen in `size` rows and columns. `heading` says which daemon that is, `notice` what is wrong with it;
    without `shown`, nothing is known yet."""
    rows, columns = size
    if rows < 1 or columns < 1:
        return Screen((), state)
    if state.page == "help":
        return _scrolled(state, [(line, "plain") for line in HELP.splitlines()], size, notice)
    if shown is None:
        status = Span(notice, "bad") if notice else Span("reading the counters")
        return Screen(tuple(_line([span], columns) for span in (Span(heading, "title"), status)[-rows:]), state)
    found = _found(state, shown)
    state = _move(state, found)
    if state.page == "details":
        row = next((row for row in TABLES[state.view].rows(shown) if _name(state, row) == state.selected), None)
        texts: list[Text] = list(details(subject(row), shown, columns)) if row else [("it is not there", "bad")]
        return _scrolled(state, texts, size, notice)
    return _table(state, shown, found, size, heading, notice)


def _name(state: State, row: Any) -> str:
    return TABLES[state.view].name(row)


def _found(state: State, shown: Rates) -> list[Any]:
    """The rows that the filter leaves, in order."""
    table = TABLES[state.view]
    found = table.found(shown, state.filter)
    key = table.columns[state.sort.column].key
    found.sort(key=lambda row: key(row, shown), reverse=state.sort.is_descending)
    return found


def _move(state: State, found: Sequence[Any]) -> State:
    """The selection where it is now, or where keys have sent it."""
    if not found or (state.selected is None and state.step <= 0):
        return replace(state, step=0)
    if state.selected is None:
        at = state.step - 1
    else:
        places = [n for n, row in enumerate(found) if _name(state, row) == state.selected]
        if not places and state.page == "details":
            return replace(state, step=0)
        at = (places[0] if places else state.at) + state.step  # its neighbour, if it is gone or filtered away
    at = min(len(found) - 1, max(0, at))
    return replace(state, selected=_name(state, found[at]), at=at, step=0)


def _scrolled(state: State, texts: Sequence[Text], size: tuple[int, int], notice: str) -> Screen:
    """A page of text."""
    rows, columns = size
    foot = [notice or "Esc goes back, arrows scroll"] if rows > 1 else []
    height = rows - len(foot)
    scroll = max(0, min(state.scroll, len(texts) - height))
    lines = [_line([Span(text, style)], columns) for text, style in texts[scroll : scroll + height]]
    lines += [()] * (height - len(lines))
    lines += [_line([Span(text, "bad" if notice else "header")], columns) for text in foot]
    return Screen(tuple(lines), replace(state, scroll=scroll, height=max(1, height)))


def _table(
    state: State, shown: Rates, found: Sequence[Any], size: tuple[int, int], heading: str, notice: str
) -> Screen:
    rows, columns = size
    foot = f"/{state.filter}_" if state.is_typing else HINTS
    # What stands around the table, the most important first; a small terminal has room for some of it.
    around: list[tuple[str, Line]] = [
        ("totals", _line([Span(notice, "bad")] if notice else _totals(shown), columns)),
        ("foot", _line([Span(foot, "title" if state.is_typing else "plain")], columns)),
        ("tabs", _line(_tabs(state, shown, len(found)), columns)),
        ("title", _line([Span(_title(state, shown, heading), "title")], columns)),
    ]
    if state.is_typing:
        around[:2] = around[1::-1]
    kept = dict(around[: max(1 if rows == 1 or notice else 0, rows - 2)])
    above = [kept[name] for name in ("title", "totals", "tabs") if name in kept]
    below = [kept["foot"]] if "foot" in kept else []
    height = max(0, rows - len(above) - len(below) - 1)
    first = _first(state, len(found), height)
    state = replace(state, first=first, height=max(1, height))
    body = list(_rows(state, shown, found[first : first + height], columns))[: max(0, rows - len(kept))]
    body += [()] * (height + 1 - len(body)) if height else []
    return Screen((*above, *body, *below), state)


def _first(state: State, count: int, height: int) -> int:
    """The first row that is seen: the selected one must be."""
    first = state.first
    if state.selected is not None and count:
        at = min(state.at, count - 1)
        first = min(max(first, at - height + 1), at)
    return max(0, min(first, count - height))


def _title(state: State, shown: Rates, heading: str) -> str:
    over = f"rates over {shown.seconds:.1f} s" if shown.seconds else "no rates yet"
    paused = "  PAUSED" if state.is_paused else ""
    return f"every {state.interval_s:g} s, {over}{paused}  {heading}"


def _totals(shown: Rates) -> list[Span]:
    if not shown.seconds:
        return [Span("in -  out -  dropped -")]
    rates = {counter: shown.total(counter) for counter in ("received", "received_bytes", "copies", "copies_bytes")}
    spans = [
        Span(f"in {human(rates['received'])}/s {human(8 * rates['received_bytes'], 'bit/s')}  "),
        Span(f"out {human(rates['copies'])}/s {human(8 * rates['copies_bytes'], 'bit/s')}  "),
    ]
    dropped = shown.reasons
    text = f"dropped {rate_text(sum(dropped.values()), shown)}/s"
    loss = max((worker.loss for worker in shown.workers), default=0.0)
    spans.append(Span(text, "bad" if loss else "plain"))
    if dropped:
        spans.append(Span(f" loss {percent(loss, shown)}: {reasons_text(dropped)}"))
    return spans


def _tabs(state: State, shown: Rates, found: int) -> Iterator[Span]:
    counts = {"rules": len(shown.rules), "outputs": sum(len(rule.now.outputs) for rule in shown.rules)}
    counts |= {"workers": len(shown.workers), "interfaces": len(shown.interfaces)}
    for number, view in enumerate(VIEWS, 1):
        is_seen = view == state.view
        count = f"{found}/{counts[view]}" if is_seen and state.filter else str(counts[view])
        yield Span(f"{number} {view} {count}", "header" if is_seen else "plain")
        yield Span("  ")
    if state.filter:
        yield Span(f"filter: {state.filter}", "warning")


def _rows(state: State, shown: Rates, seen: Sequence[Any], columns: int) -> Iterator[Line]:
    """The header, and the rows."""
    table = TABLES[state.view]
    arrow = "v" if state.sort.is_descending else "^"
    titles = [column.title + arrow * (n == state.sort.column) for n, column in enumerate(table.columns)]
    texts = [[cells.printable(column.text(row, shown)) for column in table.columns] for row in seen]
    widths = table.widths([titles, *texts], columns)
    room = columns - sum(widths) - GAP * (len(widths) - 1)
    yield _cells(
        titles, ["selected" if n == state.sort.column else "header" for n in range(len(titles))], state, widths
    )
    for row, text in zip(seen, texts, strict=True):
        if _name(state, row) == state.selected:
            line = _cells(text, ["selected"] * len(text), state, widths)
            yield (*line, Span(" " * room, "selected"))
        else:
            yield _cells(text, [column.style(row, shown) for column in table.columns], state, widths)


def _cells(texts: Sequence[str], styles: Sequence[Style], state: State, widths: Sequence[int]) -> Line:
    spans: list[Span] = []
    columns = TABLES[state.view].columns
    for n, (width, text, style) in enumerate(zip(widths, texts, styles, strict=False)):
        if n:
            spans.append(Span(" " * GAP, "selected" if styles[0] == styles[-1] == "selected" else "plain"))
        spans.append(Span(cells.fit(text, width, right=columns[n].is_number), style))
    return tuple(spans)


def _line(spans: Sequence[Span] | Iterator[Span], columns: int) -> Line:
    """As much of the spans as there is room for, in printable characters."""
    kept: list[Span] = []
    for text, style in spans:
        text = cells.clip(cells.printable(text), columns)
        kept.append(Span(text, style))
        columns -= cells.width(text)
    return tuple(kept)
