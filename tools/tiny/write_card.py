"""Write the tiny model's card from what `tools/tiny/evaluate_tiny.py --output` measured."""

import argparse
import json
from pathlib import Path

from PIL import Image
from train_tiny import shift_of

BAR = 95.0
TEMPLATE = Path(__file__).parent / "tiny_card.md"


def card(measured: Path, steps: int, distilled: int) -> str:
    """Return the card's text.

    **Arguments:** `measured`: the folder of measurements. `steps`: of the transformer's training.
    `distilled`: steps of the guidance distillation.
    """
    scores = json.loads((measured / "scores.json").read_text())
    reached = scores["scores"][0]["all"]
    short = (
        f"The bar set for this model is {BAR:.0f} % at the defaults; "
        f"this version reaches {reached:.1f} %"
    )
    verdict = (
        f"{short}."
        if reached >= BAR
        else f"{short}: it is short of it, and its trainer is ready to go on."
    )
    return TEMPLATE.read_text().format(
        prompts=scores["prompts"],
        table=(measured / "table.md").read_text().strip(),
        relations=", ".join(
            f"{name} {right:.1f} %" for name, right in scores["by_relation"].items()
        ),
        checker=scores["checker"],
        psnr=scores["vae_psnr"],
        kept=scores["vae_kept"],
        box=scores["box_alone"],
        verdict=verdict,
        steps=steps,
        distilled=distilled,
        mu=shift_of(64),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measured", type=Path, help="the folder that the evaluation wrote")
    parser.add_argument("--steps", type=int, required=True, help="of the transformer's training")
    parser.add_argument(
        "--distilled", type=int, required=True, help="steps of guidance distillation"
    )
    parser.add_argument("--to", type=Path, default=Path("weights/tiny"))
    options = parser.parse_args()
    (options.to / "README.md").write_text(card(options.measured, options.steps, options.distilled))
    # The images have few colours, so a palette keeps them in a quarter of the bytes.
    samples = Image.open(options.measured / "samples.png").quantize(256, dither=Image.Dither.NONE)
    samples.save(options.to / "samples.png", optimize=True)


if __name__ == "__main__":
    main()
