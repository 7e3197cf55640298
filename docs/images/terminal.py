"""Draws what `evmamba classify` and `evmamba train` print in a terminal, for light and dark pages.

    python docs/images/terminal.py

Runs the commands on this machine and writes `terminal-*.svg` beside this file. Linux and macOS only.
"""

import os
import pty
import re
import subprocess
import sys
import termios
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.color import parse_rgb_hex
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COLUMNS, LINES = 100, 50
FONT_FACE = re.compile(r"@font-face \{.*?\}", re.DOTALL)  # rich's own loads fonts from the internet
CONTROL = re.compile(r"(\r|\n|\x1b\[[0-9;]*[AK]|\x1b\[\?[0-9]*[hl])")
EPOCHS = 6
DIGITS = (3, 5, 8)  # among the examples; all ten make a long picture

# black, red, green, yellow, blue, magenta, cyan, white
ANSI_LIGHT = ["#24292f", "#cf222e", "#116329", "#7a4e00", "#0969da", "#8250df", "#1b7c83", "#57606a"]
ANSI_DARK = ["#484f58", "#ff7b72", "#3fb950", "#d29922", "#58a6ff", "#bc8cff", "#39c5cf", "#b1bac4"]


def create_theme(paper: str, ink: str, ansi: list[str]) -> TerminalTheme:
    return TerminalTheme(*[parse_rgb_hex(color[1:]) for color in (paper, ink)], [parse_rgb_hex(c[1:]) for c in ansi])


THEMES = {
    "light": create_theme("#f6f8fa", "#1f2328", ANSI_LIGHT),
    "dark": create_theme("#0d1117", "#e6edf3", ANSI_DARK),
}


def run_in_terminal(arguments: list[str], folder: Path) -> str:
    """Runs `evmamba` in a pseudo-terminal, and returns what it prints, with colors."""
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (LINES, COLUMNS))
    process = subprocess.Popen(
        [sys.executable, "-m", "evmamba_hub.cli", *arguments],
        cwd=folder,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)},
        stdin=subprocess.DEVNULL,
        stdout=child,
        stderr=child,
    )
    os.close(child)
    output = b""
    while True:
        try:
            chunk = os.read(parent, 65536)
        except OSError:  # Linux reports the end of a closed terminal so
            break
        if not chunk:
            break
        output += chunk
    os.close(parent)
    if process.wait() != 0:
        raise SystemExit(f"`evmamba {' '.join(arguments)}` failed:\n{output.decode()}")
    return output.decode()


def show_screen(output: str) -> str:
    """Applies the control sequences by which progress bars rewrite their lines, and keeps the colors."""
    lines, row, rewrite = [""], 0, False
    for part in CONTROL.split(output):
        if part == "\n":
            row, rewrite = row + 1, False
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            rewrite = True
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1] or 1)
        elif part.endswith("K") and part.startswith("\x1b"):
            lines[row] = ""
        elif part and not part.startswith("\x1b[?"):
            lines[row] = part if rewrite else lines[row] + part
            rewrite = False
    return "\n".join(lines).rstrip()


def draw(name: str, command: str, output: str) -> None:
    for theme_name, theme in THEMES.items():
        console = Console(width=COLUMNS, record=True, file=StringIO(), force_terminal=True, color_system="truecolor")
        console.print(Text.assemble(("$ ", "bold green"), command))
        console.print(Text.from_ansi(show_screen(output)))
        svg = console.export_svg(title="", theme=theme, unique_id=f"terminal-{name}")
        svg = FONT_FACE.sub("", svg).replace("Fira Code", "ui-monospace")
        if theme_name == "light":
            svg = svg.replace("#3a3a3a", "#d0d7de")  # the rest of a bar, which rich colors for dark terminals
        (HERE / f"terminal-{name}-{theme_name}.svg").write_text(svg)


def draw_classification() -> None:
    arguments = ["classify", *(f"demo/examples/digit_{digit}.png" for digit in DIGITS), "--top-k", "3"]
    draw("classify", f"evmamba {' '.join(arguments)}", run_in_terminal(arguments, ROOT))


def draw_training() -> None:
    with TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "training_evmamba.digits", "digits"], cwd=folder, check=True)
        arguments = ["train", "--recipe", "digits", "--dataset", "digits", "--output-dir", "run"]
        arguments += ["--epochs", str(EPOCHS), "--warmup-epochs", "1", "--ema-decay", "0.9"]
        draw("train", f"evmamba {' '.join(arguments)}", run_in_terminal(arguments, Path(folder)))


if __name__ == "__main__":
    draw_classification()
    draw_training()
