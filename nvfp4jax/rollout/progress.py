"""A progress bar of rows and tokens on stderr."""

import contextlib
import time
from collections.abc import Callable, Iterator

Show = Callable[[int, int], None]  # (rows that have ended, tokens of all rows)


@contextlib.contextmanager
def bar(rows: int, wanted: bool) -> Iterator[Show | None]:
    """A function that brings the bar up to date; None where none is wanted."""
    if not wanted:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task("rows", total=rows, rate="compiling")
        first: list[tuple[float, int]] = []

        def show(ended: int, tokens: int) -> None:
            now = time.monotonic()
            if not first:
                first.append((now, tokens))
            since, before = first[0]  # without the compilation in front of the first tokens
            rate = f"{(tokens - before) / (now - since):.0f} tokens/s" if now > since else ""
            shown.update(task, completed=ended, rate=rate)

        yield show
