"""The program of the Space. It shows the model that the variable EVMAMBA_MODEL names, and the bundled one."""

import os
from pathlib import Path

from evmamba_demo.interface import launch


HERE = Path(__file__).parent

if __name__ == "__main__":
    models = [os.environ["EVMAMBA_MODEL"]] if os.environ.get("EVMAMBA_MODEL") else []
    launch(
        [*models, str(HERE / "digits")],
        allow_any=False,  # visitors of a public Space do not choose what it downloads and runs
        host=None,
        port=None,
    )
