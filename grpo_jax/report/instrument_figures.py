"""The report's section on one run's instrument: why and when normalisation helped."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from grpo_jax.instrument.rows import Row, usable
from grpo_jax.report import cosine_figures, prompt_figures, update_figures
from grpo_jax.report.instrument_text import HEADER, TABLE_NOTE, reading, table
from grpo_jax.report.svg import Figure, TooFew

FIGURES: tuple[Callable[[list[Row]], Figure | TooFew | None], ...] = (
    prompt_figures.pass_rates_by_difficulty,
    prompt_figures.sigmas,
    prompt_figures.curvature_against_variance,
    prompt_figures.pass_rate_against_std,
    cosine_figures.phase_shares,
    cosine_figures.phase_measures,
    update_figures.predictions,
    update_figures.first_order_changes,
    cosine_figures.cosines_by_phase,
)


class Section(TypedDict):
    """What the page shows of one run's instrument.jsonl."""

    name: str
    reading: list[str]  # sentences
    figures: list[Figure | None]  # one per FIGURES; None where its data are missing or
    # too few, which the last sentence says
    header: Sequence[str]  # of the table
    rows: list[list[str]]
    table_note: str


def instrument_section(name: str, rows: Sequence[dict[str, Any]]) -> Section | None:
    """The section about the rows of instrument.jsonl; None without usable ones.

    Args:
        name: The run's, in every title; empty where the page is about one run.
        rows: As read.
    """
    measured = usable(rows)
    if not measured:
        return None
    drawn = [draw(measured) for draw in FIGURES]
    refused = [x.text() for x in drawn if isinstance(x, TooFew)]
    figures = [None if isinstance(x, TooFew) else x for x in drawn]
    if name:
        for figure in figures:
            if figure:
                figure["title"] = f"{figure['title']}: {name}"
    sentences = reading(measured)
    if refused:
        sentences.append(f"Not drawn, for too little to show: {'; '.join(refused)}.")
    return Section(
        name=name,
        reading=sentences,
        figures=figures,
        header=HEADER,
        rows=table(measured),
        table_note=TABLE_NOTE,
    )
