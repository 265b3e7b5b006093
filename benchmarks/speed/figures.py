"""How the figures of a row are written, in tables and on the screen."""

from __future__ import annotations

from .results import Row


def behind(ratio: float) -> bool:
    """Return whether a peer is faster, as far as two decimals show it."""
    return round(ratio, 2) < 1


def time(row: Row) -> str:
    """Return the median microseconds of a row, or nothing if it was not timed."""
    return number(row["p50_us"]) if "p50_us" in row else ""


def number(value: float) -> str:
    """Return a number in three digits, or in full above 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio(value: float | None) -> str:
    """Return how many times as long a peer takes, in bold where it is faster."""
    if value is None:
        return ""
    text = f"{value:.2f}x"
    return f"**{text}**" if behind(value) else text
