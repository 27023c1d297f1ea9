"""Frames as video files: GIF by Pillow, MP4 by imageio, which is an extra."""

import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from agent.errors import UserError, writing

PALETTE_FRAMES = 8
"""Frames from which the colours of a GIF are taken, at most."""


def check_kind(kind: str, flag: str) -> None:
    """UserError, which begins with the flag as it was given, if no video of this kind can be written."""
    if kind not in ("gif", "mp4"):
        raise UserError(f"{flag}: videos are .gif or .mp4")
    if kind == "mp4" and not find_spec("imageio"):
        raise UserError(f"{flag}: .mp4 needs imageio: pip install 'imageio[ffmpeg]', or use .gif")


def check_video(file: Path) -> None:
    """UserError if the --video `file` cannot be written, as far as this can be known beforehand."""
    check_kind(file.suffix.removeprefix("."), f"--video {file}")
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"--video {file}: give a file in a folder that exists")


def write_video(file: Path, frames: np.ndarray, fps: int) -> None:
    """Write frames (T, H, W, 3) of bytes as .gif or .mp4.

    Raises:
        UserError: the file cannot be written.
    """
    if file.suffix == ".gif":
        with writing(file):
            file.write_bytes(as_gif(frames, fps))
        return
    import imageio.v3 as imageio

    height, width = (-(-size // 2) * 2 for size in frames.shape[1:3])  # the codec halves the resolution of colours
    padding = [(0, 0), (0, height - frames.shape[1]), (0, width - frames.shape[2]), (0, 0)]
    try:
        imageio.imwrite(file, np.pad(frames, padding, mode="edge"), fps=fps, macro_block_size=2)
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{file}: {error}; use a .gif, or pip install 'imageio[ffmpeg]' for .mp4") from error


def as_gif(frames: np.ndarray, fps: int) -> bytes:
    """Frames (T, H, W, 3) of bytes as a GIF that begins again at its end."""
    from PIL import Image

    # One palette for all frames, from some of them: it takes a third of the time, and colours do not flicker.
    some = Image.fromarray(np.concatenate(frames[:: -(-len(frames) // PALETTE_FRAMES)]))
    palette = some.quantize(dither=Image.Dither.NONE)
    pictures = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    stream = io.BytesIO()
    pictures[0].save(
        stream, format="GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0
    )
    return stream.getvalue()
