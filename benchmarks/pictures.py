"""Pictures of reports for README: what a reader sees first, in the light and in the dark.

    python -m benchmarks.pictures experiment=OUTPUT/report.html scouting=OUTPUT/report.html

writes ``docs/NAME-light.png`` and ``docs/NAME-dark.png`` of every NAME=REPORT, with the Chromium or
Chrome of this machine.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SCHEMES = {"light": 1, "dark": 0}
COLORS = 256
DOCS = Path(__file__).parents[1] / "docs"


def main(arguments: Sequence[str] | None = None) -> None:
    """Take the pictures that the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("reports", nargs="+", metavar="NAME=REPORT", type=_named)
    parser.add_argument("--width", type=int, default=1000, help="of the page, in pixels")
    parser.add_argument("--height", type=int, default=972, help="of what is seen of it")
    asked = parser.parse_args(arguments)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        parser.error(f"no browser here; install one of {', '.join(BROWSERS)}")
    for name, report in asked.reports:
        for scheme in SCHEMES:
            picture = DOCS / f"{name}-{scheme}.png"
            take(browser, report, picture, scheme, (asked.width, asked.height))
            print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


def _named(text: str) -> tuple[str, Path]:
    name, _, report = text.partition("=")
    if not report or not Path(report).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=REPORT with a file of that name")
    return name, Path(report).resolve()


def take(browser: str, report: Path, picture: Path, scheme: str, size: tuple[int, int]) -> None:
    """Save what a browser window of that size shows of a report, in few colours.

    Raises:
        subprocess.CalledProcessError: The browser failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder) / "seen.png"
        command = [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage"),
            f"--user-data-dir={folder}/profile",
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
            f"--window-size={size[0]},{size[1]}",
            f"--screenshot={seen}",
            report.as_uri(),
        ]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        with Image.open(seen) as image:
            image.convert("RGB").quantize(COLORS, Image.Quantize.MAXCOVERAGE).save(
                picture, optimize=True
            )


if __name__ == "__main__":
    main()
