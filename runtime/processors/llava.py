"""LLaVA-1.5: every picture becomes one square and the same number of visual tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.reading import Folder
from vlmtrim.runtime.image import ImageProcessor, expect_inputs
from vlmtrim.runtime.processors import base
from vlmtrim.runtime.processors.base import Pictures


class Processor(base.Processor):
    """``pixel_values`` float32 [I, 3, H, W]."""

    def __init__(self, files: Folder, contract: Contract):
        super().__init__(files, contract)
        self._image_processor = ImageProcessor.from_folder(files)
        size = self._image_processor.height, self._image_processor.width
        expect_inputs(files, contract, {"pixel_values": (None, 3, *size)})

    def __call__(self, images: Sequence[Image.Image]) -> Pictures:
        """RGB pictures -> inputs of the vision graph."""
        pixels = np.stack([self._image_processor(image) for image in images])
        return Pictures({"pixel_values": pixels}, (self.contract.image_tokens,) * len(images))

    def framed(self, image: Image.Image) -> Image.Image:
        """The picture resized and cropped, without normalisation."""
        return self._image_processor.framed(image)
