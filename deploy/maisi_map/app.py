"""MONAI Deploy application: a folder with a SEG, or an RTSTRUCT and its CT, in; a synthetic CT study out.

    python app.py -i INPUT -o OUTPUT        # or `monai-deploy package`, see README.md

``MAISI_BUNDLES`` is the folder with the bundles, by default the one of the repository.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from holoscan.conditions import CountCondition
from monai.deploy.core import Application, Operator, OperatorSpec

from maisi_tools.service.chain import run_folder
from maisi_tools.service.settings import Step

BUNDLES = Path(os.environ.get("MAISI_BUNDLES", Path(__file__).resolve().parents[2] / "bundles"))


class MaskToCTOperator(Operator):
    """Runs ``maisi_controlnet`` on the SEG or RTSTRUCT of the input folder, and writes the study."""

    def __init__(self, fragment: Any, *args: Any, input_path: Path, output_path: Path, **kwargs: Any) -> None:
        self.input_path, self.output_path = input_path, output_path
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """It reads a folder and writes one: there are no ports."""

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        bundle = os.environ.get("MAISI_CONTROLNET", str(BUNDLES / "maisi_controlnet"))
        run_folder(self.input_path, self.output_path, (Step(bundle, settings=_settings()),))


def _settings() -> dict[str, Any]:
    steps, solver = os.environ.get("MAISI_STEPS"), os.environ.get("MAISI_SOLVER")
    settings: dict[str, Any] = {} if steps is None else {"num_inference_steps": int(steps)}
    return settings if solver is None else {**settings, "solver": solver}


class MaisiApp(Application):
    """Mask to CT."""

    def compose(self) -> None:
        context = Application.init_app_context(self.argv)
        paths = {"input_path": Path(context.input_path), "output_path": Path(context.output_path)}
        self.add_operator(MaskToCTOperator(self, CountCondition(self, 1), name="mask_to_ct", **paths))


if __name__ == "__main__":
    MaisiApp().run()
