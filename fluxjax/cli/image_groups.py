"""Groups of images that `fluxjax generate` draws together: their metadata, and the final report."""

from collections.abc import Sequence
from typing import NamedTuple

from fluxjax.cli.loaded_networks import LoadedNetworks
from fluxjax.cli.places import PlannedImage
from fluxjax.cli.progress import Clock
from fluxjax.cli.prompts import Line
from fluxjax.cli.replay import image_command
from fluxjax.cli.request import Request
from fluxjax.cli.starts import StartFacts, describe_start
from fluxjax.generate.image_to_image import Start


class ImageGroup(NamedTuple):
    """Images that are drawn together.

    `numbers`: of the images of all prompts, or of the lines of a file. `request`: for their size.
    `facts`: of one of the images that are drawn again, or None; all begin at the same time.
    """

    numbers: list[int]
    request: Request
    facts: StartFacts | None

    @property
    def start(self) -> Start:
        """Where sampling starts."""
        times = self.request.recipe.times
        if self.facts is None:
            return Start(times, 0)
        return self.facts.repaint.start_of(times)

    def metadata(self, line: Line, networks: LoadedNetworks) -> dict[str, str]:
        """Return the metadata of the image of a line, all but its number and its command."""
        changes = {} if self.facts is None else self.facts.description
        return self.request.metadata(line, networks.guidance_text, changes)

    def command(self, line: Line, image: PlannedImage, networks: LoadedNetworks) -> str:
        """Return the command that draws one image of the group again."""
        return image_command(self.request, line, image, networks.guidance_number, self.facts)


def clock_of_groups(
    request: Request, groups: Sequence[ImageGroup], *, silent: bool = False
) -> Clock:
    """Return a clock for the steps of all groups. **Arguments:** `silent`: as for `Clock`."""
    steps = sum(group.start.steps for group in groups)
    evaluations = request.recipe.step.evaluations * request.start.repeats
    return Clock(steps, evaluations, silent=silent)


def print_report(clock: Clock, request: Request, reused: int, groups: Sequence[ImageGroup]) -> None:
    """Print the time t that drawing started from (for images that are drawn again), and the seconds
    of each stage.

    **Arguments:** `reused`: the number of evaluations that a step cache skipped, which is printed
    with one.
    """
    notes: dict[str, None] = {}
    for group in groups:
        if group.facts is not None:
            notes.setdefault(describe_start(group.facts.repaint, group.start))
    for note in notes:
        print(note)
    report = clock.report()
    if request.recipe.guidance.cache is not None:
        sides = 2 if request.guides_by_scale else 1
        evaluations = clock.steps * clock.evaluations * sides
        report += f", cache: {reused} of {evaluations} evaluations skipped"
    print(report)
