"""Reports with empty figures: to draw them is a third of a short run's time.

`python -m tests.e2e.undrawn ...` is `python -m grpo_jax ...` with such reports.
"""

import sys

from matplotlib.figure import Figure

DRAWN = Figure.savefig


def savefig(figure, file, **options):
    """Of what `Figure.savefig` writes, an SVG is empty."""
    if options.get("format") == "svg":
        file.write("<svg></svg>")
    else:
        DRAWN(figure, file, **options)


def main(argv=None):
    """The command line's."""
    from grpo_jax.cli import main

    Figure.savefig = savefig
    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
