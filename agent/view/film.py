"""Predicted images as a film: what was, what the model says, and the difference, sequences side by side."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from agent.view.open_loop import Predicted

TILE = 128  # pixels that an image is enlarged to, about
MARGIN, HEADER, TITLE, BAR, GAP = 64, 26, 20, 8, 4  # pixels: row labels, text, titles, progress, between tiles
OBSERVED, PREDICTED = (46, 125, 50), (200, 90, 0)  # colours of the two parts of a sequence
PAPER, INK, OVER = (255, 255, 255), (30, 30, 30), (225, 225, 225)


def film(predicted: Predicted, key: str, titles: Sequence[str], part: str, error: bool = True) -> np.ndarray:
    """Frames (T, H, W, 3) of bytes.

    Args:
        predicted: the sequences.
        key: which images.
        titles: of the sequences.
        part: what the steps that were not observed are called.
        error: show half of (1 + model - truth) too, which is grey where the model is right.
    """
    truth, model = _pictures(predicted.truth[key]), _pictures(predicted.model[key])
    rows = {"truth": truth, "model": model} | ({"error": (1 + model - truth) / 2} if error else {})
    enlarged = max(1, round(TILE / truth.shape[2]))
    rows = {name: _enlarged(value, enlarged) for name, value in rows.items()}
    return np.stack([_frame(rows, predicted, t, titles, part) for t in range(truth.shape[1])])


def _pictures(images: Tensor) -> np.ndarray:
    """Images (B, T, H, W, C) in 0 to 1 as (B, T, H, W, 3): if channels are not 3, the last one, in grey."""
    if images.shape[-1] != 3:
        images = images[..., -1:].expand(*images.shape[:-1], 3)
    return images.numpy()


def _enlarged(pictures: np.ndarray, times: int) -> np.ndarray:
    """In bytes, every pixel a square: (B, T, H, W, 3) -> (B, T, times * H, times * W, 3)."""
    return (255 * np.nan_to_num(pictures)).round().astype(np.uint8).repeat(times, 2).repeat(times, 3)


def _frame(rows: dict[str, np.ndarray], predicted: Predicted, t: int, titles: Sequence[str], part: str) -> np.ndarray:
    """One frame (H, W, 3): header, progress, titles, and the rows of tiles with their names."""
    amount, steps, height, width, _ = rows["truth"].shape
    across, down = MARGIN + amount * (width + GAP), HEADER + BAR + TITLE + len(rows) * (height + GAP)
    frame = Image.new("RGB", (across, down), PAPER)
    draw, observed = ImageDraw.Draw(frame), t < predicted.context
    large, small = ImageFont.load_default(15), ImageFont.load_default(12)
    now = f"{part} for {t - predicted.context + 1}" if not observed else "observed"
    draw.rectangle((0, 0, across, HEADER - 1), OBSERVED if observed else PREDICTED)
    draw.text((6, HEADER / 2), f"step {t + 1} of {steps}: {now}", PAPER, large, anchor="lm")
    for place in range(steps):  # a bar of the whole sequence, filled up to now
        color = OBSERVED if place < predicted.context else PREDICTED
        begin, end = (round(edge * across / steps) for edge in (place, place + 1))
        draw.rectangle((begin, HEADER, end - 1, HEADER + BAR - 1), color if place <= t else OVER)
    end = round(predicted.context * across / steps)
    draw.rectangle((end - 1, HEADER, end + 1, HEADER + BAR - 1), INK)
    for column, title in enumerate(titles):
        draw.text((MARGIN + column * (width + GAP) + width / 2, HEADER + BAR + TITLE / 2), title, INK, small, "mm")
    for row, (name, pictures) in enumerate(rows.items()):
        top = HEADER + BAR + TITLE + row * (height + GAP)
        draw.text((6, top + height / 2), name, INK, large, anchor="lm")
        if name == "error":
            draw.text((6, top + height / 2 + 16), "(grey: 0)", INK, small, anchor="lm")
        for column in range(amount):
            left = MARGIN + column * (width + GAP)
            if predicted.valid[column, t]:
                frame.paste(Image.fromarray(pictures[column, t]), (left, top))
            else:
                draw.rectangle((left, top, left + width - 1, top + height - 1), OVER)
                draw.text((left + width / 2, top + height / 2), "episode over", INK, small, anchor="mm")
    return np.asarray(frame)
