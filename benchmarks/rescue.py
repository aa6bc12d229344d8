"""The pictures of a rescue: the notebook's, with its outputs, and an animation of twenty seconds.

    python -m benchmarks.rescue

runs the cells of ``examples/rescue.ipynb``, puts what they print and draw into it, and writes
``docs/_static/rescue.gif`` of the same run. Needs matplotlib.
"""

import base64
import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lbw_optax.sentences import logged

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "rescue.ipynb"
GIF = ROOT / "docs" / "_static" / "rescue.gif"
SECONDS, FRAMES, HELD = 20, 80, 12  # of the frames so many stay on the last picture
DOTS = 80  # an inch, of 8 by 4.5


def main() -> None:
    """Write notebook and animation anew."""
    document = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    found = run(document)
    NOTEBOOK.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    animate(found, GIF)
    print(f"{NOTEBOOK}\n{GIF}, {GIF.stat().st_size / 1000:.0f} kB")


def run(document: dict[str, Any]) -> dict[str, Any]:
    """Execute the code cells of a notebook in order, each with its outputs put into it.

    Returns the names that they have made.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names: dict[str, Any] = {"__name__": "notebook"}
    cells = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, start=1):
        said = io.StringIO()
        source = "".join(cell["source"]).replace("plt.show()", "")
        with contextlib.redirect_stdout(said):
            exec(compile(source, f"{NOTEBOOK.name}, cell {number}", "exec"), names)
        pictures = [_picture(plt.figure(i)) for i in plt.get_fignums()]
        plt.close("all")
        printed = {"name": "stdout", "output_type": "stream"}
        text = said.getvalue().splitlines(keepends=True)
        cell["execution_count"] = number
        cell["outputs"] = [printed | {"text": text}] * bool(text) + pictures
    return names


def _picture(figure: Any) -> dict[str, Any]:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90, metadata={"Software": None})
    data = {"image/png": base64.b64encode(file.getvalue()).decode()}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def animate(found: dict[str, Any], path: Path) -> None:
    """The run of the notebook as it goes on; few colours, so that it stays small."""
    steps, losses, scales = np.array(found["seen"]).T
    alone = np.array(found["alone"])
    audit = Path(found["directory"]) / "events.jsonl"
    lines = [json.loads(line) for line in audit.read_text(encoding="utf-8").splitlines()]
    drawn = _canvas(steps, losses, scales, alone)
    shown = np.linspace(1, len(steps), FRAMES - HELD).astype(int).tolist()
    shown += [len(steps)] * HELD
    frames = [drawn(upto, _newest(lines, steps[:upto])) for upto in shown]
    palette = frames[-1].quantize(24)
    small = [frame.quantize(palette=palette, dither=0) for frame in frames]
    every = 1000 * SECONDS // FRAMES
    small[0].save(
        path, save_all=True, append_images=small[1:], duration=every, loop=0, optimize=True
    )


def _newest(lines: list[dict[str, Any]], steps: np.ndarray) -> str:
    """In a sentence, the intervention before this moment that came last."""
    reached = int(steps.max())
    past = [line for line in lines if line.get("from_step", line["step"] + 1) <= reached + 1]
    newest = max(past, key=lambda line: line.get("from_step", line["step"]), default=None)
    return logged(newest)[1] if newest is not None else ""


def _canvas(
    steps: np.ndarray, losses: np.ndarray, scales: np.ndarray, alone: np.ndarray
) -> Callable[[int, str], Any]:
    """What draws the first so many steps with a sentence below, as an image of Pillow."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    def drawn(upto: int, sentence: str) -> Any:
        figure = Figure(figsize=(8, 4.5), dpi=DOTS)
        canvas = FigureCanvasAgg(figure)
        above, below = figure.subplots(2, sharex=True, height_ratios=[2, 1])
        figure.subplots_adjust(0.1, 0.2, 0.98, 0.9)
        figure.suptitle("AdamW at a rate that is too high, a NaN, a broken weight", fontsize=11)
        reached = int(steps[:upto].max()) + 1
        above.semilogy(alone[:reached], "--", color="#b3400a", label="AdamW alone")
        if not np.isfinite(alone[:reached]).all():
            end = int(np.isfinite(alone).sum())
            above.plot(end, alone[end - 1], "X", color="#b3400a", label="its weights are NaN")
        above.semilogy(steps[:upto], losses[:upto], color="#0b5cad", label="under the guard")
        below.semilogy(steps[:upto], scales[:upto], color="#0b5cad")
        above.set(ylabel="loss", ylim=(0.1, 30))
        below.set(xlabel="step", ylabel="scale", xlim=(0, len(alone)), ylim=(3e-3, 1))
        above.legend(loc="upper right", fontsize=9)
        figure.text(0.1, 0.03, sentence, fontsize=10)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())

    return drawn


if __name__ == "__main__":
    main()
