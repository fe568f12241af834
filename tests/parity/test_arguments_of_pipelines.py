"""diffusers' arguments all have a row in the table that leads from them to this package."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "coming_from.md"
PIPELINES = (
    "pipeline_flux",
    "pipeline_flux_img2img",
    "pipeline_flux_inpaint",
    "pipeline_flux_fill",
    "pipeline_flux_control",
    "pipeline_flux_kontext",
    "pipeline_flux_controlnet",
    "pipeline_flux_prior_redux",
)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_each_argument_of_a_pipeline_has_a_row(pipeline):
    # Read as text: an import of diffusers takes seconds.
    package = importlib.util.find_spec("diffusers").submodule_search_locations[0]
    path = Path(package) / "pipelines" / "flux" / f"{pipeline}.py"
    calls = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == "__call__":
            calls.append(node)
    (call,) = calls
    section = PAGE.read_text().split("## diffusers\n")[1].split("\n## ")[0]
    named = set()
    for line in section.splitlines():
        if line.startswith("| "):
            named |= set(re.findall(r"`(\w+)`", line.split(" | ")[0]))
    arguments = {argument.arg for argument in call.args.args} - {"self"}
    assert arguments <= named, arguments - named
