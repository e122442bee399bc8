"""Video-LLaVA in transformers as it is; frames of a video are prepared by its image processor, as pictures are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmtrim.export.oracles import films


class Reference(films.Reference):
    """One conversation, as :class:`vlmtrim.export.oracles.films.Reference` has it."""

    def _pictures(self, pictures: list[Any]) -> dict[str, Tensor]:
        return {"pixel_values": self._frames(pictures)}

    def _frames(self, film: list[Any]) -> Tensor:
        return self._image_processor(film, return_tensors="pt", return_legacy_image_output=False)["pixel_values"]
