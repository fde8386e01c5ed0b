"""Small pictures for trackers that show images: a matrix in colours, and curves in a unit square."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLORS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0))
"""Of Okabe and Ito."""

CELL, SIDE, MARGIN = 64, 320, 48
GREY, BLACK = (150, 150, 150), (0, 0, 0)

Picture = NDArray[np.uint8]
"""Pixels [height, width, 3]."""


def matrix_picture(values: Sequence[Sequence[float]], names: Sequence[str]) -> Picture:
    """Returns a square matrix of values between -1 and 1: blue below 0, orange above, each number written in."""
    canvas, draw = _canvas(MARGIN * 2 + CELL * len(values), MARGIN + CELL * len(values))
    for i, row in enumerate(values):
        draw.text((4, MARGIN + CELL * i + CELL // 2 - 5), names[i][:14], fill=BLACK)
        draw.text((MARGIN * 2 + CELL * i + 4, MARGIN // 2), names[i][:9], fill=BLACK)
        for j, value in enumerate(row):
            share, tint = min(1.0, abs(value)), COLORS[5] if value > 0 else COLORS[0]
            color = tuple(int(255 + (channel - 255) * share) for channel in tint)
            left, top = MARGIN * 2 + CELL * j, MARGIN + CELL * i
            draw.rectangle((left, top, left + CELL - 3, top + CELL - 3), fill=color)
            draw.text((left + 14, top + CELL // 2 - 6), f"{value:.2f}", fill=BLACK)
    return np.asarray(canvas, dtype=np.uint8)


def square_picture(curves: Mapping[str, Sequence[tuple[float, float]]], title: str) -> Picture:
    """Returns curves of points within the unit square, with its diagonal and a legend."""
    canvas, draw = _canvas(SIDE + 2 * MARGIN, SIDE + 2 * MARGIN + 16 * len(curves))

    def at(x: float, y: float) -> tuple[float, float]:
        return MARGIN + SIDE * min(1.0, max(0.0, x)), MARGIN + SIDE * (1 - min(1.0, max(0.0, y)))

    draw.text((MARGIN, 16), title, fill=BLACK)
    draw.rectangle((*at(0, 1), *at(1, 0)), outline=GREY)
    draw.line((at(0, 0), at(1, 1)), fill=GREY)
    for number, (name, points) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        if len(points) > 1:
            draw.line([at(*point) for point in points], fill=color, width=3)
        for x, y in (at(*point) for point in points):
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
        draw.text((MARGIN, SIDE + MARGIN + 12 + 16 * number), name, fill=color)
    for value in (0.0, 0.5, 1.0):
        draw.text((at(value, 0)[0] - 8, SIDE + MARGIN + 1), f"{value:g}", fill=BLACK)
        draw.text((MARGIN - 26, at(0, value)[1] - 6), f"{value:g}", fill=BLACK)
    return np.asarray(canvas, dtype=np.uint8)


def _canvas(width: int, height: int) -> tuple[Any, Any]:
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (width, height), "white")
    return canvas, ImageDraw.Draw(canvas)
