"""Gemma 3: every picture becomes one square and the same number of visual tokens, between two marks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from PIL import Image

from vlmtrim.graphs.contract import Contract
from vlmtrim.graphs.reading import Folder
from vlmtrim.runtime.image_settings import BILINEAR, ImageSettings
from vlmtrim.runtime.processors import base, llava
from vlmtrim.runtime.processors.base import Pictures

MARKS = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}


class Processor(llava.Processor):
    """``pixel_values`` float32 [I, 3, H, W]; in the prompt a picture's tokens stand between marks and empty lines.

    The steps are those of transformers' Gemma 3 image processor (Pillow backend) without pan and scan, bit-equal.
    """

    def __init__(self, files: Folder, contract: Contract):
        super().__init__(files, contract)
        settings = ImageSettings.read(files)
        self._image_processor = dataclasses.replace(self._image_processor, resample=settings.resample(BILINEAR))
        if settings.boolean("do_pan_and_scan", False):
            raise settings.refuse(
                "do_pan_and_scan is true, and pictures are not cut into crops here; set it to false, and give crops as "
                "further pictures"
            )
        start, token, end = base.special_tokens(files, MARKS)
        self._words = f"\n\n{start}{token * contract.image_tokens}{end}\n\n"

    def __call__(self, images: Sequence[Image.Image]) -> Pictures:
        """RGB pictures -> inputs of the vision graph, and what the prompt says of them."""
        plain = super().__call__(images)
        return Pictures(plain.inputs, plain.tokens, words=(self._words,) * len(images))
