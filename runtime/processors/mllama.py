"""Llama-3.2-Vision: a picture is fitted to a canvas of tiles; a token sees the pictures that its text follows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlmtrim.graphs.contract import PADDING, SEES_NOTHING, Contract
from vlmtrim.graphs.reading import Folder
from vlmtrim.runtime.crossing import CrossProcessor, View
from vlmtrim.runtime.image import expect_inputs, normalised
from vlmtrim.runtime.image_settings import BILINEAR, ImageSettings
from vlmtrim.runtime.processors.base import Pictures

MOST_TILES = 64  # of a picture; the checkpoints have 4


class Processor(CrossProcessor):
    """``pixel_values`` float32 [I, T, 3, H, H], ``aspect_ratio_ids`` int64 [I], ``aspect_ratio_mask`` int64 [I, T].

    As transformers' Pillow processor makes them: the canvas of at most T tiles that enlarges the picture least, else
    reduces it least, the picture at its top left, black filling normalised like the picture.
    """

    def __init__(self, files: Folder, contract: Contract):
        super().__init__(files, contract)
        settings = ImageSettings.read(files)
        size = settings.sides("size", ("height", "width"))
        self._tile = size.get("height", 0)
        if not self._tile or size.get("width") != self._tile:
            raise settings.refuse(f"size is {size}; expected height and width of a square tile")
        self._tiles = settings.integer("max_image_tiles", 1, MOST_TILES)
        self._resample = settings.resample(BILINEAR)
        values = settings.normalisation()
        self._scale, self._mean, self._std = values.scale, values.mean, values.std
        shapes = {
            "pixel_values": (None, self._tiles, 3, self._tile, self._tile),
            "aspect_ratio_ids": (None,),
            "aspect_ratio_mask": (None, self._tiles),
        }
        expect_inputs(files, contract, shapes)
        if contract.image_tokens % self._tiles:
            raise settings.refuse(
                f"max_image_tiles is {self._tiles}, of which {contract.image_tokens} features cannot be made"
            )
        sizes = range(1, self._tiles + 1)
        # (rows, columns) of tiles; a picture's aspect-ratio id is its place in this list, counted from 1.
        self._canvases = [(rows, columns) for rows in sizes for columns in sizes if rows * columns <= self._tiles]

    def __call__(self, images: Sequence[Image.Image]) -> Pictures:
        """RGB pictures -> inputs of the vision graph; each stands in the prompt as one image token."""
        pixels = np.zeros((len(images), self._tiles, 3, self._tile, self._tile), dtype=np.float32)
        ids = np.zeros(len(images), dtype=np.int64)
        mask = np.zeros((len(images), self._tiles), dtype=np.int64)
        for index, image in enumerate(images):
            canvas = self._canvas(image)
            values = normalised(np.asarray(self._fitted(image, canvas)), self._scale, self._mean, self._std)
            tiles = self._split(values, canvas)
            pixels[index, : len(tiles)] = tiles
            mask[index, : len(tiles)] = 1
            ids[index] = self._canvases.index(canvas) + 1
        inputs = {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}
        return Pictures(inputs, (1,) * len(images))

    def framed(self, image: Image.Image) -> Image.Image:
        """The picture on its canvas."""
        return self._fitted(image, self._canvas(image))

    def image_numbers(self, pictures: Pictures, view: View) -> np.ndarray:
        """Numbers of the pictures, tile by tile; PADDING for the features of empty tiles."""
        mask = pictures.inputs["aspect_ratio_mask"]
        rows = len(view.pictures)
        number = (view.pictures[:, None] + np.arange(len(mask) // rows)).reshape(-1, 1)
        per_tile = np.where(mask > 0, number, PADDING)
        return per_tile.repeat(self.contract.image_tokens // self._tiles, axis=1).reshape(rows, -1)

    def seen_images(self, ids: np.ndarray, counts: np.ndarray, view: View, brings: bool) -> np.ndarray:
        """A token sees the last picture that begins at or before it, with those that its mark directly follows."""
        seen = np.empty((*ids.shape, 2), dtype=np.int64)
        seen[:] = SEES_NOTHING
        for row, count in enumerate(counts):
            for place in range(count):
                mark = brings and ids[row, place] == self.contract.image_token_id
                if mark:
                    if not view.at_mark[row]:
                        view.first[row] = view.pictures[row]
                    view.pictures[row] += 1
                    view.end[row] = view.pictures[row]
                view.at_mark[row] = mark
                if view.end[row]:
                    seen[row, place] = view.first[row], view.end[row]
        return seen

    def _canvas(self, image: Image.Image) -> tuple[int, int]:
        """(rows, columns) of tiles: the least enlargement, else the least reduction; of equals the smaller area."""
        canvases = np.array(self._canvases)
        scales = (canvases * self._tile / np.array([image.height, image.width])).min(axis=1)
        best = scales[scales >= 1].min() if (scales >= 1).any() else scales.max()
        equals = [canvas for canvas, scale in zip(self._canvases, scales, strict=True) if scale == best]
        return min(equals, key=lambda canvas: canvas[0] * canvas[1])

    def _fitted(self, image: Image.Image, canvas: tuple[int, int]) -> Image.Image:
        """The picture in the top left corner of its canvas, never smaller than a tile allows, never stretched."""
        height, width = (tiles * self._tile for tiles in canvas)
        target_height = min(max(image.height, self._tile), height)
        target_width = min(max(image.width, self._tile), width)
        by_height, by_width = target_height / image.height, target_width / image.width
        if by_width < by_height:
            size = target_width, min(int(image.height * by_width) or 1, target_height)
        else:
            size = min(int(image.width * by_height) or 1, target_width), target_height
        black = Image.new("RGB", (width, height))
        black.paste(image.resize(size, resample=self._resample))
        return black

    def _split(self, values: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
        """[3, height, width] -> [tiles, 3, H, H], row by row."""
        rows, columns = canvas
        grid = values.reshape(3, rows, self._tile, columns, self._tile)
        return grid.transpose(1, 3, 0, 2, 4).reshape(-1, 3, self._tile, self._tile)
